"""Config, versions, summary and metrics of a run, finished or not, from its folder."""
import collections
import contextlib
import dataclasses
import json
import math
from array import array
from pathlib import Path

import numpy as np

from softmask_jax import config as config_schema
from softmask_jax.io import goodput, metrics
from softmask_jax.io.files import plain
from softmask_jax.io.paths import to_path

KEPT_SAMPLES = 4
# Larger values count as infinite, so that differences and margins of axes stay finite.
LARGEST = 1e150
NAMED_LINES = 5


@dataclasses.dataclass(frozen=True, eq=False)
class RunLog:
    """Contents of a run's folder."""

    path: Path
    config: dict  # nested; {} if it cannot be read
    versions: dict
    summary: dict | None  # None before the run's end
    columns: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]  # (kind, name): (steps [N], values [N]), ascending
    last: dict[str, dict]  # the newest row of each kind
    samples: list[dict]  # the newest rows of samples, oldest first
    first_samples: dict | None  # those of step 0
    histogram: dict | None  # the newest row with lambda's
    account: goodput.Account | None  # of the wall time; runs of older versions have none
    notes: list[str]  # what is missing or damaged, one line each

    @property
    def name(self) -> str:
        return self.path.resolve().name or str(self.path)

    @property
    def step(self) -> int:
        """The newest step in metrics and summary."""
        return max(row["step"] for row in [*self.last.values(), self.summary or {"step": 0}])

    @property
    def planned(self) -> int | None:
        """The number of updates of the config, if it names one."""
        with contextlib.suppress(ValueError, TypeError, KeyError):  # of another version's schema, or edited by hand
            return config_schema.of_run(self.config).updates if self.config else None
        steps = self.setting("train.steps")
        return steps if isinstance(steps, int) else None

    @property
    def finished(self) -> bool:
        """Whether the summary is of the last step."""
        return bool(self.summary) and self.summary["step"] >= max(self.step, self.planned or 0)

    @property
    def soft_masked(self) -> bool:
        return self.setting("soft_mask.variant") not in (None, "none")

    def setting(self, name: str):
        """The config's value of "section.key", or None."""
        return config_schema.flatten(self.config).get(name)

    def column(self, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps [N], values [N]) of `columns`, empty without such a number."""
        return self.columns.get((kind, name), (np.zeros(0), np.zeros(0)))

    def tokens(self, steps) -> np.ndarray | None:
        """Training tokens seen at steps [N]; None for rows of any length, such as conversations."""
        if self.setting("data.source") == "chat":
            return None
        rows, length = self.setting("train.global_batch_size"), self.setting("data.seq_len")
        return np.asarray(steps) * float(rows * length) if isinstance(rows, int) and isinstance(length, int) else None

    def flops(self, steps) -> np.ndarray | None:
        """Matrix-product FLOPs of training up to steps [N], without recomputation; None if speed was not measured."""
        at, share = self.column("train", "two_pass_share")
        timed, speed = self.column("train", "tokens_per_second")
        both, used = self.column("train", "model_flops_per_second")
        if not len(speed) or len(speed) != len(used) or self.tokens(steps) is None:
            return None
        # A step costs 3 forward passes, or 4 with two passes.
        forward = np.nanmedian(used / (speed * (3.0 + np.interp(timed, at, share) if len(share) else 3.0)))
        passes = np.cumsum(np.diff(at, prepend=0) * (3.0 + np.nan_to_num(share)))
        return np.interp(steps, [0, *at], [0, *passes]) * self.tokens(1) * forward


def read(path: str | Path, summary: dict | None = None) -> RunLog:
    """Read a run's folder, with `summary` in place of its summary.json. FileNotFoundError if it holds no run."""
    path = to_path(path)
    if not ((path / "config.json").is_file() or metrics.files(path)):
        remedy = "give the --workdir of a training run"
        raise FileNotFoundError(f"No run in '{path}' (it has neither config.json nor metrics.jsonl); {remedy}.")
    notes: list[str] = []
    config = _object(path / "config.json", notes, "the settings are unknown")
    versions = _object(path / "versions.json", notes, "versions and device are unknown")
    # A run that goes on has no summary yet.
    summary = _object(path / "summary.json", notes, None) if summary is None else plain(summary)
    if summary and not _is_step(summary.get("step")):
        notes.append("summary.json has no step; it is left out.")
        summary = {}
    account = None
    if (times := _object(path / goodput.FILE, notes, None)) and not (account := goodput.parse(times)):
        notes.append(f"{goodput.FILE} is damaged and left out.")
    reader = _Rows()
    try:
        for number, line in enumerate(metrics.lines(path), 1):
            reader.add(number, line)
    except FileNotFoundError:
        notes.append("There is no metrics.jsonl, so there are no curves.")
    except OSError as error:
        notes.append(f"metrics.jsonl cannot be read ({error.strerror}).")
    return RunLog(
        path, {k: v for k, v in config.items() if isinstance(v, dict)}, versions, summary or None, reader.arrays(),
        reader.last, sorted(reader.samples, key=lambda row: row["step"]), reader.first_samples, reader.histogram,
        account, [*notes, *reader.notes()],
    )  # fmt: skip


def number(value) -> float | None:
    """A number as `files.plain` writes it, "nan" and "inf" included; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and value not in ("nan", "inf", "-inf"):
        return None
    try:
        value = float(value)
    except OverflowError:
        return math.inf
    return math.copysign(math.inf, value) if abs(value) > LARGEST else value


class _Rows:
    """Rows of metrics by column: 200,000 of them as dicts would fill the memory of a laptop."""

    def __init__(self):
        self.last, self.samples = {}, collections.deque(maxlen=KEPT_SAMPLES)
        self.first_samples = self.histogram = None
        self._columns = collections.defaultdict(lambda: (array("d"), array("d")))
        self._damaged, self._not_finite = [], []

    def add(self, line_number: int, line: str) -> None:
        if not line.strip():
            return
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not _is_step(row.get("step")) or not isinstance(row.get("kind"), str):
            self._damaged.append(line_number)
            return
        step, kind = row["step"], row["kind"]
        if kind not in self.last or step >= self.last[kind]["step"]:
            self.last[kind] = row
        if kind == "samples":
            self.samples.append(row)
            self.first_samples = row if step == 0 else self.first_samples
        if isinstance(row.get("lambda_histogram"), list):
            self.histogram = row
        for name, value in row.items():
            if name in ("step", "kind") or (value := number(value)) is None:
                continue
            for column, entry in zip(self._columns[kind, name], (step, value), strict=True):
                column.append(entry)
            if not math.isfinite(value):
                self._not_finite.append((name, step))

    def arrays(self) -> dict:
        columns = {}
        for key, pair in self._columns.items():
            rows = np.array(pair)
            columns[key] = tuple(rows[:, np.argsort(rows[0], kind="stable")])
        return columns

    def notes(self) -> list[str]:
        notes = []
        if self._damaged:
            count = len(self._damaged)
            shown = ", ".join(map(str, self._damaged[:NAMED_LINES])) + ", ..." * (count > NAMED_LINES)
            lines = f"{count:,} line{'s' * (count > 1)} of metrics.jsonl ({shown})"
            notes.append(f"{lines} can't be read and are left out.")
        if self._not_finite:
            (name, step), count = self._not_finite[0], len(self._not_finite)
            are = "values are not finite, the first one" if count > 1 else "value is not finite:"
            notes.append(f"{count:,} {are} {name} at step {step:,}.")
        return notes


def _is_step(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _object(path: Path, notes: list[str], lost: str | None) -> dict:
    """The JSON object in a file; {} and a note without one. lost: what a reader misses; None: absence is not noted."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if lost:
            notes.append(f"There is no {path.name}: {lost}.")
        return {}
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} is damaged{f': {lost}' if lost else ' and left out'}.")
        return {}
    return content
