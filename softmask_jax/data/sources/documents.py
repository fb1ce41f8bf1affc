"""What a source of text is: documents in a stable order, cut into parts that processes can share."""
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol


class Document(NamedTuple):
    """One text of the corpus. `name` is for messages only: identity is the text."""

    name: str
    text: str


class BadRow(NamedTuple):
    """A row that holds no text. `name` and `reason` make a sentence: `a.jsonl:17` `is not valid JSON (...)`."""

    name: str
    reason: str


class Source(Protocol):
    """A re-iterable sequence of documents in a stable order. Sources can be pickled and keep no text in memory.

    `name` is short, for messages. `read(part)`, 0 <= part < `num_parts()`, yields the same items in the same order each
    time, and the parts joined are the whole. `identity()` differs when what is read, or how it is cut, may differ.
    """

    name: str

    def identity(self) -> str: ...

    def num_parts(self) -> int: ...

    def read(self, part: int) -> Iterator[Document | BadRow]: ...

    def __iter__(self) -> Iterator[Document | BadRow]: ...


class AllParts:
    """Iteration for sources that read by the part."""

    def __iter__(self) -> Iterator[Document | BadRow]:
        for part in range(self.num_parts()):
            yield from self.read(part)


def spans(sizes: Iterable[int], limit: int) -> tuple[tuple[int, int], ...]:
    """Neighbours joined into (first, last + 1) groups whose sizes add up to `limit` at most; a larger one is alone."""
    groups: list[tuple[int, int]] = []
    first = total = 0
    for number, size in enumerate(sizes):
        if number > first and total + size > limit:
            groups.append((first, number))
            first, total = number, 0
        total += size
    return (*groups, (first, number + 1))
