"""Shares of a run's wall time: training steps that count, and all that is not one."""
import datetime
from collections.abc import Mapping

from softmask_jax.io.goodput import KINDS, duration
from softmask_jax.io.run_log import RunLog
from softmask_jax.report import page
from softmask_jax.report.charts import share_chart


def of_run(run: RunLog) -> str:
    """A bar for each share, and a table with what it means; "" for a run without an account."""
    if not (account := run.account):
        return ""
    since = datetime.datetime.fromtimestamp(account.since, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    first = account.marks[0][0] if account.marks else 0
    after = f" (step {first:,})" if first else ""
    text = f"{duration(account.wall)} since {since}{after}, starts: {account.starts:,}."
    shares = {kind.label: account.shares[name] for name, kind in KINDS.items()}
    rows = [
        (kind.label, f"{shares[kind.label]:.1%}", duration(account.seconds[name]).replace(" ", "\u00a0"), kind.meaning)
        for name, kind in KINDS.items()
    ]  # fmt: skip
    chart = page.figures(share_chart("Shares of the wall time", shares))
    table = page.table(("what", "share", "time", "meaning"), rows)
    return f'<p>{page.text(text)}</p>\n<div class="beside">\n{chart}{table}</div>\n'


def of_runs(runs: Mapping[str, RunLog]) -> str:
    """A table of the shares of the runs that have an account; "" without any."""
    accounts = {name: run.account for name, run in runs.items() if run.account}
    if not accounts:
        return ""
    rows = [(kind.label, *(f"{one.shares[name]:.1%}" for one in accounts.values())) for name, kind in KINDS.items()]
    rows.append(("Wall time", *(duration(one.wall) for one in accounts.values())))
    rows.append(("Starts", *(f"{one.starts:,}" for one in accounts.values())))
    return page.table(("what", *accounts), rows)
