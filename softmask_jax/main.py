"""Train, or continue, a run:

    python -m softmask_jax.main --config=configs/stdlib.py --workdir=runs/stdlib

Any key of the config, listed below, can be overridden: --config.train.steps=200 --config.soft_mask.k=1
"""
import argparse
import logging
import os
import sys
import time
from pathlib import Path

from softmask_jax.config import Config, keys, load
from softmask_jax.config.command_line import ERRORS, command, command_parser, split_overrides
from softmask_jax.distributed import hosts
from softmask_jax.io.files import check_folder


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and the overrides as `section.key=value`, each of one word or two."""
    parser = command_parser(
        "main", __doc__, allow_abbrev=False,
        epilog=f"keys of the config (SECTION.KEY), their defaults and meanings:\n\n{keys.table(Config)}",
    )  # fmt: skip
    parser.add_argument("--config", required=True, help="a file in configs/, or file:variant")
    parser.add_argument(
        "--workdir", required=True, help="the run's folder: checkpoints, metrics, samples; goes on where it stopped"
    )
    parser.add_argument("--profile", action="store_true", help="record a trace of a few steps in <workdir>/profile")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    hosts.add_flags(parser)
    parser.add_argument("--config.SECTION.KEY", metavar="VALUE", dest="_", help="override a key of the list below")
    words, overrides = split_overrides(argv)
    flags = parser.parse_args(words)
    if "://" in flags.workdir:
        parser.error(f"--workdir={flags.workdir}: a run's folder must be on a mounted file system for now")
    flags.workdir = os.path.expanduser(flags.workdir)
    try:
        check_folder(flags.workdir, "--workdir=")
    except ValueError as error:
        parser.error(str(error))
    return flags, overrides


PASSES = {"one_pass": "one pass", "two_pass": "two passes, soft-masked"}


def report(summary: dict, workdir: str) -> str:
    """Summary of a finished run for the terminal: perplexity or loss, samples, paths."""
    from softmask_jax.training.intervals import bracketed

    folder, scores, step = Path(workdir), summary["validation"], summary["step"]

    def interval(name: str, form: str = ".4f") -> str:
        return bracketed(scores.get(f"{name}low"), scores.get(f"{name}high"), form)

    what = "loss" if "loss" in scores else "perplexity per token"
    bound = "" if "loss" in scores else "upper bound; "
    lines = [f"Validation {what} after {step} steps ({bound}95 % interval)"]
    for prefix, label in {"": "by the recipe", **{f"{name}/": label for name, label in PASSES.items()}}.items():
        if f"{prefix}loss" in scores:
            lines.append(f"  {label:24s} {scores[f'{prefix}loss']:9.4f}  {interval(f'{prefix}loss_')}")
    for name, label in PASSES.items():
        if f"{name}/perplexity" in scores:
            nelbo = f"NELBO {scores[f'{name}/nelbo']:.4f}{interval(f'{name}/nelbo_')} nats"
            lines.append(f"  {label:24s} {scores[f'{name}/perplexity']:9.3f}   {nelbo}")
    if "gain/nelbo" in scores:
        gain = f"{scores['gain/nelbo']:+.4f}{interval('gain/', '+.4f')} nats"
        lines.append(f"  gain of the second pass on the same masks: {gain}")
    for i, text in enumerate(summary["samples"]):
        lines += [f"\nSample {i + 1}", "  | " + text.replace("\n", "\n  | ")]
    curves = f"{folder / 'tensorboard'}   (pip install tensorboard; tensorboard --logdir {folder})"
    files = [("Checkpoints", folder / "checkpoints"), ("Log", folder / "metrics.jsonl"), ("Curves", curves)]
    optional = ("Report", folder / "report.html"), ("Trace", folder / "profile")
    files += [(label, path) for label, path in optional if path.exists()]
    return "\n".join([*lines, "", *(f"{label:12s} {path}" for label, path in files)])


@command(interrupted="Interrupted. The same command continues from the last checkpoint.", debug=True, result=False)
def main(argv: list[str]) -> None:
    """Exit status: 0 done, or stopped and saved; 1 failed; 2 a wrong command line; 130 interrupted elsewhere."""
    begun_at = time.perf_counter()
    flags, overrides = parse(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("softmask_jax").setLevel(logging.INFO)
    try:
        import jax

        from softmask_jax.training import loop

        summary = loop.train(
            load(flags.config, overrides), flags.workdir, profile=flags.profile, member=hosts.from_flags(flags),
            begun_at=begun_at,
        )  # fmt: skip
    except (*ERRORS, KeyboardInterrupt) as error:
        hosts.leave_soon(130 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    if summary["finished"] and jax.process_index() == 0:
        print(report(summary, flags.workdir))


if __name__ == "__main__":
    sys.exit(main())
