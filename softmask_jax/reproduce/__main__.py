"""The claim of soft-masking, reproduced small: does it help at equal compute, and most where few steps are allowed?

    python -m softmask_jax.reproduce --out=reproduction

It trains masked diffusion models of Python text and of sudoku puzzles, binary and soft-masked, over three seeds and by
other recipes; scores them, in few steps too; and writes index.html, results.json and tables.md into --out. It takes
two to three hours on two CPU cores. Killed at any time, the same command goes on. --smoke does a part of it at toy size in
two minutes; its numbers mean nothing. --gpu takes larger sizes.
"""
import sys

from softmask_jax.config.command_line import command, command_parser, say
from softmask_jax.io.files import explained, locked, write_atomically, write_json
from softmask_jax.io.paths import to_path

ELSEWHERE = "give another --out"


@command(interrupted="Interrupted. The same command continues.")
def main(argv: list[str]) -> None:
    parser = command_parser("reproduce", __doc__)
    parser.add_argument("--out", required=True, help="the study's folder: runs, results, pages")
    sizes = parser.add_mutually_exclusive_group()
    for name, text in (("smoke", "toy sizes and few recipes, two minutes"), ("gpu", "larger sizes, for one GPU")):
        sizes.add_argument(f"--{name}", dest="sizes", action="store_const", const=name, default="default", help=text)
    flags = parser.parse_args(argv)

    # Imports JAX.
    from softmask_jax.reproduce import page, study, summary, tables, work
    from softmask_jax.reproduce.jobs import Results, complete

    out, chosen = to_path(flags.out), study.SIZES[flags.sizes]
    with explained(out, ELSEWHERE):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out, ELSEWHERE):
        study.check_sizes(out, chosen, ELSEWHERE)
        results = Results(out / "results")
        complete(work.jobs(chosen, out, results), results)
        report = tables.report(chosen, study.runs(chosen, out), results)
        write_json(out / "results.json", report)
        write_atomically(out / "index.html", page.build(report))
        write_atomically(out / "tables.md", "\n\n".join(summary.tables(report).values()) + "\n")
    for sentence in report["verdicts"]:
        print(sentence)
    say(f"Page  {out / 'index.html'}")


if __name__ == "__main__":
    sys.exit(main())
