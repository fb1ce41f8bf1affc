"""Runs side by side: their curves on one page, and paired differences of their final models on the same masks:

    python -m softmask_jax.evaluate.compare runs/binary runs/stdlib [runs/more ...] [--draws 4] [--json out.json]

The first run is the baseline. Every window of the validation split is masked several times; the NELBO of a window is
the mean over its draws, and the 95 % intervals are over windows, paired where two estimates are compared. Training is
counted in forward passes, as the paper's method has it: 3 for a plain step, 3 + p_sm for a soft-masked one.
`--curves_only` overlays the curves of any runs, also of unfinished ones or of runs on different text."""
import argparse
import sys
from collections.abc import Sequence

from softmask_jax.config.command_line import command, command_parser
from softmask_jax.io import run_log
from softmask_jax.io.files import check_writable, write_atomically, write_json
from softmask_jax.io.paths import to_path
from softmask_jax.report import compare_page


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("evaluate.compare", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders of runs, the baseline first")
    add("--draws", type=int, default=4, help="masks a window; more where 100,000 tokens need them")
    add("--batch_size", type=int, default=16, help="windows at a time")
    add("--seed", type=int, default=40_000, help="of the masks")
    add("--out", default="compare.html", help="the page; replaces the file, compare.html by default")
    add("--json", default="", help="write the figures of the tables here too; replaces the file")
    add("--curves_only", action="store_true", help="score nothing: overlay the curves of any runs")
    flags = parser.parse_args(argv)
    flags.out, flags.json = (str(to_path(path)) if path else "" for path in (flags.out, flags.json))
    if len(flags.runs) < 2:
        parser.error("give two runs or more")
    if flags.draws < 1 or flags.batch_size < 1:
        parser.error("--draws and --batch_size must be positive")
    if flags.curves_only and flags.json:
        parser.error("--json holds the tables, which --curves_only leaves out")
    return flags


@command()
def main(argv: list[str]) -> None:
    """Exit status: 0 done; 1 the runs don't compare, or something cannot be read or written; 2 wrong command line."""
    flags = parse(argv)

    # Imports JAX.
    from softmask_jax.evaluate import comparison

    check_writable(flags.json)
    check_writable(flags.out, "--out")
    logs, measured, sentences = [run_log.read(path) for path in flags.runs], [], []
    if not flags.curves_only:
        runs = [comparison.load_run(path) for path in flags.runs]
        report = comparison.compare(runs, draws=flags.draws, batch_size=flags.batch_size, seed=flags.seed)
        print(comparison.markdown(report), end="\n\n")
        if flags.json:
            write_json(flags.json, report)
        measured = [comparison.introduction(report), *comparison.tables(report), *comparison.costs(report)]
        sentences = comparison.verdicts(report)
    names = comparison.run_names([log.path for log in logs])
    page = compare_page.build(dict(zip(names, logs)), measured, sentences)
    write_atomically(flags.out, page, elsewhere="give another --out")
    print(f"Page  {flags.out}")


if __name__ == "__main__":
    sys.exit(main())
