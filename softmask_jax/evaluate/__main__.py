"""Every number of the paper, for any checkpoints:

    python -m softmask_jax.evaluate --checkpoint=runs/stdlib --tasks=perplexity --out=runs/stdlib/evaluation
    python -m softmask_jax.evaluate --checkpoint=binary=runs/a --checkpoint=soft=runs/b --tasks='perplexity; generative' \\
        --config.generative.scorer=models/gpt2-large --budgets='1; 1/2; 1/4' --out=evaluations/ab
    python -m softmask_jax.evaluate --config=configs/eval_code.py --checkpoint=runs/dream7b --allow_code --out=evaluations/code

Tasks: perplexity (validation and zero-shot), generative (perplexity by another model, entropy, MAUVE of texts written from
masks alone), humaneval, humaneval_plus, mbpp, mbpp_plus (programs). The same command goes on where it was stopped and ends
with the same numbers. --out gets results.json, results.md, and plots if there are several budgets."""
import argparse
import logging
import os
import sys
from collections.abc import Sequence

from softmask_jax.config.command_line import command, command_parser, split_overrides


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and overrides as `section.key=value`."""
    parser = command_parser("evaluate", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", action="append", default=[], metavar="[NAME=]FOLDER[#none]",
        help="a run's folder, or a converted model's; give several to compare them with the first; #none turns "
        "soft-masking off")  # fmt: skip
    add("--tasks", default="", help="such as 'perplexity; generative'")
    add("--config", default="", help="a file in configs/ such as eval_text.py, or file:variant")
    add("--out", required=True, help="the folder of the results; goes on where it stopped, refuses other settings")
    add("--budgets", default="", help="shares of the sampler's steps, such as '1; 1/2; 1/4'")
    add("--allow_code", action="store_true", help="run the programs that a model wrote, each in a sandbox")
    add("--allow_unsafe_code", action="store_true", help="run them even where there can be no sandbox")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--config.SECTION.KEY", metavar="VALUE", dest="_",
        help="override a key; all are in softmask_jax/evaluate/settings.py")  # fmt: skip
    words, overrides = split_overrides(argv)
    flags = parser.parse_args(words)
    flags.out = os.path.expanduser(flags.out)
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
    from softmask_jax.data.sources.listing import required
    from softmask_jax.evaluate import plots, tables, tasks
    from softmask_jax.evaluate.runner import Evaluation
    from softmask_jax.evaluate.settings import Settings

    values: dict = {}
    if flags.config:
        values = config.read(flags.config, overrides, Settings)
    else:
        config.override(values, overrides, "the command line", Settings)
    settings = config.complete(values, Settings)
    evaluation = Evaluation(
        settings, flags.out, tasks.chosen(settings.run.tasks), softmask_jax.load, allow_code=flags.allow_code,
        allow_unsafe_code=flags.allow_unsafe_code,
    )  # fmt: skip
    drawn = settings.run.plots and len(evaluation.budgets) > 1 and any(task.sweeps for task in evaluation.tasks)
    if drawn:
        required("matplotlib", "eval", "--config.run.plots=True")
    report = evaluation()
    print(tables.markdown(report))
    for path in plots.write(report, evaluation.out / "plots") if drawn else []:
        print(f"Plot     {path}")
    print(f"Numbers  {evaluation.out / 'results.json'}\nTables   {evaluation.out / 'results.md'}")


if __name__ == "__main__":
    sys.exit(main())
