"""Shared by all commands: standard streams, one-line errors, overrides such as --config.section.key=value."""
import argparse
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence

from softmask_jax.config import progress, streams

# Faults of the user, the files or the machine; anything else is a bug of this package.
ERRORS = (ValueError, OSError, RuntimeError, ImportError, FloatingPointError)


def command(*, interrupted: str = "Interrupted.", debug: bool = False, out_of_memory: str = "", result: bool = True):
    """Decorate `main(words) -> exit status` as a command; words are the process's by default. An error is one line on
    standard error and exit status 1; Ctrl-C prints `interrupted`, status 130.

    debug: the command has --debug, which shows tracebacks. out_of_memory: advice for a device with too little memory.
    result: unwritable standard output is an error; a closed pipe never is."""

    def decorate(body: Callable[[list[str]], int | None]) -> Callable[[Sequence[str] | None], int]:
        @functools.wraps(body)
        def main(argv: Sequence[str] | None = None) -> int:
            if argv is None:
                _decode_as_utf8()
            streams.secure()
            if argv is None:
                progress.plain_logs()
            words = list(sys.argv[1:] if argv is None else argv)
            try:
                status = body(words) or 0
                if result and not status and (error := streams.lost()):
                    raise OSError(f"Standard output cannot be written ({error.strerror}).")
                return status
            except ERRORS as error:
                if debug and "--debug" in words:
                    traceback.print_exc()
                whole = str(error).strip() or type(error).__name__
                first, *more = whole.splitlines()
                if out_of_memory and "RESOURCE_EXHAUSTED" in first:
                    first = f"The memory of the device is too small ({first:.100}); {out_of_memory}"
                if debug and more:
                    first += " (--debug shows the rest)"
                # Our ValueErrors may be lists; of other errors only the first line helps a user.
                say(f"Error: {whole if isinstance(error, ValueError) and not debug else first}")
                return 1
            except KeyboardInterrupt:
                say(interrupted)
                return 130

        return main

    return decorate


def command_parser(module: str, description: str, **options) -> argparse.ArgumentParser:
    """Parser of `python -m softmask_jax.<module>`, the description (its docstring) printed as it is."""
    return argparse.ArgumentParser(
        prog=f"python -m softmask_jax.{module}", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter, **options,
    )  # fmt: skip


def _decode_as_utf8() -> None:
    """Restart this process in UTF-8 mode under another locale: prompts and file names would be undecodable."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def say(text: str) -> None:
    """Print on standard error: standard output is for results only."""
    print(text, file=sys.stderr, flush=True)


def split_overrides(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Other words, and overrides as `section.key=value`, of a command line; an override is one word or two."""
    words, others, overrides = list(words), [], []
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            others.append(word)
            continue
        if "=" not in word and words and not words[0].startswith("--"):
            word = f"{word}={words.pop(0)}"
        overrides.append(word.removeprefix("--config."))
    return others, overrides
