"""Train, or continue, a run:

    python -m softmask_jax.main --config=configs/stdlib.py

The run is in runs/<config>[-<variant>] unless --workdir names another folder.
Any key of the config, listed below, can be overridden: --config.train.steps=200 --config.soft_mask.k=1
"""
import argparse
import logging
import sys
import time

from softmask_jax.config import Config, keys, load
from softmask_jax.config.command_line import ERRORS, command, command_parser, split_overrides
from softmask_jax.distributed import hosts
from softmask_jax.io import goodput, metrics
from softmask_jax.io.files import check_folder
from softmask_jax.io.paths import to_path
from softmask_jax.io.runs import default_folder


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and the overrides as `section.key=value`, each of one word or two."""
    parser = command_parser(
        "main", __doc__, allow_abbrev=False,
        epilog=f"keys of the config (SECTION.KEY), their defaults and meanings:\n\n{keys.table(Config)}",
    )  # fmt: skip
    parser.add_argument("--config", required=True, help="a name such as stdlib or dream7b:int8, or a file")
    parser.add_argument("--workdir", help="the run's folder: checkpoints, metrics, samples; goes on where it stopped")
    parser.add_argument("--fetch", action="store_true", help="download and convert a base that is not there ([hub])")
    parser.add_argument(
        "--profile", metavar="A:B", nargs="?", type=step_range, const=True, default=False,
        help="record a trace of steps A to B - 1 in <workdir>/profile; without A:B of a few",
    )  # fmt: skip
    parser.add_argument("--profiler_port", metavar="N", type=port, help="let XProf take traces through this port")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    hosts.add_flags(parser)
    parser.add_argument("--config.SECTION.KEY", metavar="VALUE", dest="_", help="override a key of the list below")
    words, overrides = split_overrides(argv)
    flags = parser.parse_args(words)
    try:
        flags.workdir = default_folder(flags.config) if flags.workdir is None else str(to_path(flags.workdir))
        check_folder(flags.workdir, "--workdir=")
    except ValueError as error:
        parser.error(str(error))
    return flags, overrides


def step_range(text: str) -> range:
    """Steps of "A:B", of which the run has at least one."""
    start, _, stop = text.partition(":")
    if start.isdecimal() and stop.isdecimal() and 1 <= int(start) < int(stop):
        return range(int(start), int(stop))
    raise argparse.ArgumentTypeError(f"'{text}' is not A:B with 1 <= A < B; it is steps A to B - 1")


def port(text: str) -> int:
    """Number of a port."""
    if text.isdecimal() and 1 <= int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"'{text}' is not from 1 to 65535")


PASSES = {"one_pass": "one pass", "two_pass": "two passes, soft-masked"}


def report(summary: dict, workdir: str) -> str:
    """Summary of a finished run for the terminal: perplexity or loss, samples, paths."""
    from softmask_jax.report.scored import taken_on
    from softmask_jax.training.intervals import bracketed

    folder, scores, step = to_path(workdir), summary["validation"], summary["step"]

    def interval(name: str, form: str = ".4f") -> str:
        return bracketed(scores.get(f"{name}low"), scores.get(f"{name}high"), form)

    what = "loss" if "loss" in scores else "perplexity per token"
    bound = "" if "loss" in scores else "upper bound; "
    lines = [f"Validation {what} after {step} steps ({bound}95 % interval)"]
    if basis := taken_on(scores):
        lines[0] += f"\n  taken on {basis}, each masked once"
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
    spent = [f"\nGoodput: {account.line()}"] if (account := goodput.read(folder)) else []
    curves = f"{folder / 'tensorboard'}   (pip install tensorboard; tensorboard --logdir {folder})"
    files = [("Checkpoints", folder / "checkpoints"), ("Log", folder / metrics.name(folder)), ("Curves", curves)]
    optional = ("Report", folder / "report.html"), ("Trace", folder / "profile")
    files += [(label, path) for label, path in optional if path.exists()]
    return "\n".join([*lines, *spent, "", *(f"{label:12s} {path}" for label, path in files)])


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
            load(flags.config, overrides), flags.workdir, profile=flags.profile, profiler_port=flags.profiler_port,
            fetch=flags.fetch, member=hosts.from_flags(flags), begun_at=begun_at,
        )  # fmt: skip
    except (*ERRORS, KeyboardInterrupt) as error:
        hosts.leave_soon(130 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    if summary["finished"] and jax.process_index() == 0:
        print(report(summary, flags.workdir))


if __name__ == "__main__":
    sys.exit(main())
