"""All commands of softmask_jax under one name:

    softmask-jax train --config=stdlib
    python -m softmask_jax generate --prompt='def main('

COMMAND --help has its flags; `python -m softmask_jax.MODULE` is the same command."""
import argparse
import runpy
import sys

from softmask_jax import __version__
from softmask_jax.config.command_line import command

# Module and purpose of every command.
COMMANDS = {
    "demo": ("generate.demo", "plain and soft masks side by side on a page, before anything is trained"),
    "train": ("main", "train or continue a run"),
    "supervise": ("supervise", "the same on one or many hosts, restarted after failures"),
    "generate": ("generate", "write text with a trained model"),
    "evaluate": ("evaluate", "perplexity, generative metrics, code benchmarks"),
    "lm_eval": ("evaluate.lm_eval", "lm-evaluation-harness with a trained model"),
    "compare": ("evaluate.compare", "runs on the same masks, with intervals"),
    "reproduce": ("reproduce", "the claim of soft-masking on small models: runs over seeds, few steps, one page"),
    "report": ("report", "the HTML page of a run"),
    "convert": ("convert", "PyTorch and PEFT weights to ours and back"),
    "tiny": ("convert.tiny", "a tiny random model and conversations, to try everything in seconds"),
    "prepare": ("data.prepare", "tokenize texts once, into shards"),
    "compile": ("compile", "memory and cost on a TPU, before one is rented"),
    "plan": ("compile.plan", "steps, FLOPs and days of a run"),
}


@command(result=False)
def main(argv: list[str]) -> None:
    commands = "\n".join(f"  {name:10s} {purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "softmask-jax", description=__doc__, epilog=f"commands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__, help="print the version and exit")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    parser.add_argument("flags", metavar="FLAGS", nargs=argparse.REMAINDER, help="its flags")
    flags = parser.parse_args(argv or ["--help"])
    sys.argv = [flags.command, *flags.flags]
    runpy.run_module(f"softmask_jax.{COMMANDS[flags.command][0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.exit(main())
