"""lm-evaluation-harness with a model of ours:

    python -m softmask_jax.evaluate.lm_eval --model_args checkpoint=runs/dream7b,temperature=0.1,top_p=0.9 \\
        --tasks gsm8k --apply_chat_template --num_fewshot 0 --output_path evaluations/gsm8k
    python -m softmask_jax.evaluate.lm_eval --model_args checkpoint=runs/stdlib,mc_num=64 --tasks wikitext,arc_easy

The harness's own command line follows, whatever it can do; --model softmask_jax goes without saying. A second run adds
files to --output_path, and with --use_cache goes on where it stopped. The same command on several hosts shares the
requests: answers are in OUTPUT_PATH.hosts, from which it goes on. --debug shows the traceback of an error.
"""
import argparse
import os
import sys
from collections.abc import Callable, Sequence

from softmask_jax.config.command_line import command
from softmask_jax.distributed import hosts, team
from softmask_jax.distributed.hosts import Member
from softmask_jax.io.paths import to_path

COMMANDS = ("run", "ls", "validate")
# Defaults, and the flags that replace them.
DEFAULTS = (
    (["--model", "softmask_jax"], {"--model", "-M"}),
    # The harness's own default is 1; a config file may set another.
    (["--batch_size", "auto"], {"--batch_size", "-b", "--config", "-C"}),
)  # fmt: skip


def completed(words: Sequence[str]) -> list[str]:
    """The harness's command line, with the command `run`, our model and its batch size by default."""
    words = list(words)
    if not words or words[0] not in COMMANDS:
        words.insert(0, "run")
    flags = {word.partition("=")[0] for word in words}
    for default, instead in DEFAULTS:
        if words[0] == "run" and not flags & instead:
            words[1:1] = default
    return words


def shared(words: Sequence[str]) -> tuple[Member, str, list[str]]:
    """This process among the hosts, the folder that they share, and the words for the harness. ValueError for a command
    that several hosts cannot share."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    hosts.add_flags(parser)
    flags, rest = parser.parse_known_args(words)
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--output_path", "-o", default="")
    own.add_argument("--use_cache", "-c")
    own, _ = own.parse_known_args(rest)
    if {"-h", "--help"} & set(words) or not words or words[0] in COMMANDS[1:]:
        return Member(), "", rest
    member = hosts.from_flags(flags)
    if member.processes > 1 and (own.use_cache or not own.output_path):
        raise ValueError("Several hosts need --output_path=FOLDER, which all of them share, and no --use_cache: answers are "
                         "kept beside it.")
    return member, f"{own.output_path.rstrip('/')}.hosts", rest


def call(harness: Callable[[], None], words: Sequence[str]) -> None:
    """The harness's command with these words."""
    before = sys.argv
    try:
        sys.argv = ["lm-eval", *completed(words)]
        harness()
    finally:
        sys.argv = before


@command(interrupted="Interrupted. With --use_cache the same command goes on from there.", debug=True,
         out_of_memory="give a smaller --batch_size")
def main(argv: list[str]) -> None:
    """Exit status: 0 done; 1 something failed; 130 interrupted. A wrong command line exits with 2."""
    member, folder, words = shared([word for word in argv if word != "--debug"])
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ImportError(f"the harness cannot be imported ({error}): pip install 'softmask_jax[eval]'") from error
    if not words or {"-h", "--help"} & set(words):
        from softmask_jax.evaluate.lm_eval import arguments

        print(f"{__doc__}\n{arguments.parser().format_help()}")
        call(cli_evaluate, words or ["--help"])
        return
    # Registers the model, and imports JAX.
    from softmask_jax.evaluate.lm_eval import model

    with team.joined(member, {"command": " ".join(words)}, folder) as model.SoftmaskLM.hosts:
        model.SoftmaskLM.folder = to_path(folder)
        if member.process:
            os.environ["LOCAL_RANK"] = str(member.process)  # the harness's own sign that another process writes results
        call(cli_evaluate, words)


if __name__ == "__main__":
    sys.exit(main())
