"""Every number of the paper, for any checkpoints:

    python -m softmask_jax.evaluate --checkpoint=runs/stdlib --tasks=perplexity --out=runs/stdlib/evaluation
    python -m softmask_jax.evaluate --checkpoint=binary=runs/a --checkpoint=soft=runs/b --tasks='perplexity; generative' \\
        --config.generative.scorer=models/gpt2-large --budgets='1; 1/2; 1/4' --out=evaluations/ab
    python -m softmask_jax.evaluate --config=configs/eval_code.py --checkpoint=runs/dream7b --allow_code --out=evaluations/code

Tasks: perplexity (validation and zero-shot), generative (perplexity by another model, entropy, MAUVE of texts written from
masks alone), humaneval, humaneval_plus, mbpp, mbpp_plus (programs). The same command goes on where it was stopped and ends
with the same numbers; on several hosts it shares the windows, texts and problems. --out gets results.json, results.md
and results.html, a page with curves of quality against cost if there are several budgets."""
import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence

from softmask_jax.config.command_line import command, command_parser, split_overrides
from softmask_jax.distributed import hosts, team
from softmask_jax.io.paths import to_path


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and overrides as `section.key=value`."""
    parser = command_parser("evaluate", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", action="append", default=[], metavar="[NAME=]FOLDER[#none]",
        help="a run's folder, a converted model's or, with --config.models.base, an adapter's; by default the only run "
        "in runs/; give several to compare them with the first; #none turns soft-masking off")  # fmt: skip
    add("--tasks", default="", help="such as 'perplexity; generative'")
    add("--config", default="", help="a name such as eval_text, or a file")
    add("--out", required=True, help="the folder of the results; goes on where it stopped, refuses other settings")
    add("--budgets", default="", help="shares of the sampler's steps, such as '1; 1/2; 1/4'")
    add("--allow_code", action="store_true", help="run the programs that a model wrote, each in a sandbox")
    add("--allow_unsafe_code", action="store_true", help="run them even where there can be no sandbox")
    add("--debug", action="store_true", help="show the traceback of an error")
    hosts.add_flags(parser)
    add("--config.SECTION.KEY", metavar="VALUE", dest="_",
        help="override a key; all are in softmask_jax/evaluate/settings.py")  # fmt: skip
    words, overrides = split_overrides(argv)
    flags = parser.parse_args(words)
    flags.out = str(to_path(flags.out))
    if flags.allow_unsafe_code and not flags.allow_code:
        parser.error("--allow_unsafe_code is an addition to --allow_code")
    short = {"models.checkpoints": ";".join(flags.checkpoint), "run.tasks": flags.tasks, "run.budgets": flags.budgets}
    return flags, overrides + [f"{key}={value}" for key, value in short.items() if value]


@command(interrupted="Stopped. The same command goes on from there.", debug=True)
def main(argv: list[str]) -> None:
    """Exit status: 0 all numbers are there; 1 failed; 2 the command line is wrong; 130 stopped before the end."""
    flags, overrides = parse(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("softmask_jax").setLevel(logging.INFO)

    import softmask_jax
    from softmask_jax import config
    from softmask_jax.evaluate import results_page, tables, tasks
    from softmask_jax.evaluate.runner import Evaluation
    from softmask_jax.evaluate.settings import Settings
    from softmask_jax.io.runs import only_run

    values: dict = {}
    if flags.config:
        values = config.read(flags.config, overrides, Settings)
    else:
        config.override(values, overrides, "the command line", Settings)
    if not config.flatten(values).get("models.checkpoints"):
        config.override(values, [f"models.checkpoints={only_run('--checkpoint={}')}"], flags.config, Settings)
    settings = config.complete(values, Settings)
    allowed = {name: getattr(flags, name) for name in ("allow_code", "allow_unsafe_code")}
    with team.joined(hosts.from_flags(flags), dataclasses.asdict(settings) | allowed, f"{flags.out}/.hosts") as others:
        evaluation = Evaluation(
            settings, flags.out, tasks.chosen(settings.run.tasks), softmask_jax.load, hosts=others, **allowed
        )  # fmt: skip
        report = evaluation()
    if not others.first:
        return
    print(tables.markdown(report))
    files = {"Numbers": "results.json", "Tables": "results.md", "Page": results_page.FILE}
    print("\n".join(f"{label:8s} {evaluation.out / name}" for label, name in files.items()))


if __name__ == "__main__":
    sys.exit(main())
