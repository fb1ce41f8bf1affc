"""Keys of a config: dataclass fields with default, meaning and allowed values."""
import dataclasses
import shutil
import textwrap
from collections.abc import Callable, Collection


@dataclasses.dataclass(frozen=True)
class Bound:
    """Allowed values of a number."""

    text: str  # the rule in words, "must be ..."
    holds: Callable[[float], bool]


POSITIVE = Bound("positive", lambda value: value > 0)
NON_NEGATIVE = Bound("zero or positive", lambda value: value >= 0)
FRACTION = Bound("between 0 and 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Bound("at least 0 and below 1", lambda value: 0 <= value < 1)
INSIDE = Bound("above 0 and below 1", lambda value: 0 < value < 1)
SHARE = Bound("above 0 and at most 1", lambda value: 0 < value <= 1)


def key(default, meaning: str, values: Bound | Collection[str] | None = None):
    """A field of a section. meaning: for `--help`, with the unit; choices are added. values: bound of a number, or
    choices of a text; None allows any value of the type."""
    if values and not isinstance(values, Bound):
        meaning += f": {' | '.join(choice or repr('') for choice in values)}"
    return dataclasses.field(default=default, metadata={"help": meaning, "values": values})


def check(name: str, value, values: Bound | Collection[str] | None) -> None:
    """Raise ValueError, in one line, for a value that the key `name` cannot have."""
    if isinstance(values, Bound):
        if not values.holds(value):
            raise ValueError(f"config.{name} must be {values.text}, not {value}.")
    elif values is not None and value not in values:
        raise ValueError(f"config.{name} is '{value}'; choose one of {', '.join(values)}.")


def table(schema: type, width: int | None = None) -> str:
    """Three columns of at most `width` characters: keys of a dataclass of sections, defaults, meanings."""
    rows = [
        (f"{section.name}.{field.name}", str(field.default) or "''", field.metadata["help"])
        for section in dataclasses.fields(schema)
        for field in dataclasses.fields(section.default)
    ]
    name_width, default_width = (max(len(row[column]) for row in rows) + 2 for column in (0, 1))
    width = max(width or shutil.get_terminal_size().columns, 80)
    lines = []
    for name, default, meaning in rows:
        start = f"  {name:{name_width}}{default:{default_width}}"
        lines.append(textwrap.fill(meaning, width, initial_indent=start, subsequent_indent=" " * len(start)))
    return "\n".join(lines)
