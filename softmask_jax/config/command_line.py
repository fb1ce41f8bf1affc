"""What all commands have in common: standard streams, errors as one line, overrides such as --config.section.key=value."""
import argparse
import ast
import functools
import os
import sys
import traceback
from collections.abc import Callable, Container, Iterable, Sequence

from softmask_jax.config import streams

# Whatever the user, the files or the machine can be at fault for; anything else is a fault of this package.
ERRORS = (ValueError, OSError, RuntimeError, ImportError, FloatingPointError)


def command(*, interrupted: str = "Interrupted.", debug: bool = False, out_of_memory: str = "", result: bool = True):
    """Decorate `main(words) -> exit status` as a command, called with words or, without any, with those of the process.

    An error is one line on standard error and exit status 1, Ctrl-C is status 130. See `streams.secure` for the streams.

    Args:
      interrupted: what to print at Ctrl-C.
      debug: whether the command has --debug, which shows tracebacks.
      out_of_memory: what to do when the device's memory is too small.
      result: whether it is an error if standard output cannot be written; a reader that has gone never is.
    """

    def decorate(body: Callable[[list[str]], int | None]) -> Callable[[Sequence[str] | None], int]:
        @functools.wraps(body)
        def main(argv: Sequence[str] | None = None) -> int:
            if argv is None:
                _decode_as_utf8()
            streams.secure()
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
                # Lists of this package are ValueErrors; further lines of others are of use to their developers alone.
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
    """Start this process again in Python's UTF-8 mode where the locale has another encoding and the mode is off.

    Prompts on the command line would be undecodable, and so would files' names, which Orbax refuses at the first save.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def say(text: str) -> None:
    """A line on standard error, at once: standard output has results and nothing else."""
    print(text, file=sys.stderr, flush=True)


def split_overrides(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """(the other words, overrides as `section.key=value`) of a command line; an override may be one word or two."""
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


def apply(values: dict, overrides: Iterable[str], path: str, texts: Container[str] = ()) -> None:
    """Write `section.key=value` into nested `values`, those of the file `path`. Raises ValueError for another form.

    texts: keys whose values are text, though they may look like numbers.
    """
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot):
            raise ValueError(f"'--config.{override}' is not of the form --config.section.key=value.")
        if not isinstance(values.setdefault(section, {}), dict):
            raise ValueError(f"config.{section} in '{path}' is not a section.")
        value = _literal(text)
        values[section][key] = text if name in texts and not isinstance(value, str) else value


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)
