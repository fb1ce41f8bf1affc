"""Overrides of a config on the command line: --config.section.key=value."""
import ast
from collections.abc import Container, Iterable


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
