"""Self-contained HTML report of one training run: figures, curves, samples, settings; it needs no network.

    python -m softmask_jax.report runs/stdlib [--out page.html]

Training writes the report at its end; this command writes it for any run, finished or not."""
import sys

from softmask_jax.config.command_line import command, command_parser
from softmask_jax.io.runs import only_run
from softmask_jax.report.run_page import FILE, write


@command()
def main(argv: list[str]) -> None:
    """Exit status: 0 done, 1 no run or no page written, 2 usage error."""
    parser = command_parser("report", __doc__)
    parser.add_argument("run", nargs="?", help="the folder of a run (its --workdir); by default the only run in runs/")
    parser.add_argument("--out", default="", help=f"the page; replaces the file, <run>/{FILE} by default")
    flags = parser.parse_args(argv)
    run = only_run("python -m softmask_jax.report {}") if flags.run is None else flags.run
    print(f"Report  {write(run, flags.out)}")


if __name__ == "__main__":
    sys.exit(main())
