"""Tensors matched to key tables (see `models.keys`): shapes, blocks, problems. Numpy only."""
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from softmask_jax.models.keys import Entry
from softmask_jax.models.nn.network_config import VOCABULARY_MULTIPLE


class Spec(NamedTuple):
    """An array without its values."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def keys(entry: Entry, num_blocks: int) -> Iterator[tuple[int, str]]:
    """Block numbers and keys of an entry; a single key, of block 0, without {i}."""
    for i in range(num_blocks if entry.stacked else 1):
        yield i, entry.key.replace("{i}", str(i))


def padded(vocab_size: int) -> int:
    """Stored rows of a vocabulary."""
    return math.ceil(vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def our_shape(entry: Entry, shape: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Shape of our array, stacked and padded, from that of PyTorch's tensor."""
    if entry.change == "vocabulary":
        shape = (padded(shape[0]), *shape[1:])
    shape = tuple(shape[::-1] if entry.change == "transpose" else shape)
    return (num_blocks, *shape) if entry.stacked else shape


def count_blocks(table: Iterable[Entry], names: Iterable[str]) -> int:
    """Number of blocks, at least 1, whose keys are among `names` without a gap."""
    pattern = re.escape(next(entry.key for entry in table if entry.stacked)).replace(r"\{i\}", r"(\d{1,4})")
    numbers = {int(match[1]) for key in names if (match := re.fullmatch(pattern, key))}
    return next((i for i in range(len(numbers)) if i not in numbers), len(numbers)) or 1


def match(table: Sequence[Entry], specs: Mapping[str, Spec], num_blocks: int, model: str,
          sizes: Mapping[str, int] | None = None) -> dict[str, tuple[Entry, int]]:
    """Entry and block number of every key of PyTorch's tensors. sizes: of some letters, from the model's config.
    Raises ValueError, calling it `model`, that names every missing, unexpected, misshapen and mistyped key."""
    expected = {key: (entry, i) for entry in table for i, key in keys(entry, num_blocks)}
    problems = [f"missing: {key}" for key in expected if key not in specs]
    problems += [f"unexpected: {key}" for key in specs if key not in expected]
    sizes, dtypes = dict(sizes or {}), {}
    for key, (entry, _) in expected.items():
        if key in specs:
            problems += _problems(key, entry, specs[key], sizes, dtypes)
    if problems:
        raise ValueError(f"These weights are not {model} of {num_blocks} blocks:\n  " + "\n  ".join(problems))
    return expected


def _problems(key: str, entry: Entry, spec: Spec, sizes: dict, dtypes: dict) -> Iterator[str]:
    """Differences of a tensor from its entry. The first tensor sets the size of a letter and the dtype of a path."""
    dtype, shape = spec
    if len(shape) == len(entry.shape):
        for letter, size in zip(entry.shape, shape):
            if isinstance(letter, str) and letter.isalpha():
                sizes.setdefault(letter, size)
    expected = tuple(_size(letter, sizes) for letter in entry.shape)
    if len(expected) != len(shape) or any(e not in (None, s) for e, s in zip(expected, shape)):
        letters = ", ".join(str(l) if e in (None, l) else f"{l}={e}" for l, e in zip(entry.shape, expected))
        yield f"misshapen: {key} has shape {tuple(shape)}, expected [{letters}]"
    if not (is_float(dtype) if entry.dtype == "float" else dtype.name == entry.dtype):
        kind = "a floating-point type" if entry.dtype == "float" else entry.dtype
        yield f"mistyped: {key} is {dtype}, expected {kind}"
    elif dtypes.setdefault(entry.path, dtype) != dtype:
        yield f"mistyped: {key} is {dtype}, but block 0 is {dtypes[entry.path]}"


def _size(letter: str | int, sizes: Mapping[str, int]) -> int | None:
    """The size of an axis: 3, "D" or "3D"; None while its letter is not known."""
    if isinstance(letter, int):
        return letter
    times, name = re.fullmatch(r"(\d*)([A-Z])", letter).groups()
    return int(times or 1) * sizes[name] if name in sizes else None


def is_float(dtype: np.dtype) -> bool:
    """float32, float16 or bfloat16 (numpy's `kind` of which is "V")."""
    return np.dtype(dtype).name in ("float32", "float16", "bfloat16")


def below(prefix: str, table: Iterable[Entry]) -> tuple[Entry, ...]:
    """The same entries with paths below `prefix`."""
    return tuple(entry._replace(path=f"{prefix}/{entry.path}") for entry in table)
