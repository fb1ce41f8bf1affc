"""Command-line flags for the fields of a frozen dataclass: a new field is a new flag."""
import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping


def add(parser, fields_of: type, *, helps: Mapping[str, str], readers: Mapping[str, Callable] = {}) -> None:
    """Add a flag for each field to a parser or group; fields not on the command line are absent from the parsed flags.

    helps: help by field (default: the field's name); "" gives no flag. readers: converters by field, else the type's.
    """
    hints = typing.get_type_hints(fields_of)
    for field in dataclasses.fields(fields_of):
        about = helps.get(field.name, field.metadata.get("help", field.name.replace("_", " ")))
        if not about:
            continue
        optional, kind = _kind(hints[field.name])
        if field.name in readers:
            reader, metavar = readers[field.name], "VALUE"
        else:
            reader, metavar = _READERS[kind], "TRUE|FALSE" if kind is bool else kind.__name__.upper()
            reader = _or_none(reader) if optional else reader
        default = "" if field.default in (None, dataclasses.MISSING) else f" (default: {field.default})"
        parser.add_argument(
            f"--{field.name}", type=reader, default=argparse.SUPPRESS, metavar=metavar,
            help=(about + default).replace("%", "%%"), **({"nargs": "?", "const": True} if kind is bool else {}),
        )  # fmt: skip


def present(flags: argparse.Namespace, fields_of: type) -> dict:
    """Fields whose flags are on the command line."""
    return {field.name: getattr(flags, field.name) for field in dataclasses.fields(fields_of) if field.name in flags}


def _kind(hint) -> tuple[bool, type]:
    """(whether None is a value, the first type of the hint)."""
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
