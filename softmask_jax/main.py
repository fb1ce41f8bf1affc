"""Train, or continue, a run:

    python -m softmask_jax.main --config=configs/stdlib.py --workdir=runs/stdlib

Any key of the config can be overridden: --config.train.steps=200 --config.soft_mask.k=1
"""
import argparse
import logging
import os
import sys
from pathlib import Path

from softmask_jax.config.command_line import ERRORS, command, split_overrides
from softmask_jax.distributed import hosts
from softmask_jax.io.files import check_folder


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and as `section.key=value` the overrides among them, given as one word or two."""
    parser = argparse.ArgumentParser(
        prog="python -m softmask_jax.main", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", required=True, help="a file in configs/, or file:variant")
    parser.add_argument(
        "--workdir", required=True, help="the run's folder: checkpoints, metrics, samples; goes on where it stopped"
    )
    parser.add_argument("--profile", action="store_true", help="record a trace of a few steps in <workdir>/profile")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    hosts.add_flags(parser)
    parser.add_argument(
        "--config.SECTION.KEY", metavar="VALUE", dest="_",
        help="override a key; all are in softmask_jax/config/sections.py",
    )
    words, overrides = split_overrides(argv)
    found = parser.parse_args(words)
    if "://" in found.workdir:
        parser.error(f"--workdir={found.workdir}: a run's folder must be on a mounted file system for now")
    found.workdir = os.path.expanduser(found.workdir)
    try:
        check_folder(found.workdir, "--workdir=")
    except ValueError as error:
        parser.error(str(error))
    return found, overrides


def report(summary: dict, workdir: str) -> str:
    """What a finished run prints: perplexity, samples, and where everything is."""
    from softmask_jax.training.intervals import bracketed

    folder, scores = Path(workdir), summary["validation"]
    loss = "loss" in scores
    what = "loss" if loss else "perplexity per token"
    lines = [f"Validation {what} after {summary['step']} steps ({'' if loss else 'upper bound; '}95 % interval)"]
    for name, what in (("", "by the recipe"), ("one_pass/", "one pass"), ("two_pass/", "two passes, soft-masked")):
        if f"{name}loss" in scores:
            value, low, high = (scores.get(f"{name}{key}") for key in ("loss", "loss_low", "loss_high"))
            lines.append(f"  {what:24s} {value:9.4f}  {bracketed(low, high)}")
    for name, what in (("one_pass", "one pass"), ("two_pass", "two passes, soft-masked")):
        if f"{name}/perplexity" in scores:
            nelbo, low, high = (scores.get(f"{name}/{key}") for key in ("nelbo", "nelbo_low", "nelbo_high"))
            perplexity = f"{scores[f'{name}/perplexity']:9.3f}"
            lines.append(f"  {what:24s} {perplexity}   NELBO {nelbo:.4f}{bracketed(low, high)} nats")
    if "gain/nelbo" in scores:
        lines.append(
            f"  gain of the second pass on the same masks: {scores['gain/nelbo']:+.4f}"
            f"{bracketed(scores.get('gain/low'), scores.get('gain/high'), '+.4f')} nats"
        )
    for i, text in enumerate(summary["samples"]):
        lines += [f"\nSample {i + 1}", "  | " + text.replace("\n", "\n  | ")]
    lines += [
        "",
        f"Checkpoints  {folder / 'checkpoints'}",
        f"Log          {folder / 'metrics.jsonl'}",
        f"Curves       {folder / 'tensorboard'}   (pip install tensorboard; tensorboard --logdir {folder})",
    ]
    if (folder / "report.html").exists():
        lines.append(f"Report       {folder / 'report.html'}")
    if (folder / "profile").exists():
        lines.append(f"Trace        {folder / 'profile'}")
    return "\n".join(lines)


@command(interrupted="Interrupted. The same command continues from the last checkpoint.", debug=True, result=False)
def main(argv: list[str]) -> None:
    """Exit status: 0 done, or stopped and saved; 1 failed; 2 the command line is wrong; 130 interrupted elsewhere."""
    flags, overrides = parse(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("softmask_jax").setLevel(logging.INFO)
    try:
        import jax

        from softmask_jax import config
        from softmask_jax.training import loop

        settings, place = config.load(flags.config, overrides), hosts.from_flags(flags)
        summary = loop.train(settings, flags.workdir, profile=flags.profile, place=place)
    except (*ERRORS, KeyboardInterrupt) as error:
        hosts.leave_soon(130 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    if summary["finished"] and jax.process_index() == 0:
        print(report(summary, flags.workdir))


if __name__ == "__main__":
    sys.exit(main())
