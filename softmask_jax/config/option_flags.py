"""Flags on the command line for the fields of a frozen dataclass: a new field is a new flag."""
import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping


def add(parser, fields_of: type, *, helps: Mapping[str, str], readers: Mapping[str, Callable] = {}) -> None:
    """Give a parser (or a group of it) a flag for each field, absent from what is parsed unless it is given.

    Args:
      helps: a text for each field; one without is known by its name. Fields whose text is "" get no flag.
      readers: what makes a value of a flag's text where the field's type does not tell.
    """
    hints = typing.get_type_hints(fields_of)
    for field in dataclasses.fields(fields_of):
        about = helps.get(field.name, field.metadata.get("help", field.name.replace("_", " ")))
        if not about:
            continue
        optional, kind = _kind(hints[field.name])
        reader = readers.get(field.name) or _READERS[kind]
        default = "" if field.default in (None, dataclasses.MISSING) else f" (default: {field.default})"
        extra = {"nargs": "?", "const": True} if kind is bool else {}
        reader = _or_none(reader) if optional and field.name not in readers else reader
        metavar = "TRUE|FALSE" if kind is bool else "VALUE" if field.name in readers else kind.__name__.upper()
        parser.add_argument(
            f"--{field.name}", type=reader, default=argparse.SUPPRESS, metavar=metavar,
            help=(about + default).replace("%", "%%"), **extra,
        )  # fmt: skip


def given(flags: argparse.Namespace, fields_of: type) -> dict:
    """The fields that were given on the command line."""
    names = [field.name for field in dataclasses.fields(fields_of)]
    return {name: getattr(flags, name) for name in names if hasattr(flags, name)}


def _kind(hint) -> tuple[bool, type]:
    """(whether None is a value, the first type that the hint names)."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [member for member in members if member is not type(None)]
    return len(kinds) < len(members), typing.get_origin(kinds[0]) or kinds[0]


def _or_none(reader: Callable) -> Callable:
    def read(text: str):
        return None if text.lower() == "none" else reader(text)

    read.__name__ = getattr(reader, "__name__", "value")
    return read


def _boolean(text: str) -> bool:
    try:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


_integers.__name__ = "list of integers"
_READERS = {bool: _boolean, int: int, float: float, str: str, tuple: _integers}
