"""Base class of sources of text."""
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Document(NamedTuple):
    """One text of the corpus. `name`: for messages only."""

    name: str
    text: str


class BadRow(NamedTuple):
    """A row without text. `name` and `reason` make a sentence: `a.jsonl:17` `is not valid JSON (...)`."""

    name: str
    reason: str


class Source:
    """Documents in a stable order, in parts that processes can share; picklable, holds no text. Subclasses add `name`,
    `read(part)`, `identity()`, which changes with texts and parts, and `_groups`, one for each part, or `num_parts`."""

    def num_parts(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Document | BadRow]:
        for part in range(self.num_parts()):
            yield from self.read(part)


def spans(sizes: Iterable[int], limit: int) -> tuple[tuple[int, int], ...]:
    """Groups (first, last + 1) of neighbours of at most `limit` in total; a larger one is alone."""
    groups: list[tuple[int, int]] = []
    first = total = 0
    for number, size in enumerate(sizes):
        if number > first and total + size > limit:
            groups.append((first, number))
            first, total = number, 0
        total += size
    return (*groups, (first, number + 1))
