"""Checkpoints as tensors under PyTorch's keys, read in pieces: the interface of all readers and writers here."""
import collections
import hashlib
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from softmask_jax.convert.key_tables import Spec, is_float

Progress = Callable[[int], object]  # called with the bytes of every piece
PIECE_BYTES = 16 * 2**20
# Hashing and transposing release the interpreter's lock; more threads would need more memory for little speed.
THREADS = 2


class Tensors(Protocol):
    """`specs`: dtype and shape of every tensor by its key."""

    specs: Mapping[str, Spec]

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        """The tensor's rows from first to last in pieces of bounded size; a scalar is one piece."""


class View(NamedTuple):
    """Tensors by a function from key to pieces."""

    specs: Mapping[str, Spec]
    pieces: Callable[[str], Iterator[np.ndarray]]


def renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    """Tensors under the keys of `names`, whose values are their old keys; those not listed are left out."""
    return View({new: tensors.specs[old] for new, old in names.items()}, lambda key: tensors.pieces(names[key]))


def without(tensors: Tensors, keys: Container[str]) -> Tensors:
    """The tensors except `keys`."""
    return renamed(tensors, {key: key for key in tensors.specs if key not in keys})


def floats(tensors: Tensors, dtype=np.float32) -> Tensors:
    """Tensors, floating-point ones as `dtype`: float32 holds bfloat16 and float16 exactly."""
    dtype = np.dtype(dtype)
    specs = {key: spec._replace(dtype=dtype) if is_float(spec.dtype) else spec for key, spec in tensors.specs.items()}
    return View(specs, lambda key: (piece.astype(specs[key].dtype, copy=False) for piece in tensors.pieces(key)))


def joined(*parts: Tensors) -> Tensors:
    """The tensors of several others; no key may occur twice."""
    owners = {key: part for part in parts for key in part.specs}
    return View({key: part.specs[key] for key, part in owners.items()}, lambda key: owners[key].pieces(key))


def in_memory(arrays: Mapping[str, np.ndarray]) -> Tensors:
    """Tensors from arrays."""
    return View({key: Spec(array.dtype, array.shape) for key, array in arrays.items()}, lambda key: iter([arrays[key]]))


class Hashed:
    """Other tensors, hashed while they are read: `sha256` by key, once a tensor is read to its end."""

    def __init__(self, tensors: Tensors, progress: Progress = lambda _: None):
        self.tensors, self.specs, self.progress = tensors, tensors.specs, progress
        self.sha256: dict[str, str] = {}

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        digest = hashlib.sha256()
        for piece in self.tensors.pieces(key):
            digest.update(raw(piece))
            yield piece
            self.progress(piece.nbytes)
        self.sha256[key] = digest.hexdigest()


def raw(array: np.ndarray) -> memoryview:
    """An array's bytes, row by row."""
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def whole(tensors: Tensors, key: str) -> np.ndarray:
    """One tensor as an array."""
    return np.concatenate([np.atleast_1d(piece) for piece in tensors.pieces(key)]).reshape(tensors.specs[key].shape)


def num_bytes(tensors: Tensors) -> int:
    return sum(spec.num_bytes for spec in tensors.specs.values())


def in_threads(work: Callable, items) -> None:
    """Call `work` of each item, two at a time; the first error ends it once running calls are done."""
    with ThreadPoolExecutor(THREADS) as pool:
        collections.deque(pool.map(work, items), maxlen=0)


def hashes(tensors: Tensors, progress: Progress = lambda _: None) -> dict[str, str]:
    """SHA-256 of every tensor by key."""
    hashed = Hashed(tensors, progress)
    in_threads(lambda key: collections.deque(hashed.pieces(key), maxlen=0), tensors.specs)
    return hashed.sha256
