"""Keys of a config: one dataclass field a key, which holds its default, its meaning and the values that it may have."""
import dataclasses
import shutil
import textwrap
from collections.abc import Callable, Collection


@dataclasses.dataclass(frozen=True)
class Bound:
    """Values that a number may have. text: the rule in words, "must be ..."."""

    text: str
    holds: Callable[[float], bool]


POSITIVE = Bound("positive", lambda value: value > 0)
NON_NEGATIVE = Bound("zero or positive", lambda value: value >= 0)
FRACTION = Bound("between 0 and 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Bound("at least 0 and below 1", lambda value: 0 <= value < 1)
INSIDE = Bound("above 0 and below 1", lambda value: 0 < value < 1)
SHARE = Bound("above 0 and at most 1", lambda value: 0 < value <= 1)


def key(default, meaning: str, values: Bound | Collection[str] | None = None):
    """A field of a section.

    Args:
      meaning: for `--help`, with the unit where there is one; the choices are added.
      values: bound of a number, or the choices of a text; None is any value of the field's type.
    """
    choices = [] if values is None or isinstance(values, Bound) else [choice or "''" for choice in values]
    meaning += f": {' | '.join(choices)}" if choices else ""
    return dataclasses.field(default=default, metadata={"help": meaning, "values": values})


def check(name: str, value, values: Bound | Collection[str] | None) -> None:
    """Raise ValueError, in one line, for a value that the key `name` cannot have."""
    if values is None:
        return
    if not isinstance(values, Bound) and value not in values:
        raise ValueError(f"config.{name} is '{value}'; choose one of {', '.join(values)}.")
    if isinstance(values, Bound) and not values.holds(value):
        raise ValueError(f"config.{name} must be {values.text}, not {value}.")


def table(schema: type, width: int | None = None) -> str:
    """Every key of a dataclass of sections with its default and meaning, in three columns, `width` characters wide."""
    sections = {section.name: dataclasses.fields(section.default) for section in dataclasses.fields(schema)}
    rows = [
        (f"{section}.{field.name}", str(field.default) or "''", field.metadata["help"])
        for section, fields in sections.items()
        for field in fields
    ]
    name_width, default_width = (max(len(row[column]) for row in rows) + 2 for column in (0, 1))
    width = max(width or shutil.get_terminal_size().columns, 80) - name_width - default_width - 2
    lines = []
    for name, default, meaning in rows:
        first, *more = textwrap.wrap(meaning, width)
        lines.append(f"  {name:{name_width}}{default:{default_width}}{first}")
        lines += [" " * (2 + name_width + default_width) + line for line in more]
    return "\n".join(lines)
