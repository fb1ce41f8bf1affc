"""Resumable work: pieces of numbered rows, each appended to a file of rows as it is made.

A piece that a kill left in part is made again as a whole, so that no number rounds otherwise; rows that are there stay.
"""
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from softmask_jax.evaluate.task import Work
from softmask_jax.io.answers import AnswerFile, Key, key_of


class Piece(NamedTuple):
    """A batch: rows number `index` [n] under draw `draw`; size: bucket of its lengths, where they differ."""

    index: np.ndarray
    draw: int = 0
    size: int = 0

    @property
    def keys(self) -> list[Key]:
        return [(int(number), self.draw) for number in self.index]

    def filled(self, rows: int) -> np.ndarray:
        """`index` repeated cyclically to a full batch [rows]."""
        return self.index[np.arange(rows) % len(self.index)]


def pieces(numbers: np.ndarray, draws: int, batch_size: int, size: int = 0) -> Iterator[Piece]:
    """All rows `numbers` [W] under each draw."""
    for draw in range(draws):
        for start in range(0, len(numbers), batch_size):
            yield Piece(numbers[start : start + batch_size], draw, size)


def complete(
    work: Work, file: AnswerFile, batches: Iterable, make: Callable[..., Sequence[Mapping]], sync_seconds: float = 0.0
) -> None:
    """Append to `file` the rows of every batch that it lacks.

    Args:
      batches: pieces, or other batches with `keys`. make: rows of a batch, with "index" and "sample".
      sync_seconds: rows are synced to the disk this often, and at the end.

    Raises:
      Stopped: after a signal; finished rows are on the disk.
    """
    waiting, synced = [], time.monotonic()
    try:
        for batch in batches:
            if all(key in file.rows for key in batch.keys):
                continue
            work.check_stop()
            waiting += [row for row in make(batch) if key_of(row) not in file.rows]
            if time.monotonic() - synced >= sync_seconds:
                file.add(waiting)
                waiting, synced = [], time.monotonic()
    finally:
        if waiting:
            file.add(waiting)
