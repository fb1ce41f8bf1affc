"""lm-evaluation-harness with a model of ours:

    python -m softmask_jax.evaluate.lm_eval --model_args checkpoint=runs/dream7b,temperature=0.1,top_p=0.9 \\
        --tasks gsm8k --apply_chat_template --num_fewshot 0 --output_path evaluations/gsm8k
    python -m softmask_jax.evaluate.lm_eval --model_args checkpoint=runs/stdlib,mc_num=64 --tasks wikitext,arc_easy

The harness's own command line follows, whatever it can do; --model softmask_jax goes without saying. A second run adds
files to --output_path, and with --use_cache goes on where it stopped. --debug shows the traceback of an error.
"""
import sys
from collections.abc import Sequence

from softmask_jax.config.command_line import command

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


@command(interrupted="Interrupted. With --use_cache the same command goes on from there.", debug=True,
         out_of_memory="give a smaller --batch_size")
def main(argv: list[str]) -> None:
    """Exit status: 0 done; 1 something failed; 130 interrupted. A wrong command line exits with 2."""
    words = [word for word in argv if word != "--debug"]
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ImportError(f"the harness cannot be imported ({error}): pip install 'softmask_jax[eval]'") from error
    # Registers the model.
    from softmask_jax.evaluate.lm_eval import arguments, model  # noqa: F401

    if not words or {"-h", "--help"} & set(words):
        print(f"{__doc__}\n{arguments.parser().format_help()}")
        words = words or ["--help"]
    before = sys.argv
    try:
        sys.argv = ["lm-eval", *completed(words)]
        cli_evaluate()
    finally:
        sys.argv = before


if __name__ == "__main__":
    sys.exit(main())
