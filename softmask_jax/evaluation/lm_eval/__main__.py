"""lm-evaluation-harness with a model of ours:

    python -m softmask_jax.evaluation.lm_eval --model_args checkpoint=runs/dream7b,temperature=0.1,top_p=0.9 \\
        --tasks gsm8k --apply_chat_template --num_fewshot 0 --output_path evaluations/gsm8k
    python -m softmask_jax.evaluation.lm_eval --model_args checkpoint=runs/stdlib,mc_num=64 --tasks wikitext,arc_easy

The harness's own command line follows, whatever it can do; --model softmask_jax goes without saying. --debug shows the
traceback of an error.
"""
import sys
import traceback
from collections.abc import Sequence

ERRORS = (ValueError, OSError, RuntimeError, ImportError, FloatingPointError)
COMMANDS = ("run", "ls", "validate")
MODEL_FLAGS, BATCH_FLAGS = ("--model", "-M"), ("--batch_size", "-b")


def completed(words: Sequence[str]) -> list[str]:
    """The harness's command line: `run` unless it says another command, our model unless it names one."""
    words = list(words)
    if not words or words[0] not in COMMANDS:
        words.insert(0, "run")
    if words[0] != "run":
        return words
    given = {word.partition("=")[0] for word in words}
    if not given & set(MODEL_FLAGS):
        words[1:1] = ["--model", "softmask_jax"]
    # The harness's own default is a single row; a file may say otherwise.
    if not given & {*BATCH_FLAGS, "--config", "-C"}:
        words[1:1] = ["--batch_size", "auto"]
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done; 1 something failed; 130 interrupted. A wrong command line exits with 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    before = sys.argv
    try:
        try:
            from lm_eval.__main__ import cli_evaluate
        except ImportError as error:
            raise ImportError(f"the harness cannot be imported ({error}): pip install 'softmask_jax[eval]'") from error
        # Registers the model.
        from softmask_jax.evaluation.lm_eval import arguments, model  # noqa: F401

        if not words or {"-h", "--help"} & set(words):
            print(f"{__doc__}\n{arguments.parser().format_help()}")
            words = words or ["--help"]
        sys.argv = ["lm-eval", *completed(words)]
        cli_evaluate()
        return 0
    except ERRORS as error:
        if debug:
            traceback.print_exc()
        first, *more = str(error).strip().splitlines() or [type(error).__name__]
        if "RESOURCE_EXHAUSTED" in first:
            first = f"The memory of the device is too small ({first:.100}); give a smaller --batch_size"
        print(f"Error: {first}{' (--debug shows the rest)' if more else ''}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. With --use_cache the same command goes on from there.", file=sys.stderr, flush=True)
        return 130
    finally:
        sys.argv = before


if __name__ == "__main__":
    sys.exit(main())
