"""Tables of keys: which PyTorch tensor is which of our arrays, and what changes on the way. Numpy only.

The left side of a table is our path, the right side PyTorch's key. Every key must be accounted for and every shape
must fit; all problems are reported at once.
"""
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

VOCABULARY_MULTIPLE = 128


class Entry(NamedTuple):
    """One tensor: our path, PyTorch's key ({i}: block number, stacked on our axis 0), what changes, PyTorch's shape.

    change: "none"; "transpose" ([out, in] <-> [in, out]); "vocabulary" (axis 0 padded with zeros to a multiple of 128).
    shape: sizes, or letters ("D", or "3D" for three times D). dtype: "float" is any floating-point type.
    """

    path: str
    key: str
    change: str
    shape: tuple[str | int, ...]
    dtype: str = "float"

    @property
    def stacked(self) -> bool:
        return "{i}" in self.key


class Spec(NamedTuple):
    """An array without its values."""

    dtype: np.dtype
    shape: tuple[int, ...]


def keys(entry: Entry, num_blocks: int) -> Iterator[tuple[int, str]]:
    """The block numbers and keys of an entry; one key, of block 0, where there is no {i}."""
    if not entry.stacked:
        yield 0, entry.key
        return
    for i in range(num_blocks):
        yield i, entry.key.replace("{i}", str(i))


def padded(vocab_size: int) -> int:
    """The vocabulary's size as it is stored."""
    return math.ceil(vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def our_shape(entry: Entry, shape: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """The shape of our array from that of PyTorch's tensor, stacked and padded."""
    if entry.change == "vocabulary":
        shape = (padded(shape[0]), *shape[1:])
    shape = tuple(shape[::-1] if entry.change == "transpose" else shape)
    return (num_blocks, *shape) if entry.stacked else shape


def count_blocks(table: Iterable[Entry], found: Iterable[str]) -> int:
    """How many blocks the keys of a table number, without a gap, among those found; at least 1."""
    pattern = re.escape(next(entry.key for entry in table if entry.stacked)).replace(r"\{i\}", r"(\d{1,4})")
    numbers = {int(match[1]) for key in found if (match := re.fullmatch(pattern, key))}
    return next((i for i in range(len(numbers)) if i not in numbers), len(numbers)) or 1


def match(
    table: Sequence[Entry], found: Mapping[str, Spec], num_blocks: int, what: str,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, tuple[Entry, int]]:  # fmt: skip
    """The entry and block number of every key.

    Args:
      found: PyTorch's tensors.
      what: the model's name, for the error.
      sizes: those of some letters, from the model's config.

    Raises:
      ValueError: names every missing, unexpected and misshapen key, and those whose dtype is not the entry's or differs
        between blocks.
    """
    expected = {key: (entry, i) for entry in table for i, key in keys(entry, num_blocks)}
    problems = [f"missing: {key}" for key in expected if key not in found]
    problems += [f"unexpected: {key}" for key in found if key not in expected]
    present = {key: (entry, found[key].shape) for key, (entry, _) in expected.items() if key in found}
    problems += misshapen(present, sizes)
    first: dict[str, np.dtype] = {}
    for key, (entry, _) in present.items():
        dtype = found[key].dtype
        if not (is_float(dtype) if entry.dtype == "float" else dtype.name == entry.dtype):
            wanted = "a floating-point type" if entry.dtype == "float" else entry.dtype
            problems.append(f"mistyped: {key} is {dtype}, expected {wanted}")
        elif first.setdefault(entry.path, dtype) != dtype:
            problems.append(f"mistyped: {key} is {dtype}, but block 0 is {first[entry.path]}")
    if problems:
        raise ValueError(f"These weights are not {what} of {num_blocks} blocks:\n  " + "\n  ".join(problems))
    return expected


def is_float(dtype: np.dtype) -> bool:
    """float32, float16 or bfloat16 (numpy's `kind` of which is "V")."""
    return np.dtype(dtype).name in ("float32", "float16", "bfloat16")


def misshapen(tensors: Mapping[str, tuple[Entry, Sequence[int]]], sizes: Mapping[str, int] | None = None) -> list[str]:
    """Compares every shape with its entry's letters; the first tensor that has a letter alone sets its size."""
    sizes, problems = dict(sizes or {}), []
    for name, (entry, shape) in tensors.items():
        if len(shape) == len(entry.shape):
            for letter, size in zip(entry.shape, shape):
                if isinstance(letter, str) and letter.isalpha():
                    sizes.setdefault(letter, size)
        expected = tuple(_size(letter, sizes) for letter in entry.shape)
        if len(expected) != len(shape) or any(e is not None and e != s for e, s in zip(expected, shape)):
            wanted = ", ".join(str(l) if e in (None, l) else f"{l}={e}" for l, e in zip(entry.shape, expected))
            problems.append(f"misshapen: {name} has shape {tuple(shape)}, expected [{wanted}]")
    return problems


def _size(letter: str | int, sizes: Mapping[str, int]) -> int | None:
    """The size of an axis: 3, "D" or "3D"; None while its letter is not known."""
    if isinstance(letter, int):
        return letter
    times, name = re.fullmatch(r"(\d*)([A-Z])", letter).groups()
    return int(times or 1) * sizes[name] if name in sizes else None


def below(prefix: str, table: Iterable[Entry]) -> tuple[Entry, ...]:
    """The same entries with paths below `prefix`."""
    return tuple(entry._replace(path=f"{prefix}/{entry.path}") for entry in table)
