"""Checkpoints as tensors under PyTorch's keys, read by the piece: what every reader here is and every writer takes."""
import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from softmask_jax.convert.key_tables import Spec, is_float

PIECE_BYTES = 16 * 2**20
# Hashing and transposing release the interpreter's lock; more threads would need more memory for little speed.
THREADS = 2


class Tensors(Protocol):
    """`specs`: dtype and shape of every tensor by its key."""

    specs: Mapping[str, Spec]

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        """The tensor's rows from first to last in pieces of bounded size; a scalar is one piece."""


class Renamed:
    """Other tensors under other keys: `names` maps the new key to the old one. What it does not list is left out."""

    def __init__(self, tensors: Tensors, names: Mapping[str, str]):
        self.tensors, self.names = tensors, dict(names)
        self.specs = {new: tensors.specs[old] for new, old in self.names.items()}

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        return self.tensors.pieces(self.names[key])


class Floats:
    """Other tensors, the floating-point ones of them as `dtype`: float32 holds bfloat16 and float16 exactly."""

    def __init__(self, tensors: Tensors, dtype=np.float32):
        self.tensors, dtype = tensors, np.dtype(dtype)
        self.specs = {k: Spec(dtype if is_float(s.dtype) else s.dtype, s.shape) for k, s in tensors.specs.items()}

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        for piece in self.tensors.pieces(key):
            yield piece.astype(self.specs[key].dtype, copy=False)


class Joined:
    """The tensors of several others; no key may occur twice."""

    def __init__(self, *parts: Tensors):
        self.owners = {key: part for part in parts for key in part.specs}
        self.specs = {key: part.specs[key] for key, part in self.owners.items()}

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        return self.owners[key].pieces(key)


class InMemory:
    """Arrays that are small, or there anyway."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = {key: np.asarray(array) for key, array in arrays.items()}
        self.specs = {key: Spec(array.dtype, array.shape) for key, array in self.arrays.items()}

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        yield self.arrays[key]


class Hashed:
    """Other tensors, hashed while they are read: `sha256` by key, of each that was read to its end."""

    def __init__(self, tensors: Tensors, progress: Callable[[int], object] = lambda _: None):
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
    spec = tensors.specs[key]
    return np.concatenate([np.atleast_1d(piece) for piece in tensors.pieces(key)]).reshape(spec.shape)


def num_bytes(tensors: Tensors) -> int:
    return sum(spec.dtype.itemsize * int(np.prod(spec.shape)) for spec in tensors.specs.values())


def in_threads(work: Callable, items) -> None:
    """`work` of each item, two at a time. The first error ends it, when what is under way is done."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def hashes(tensors: Tensors, progress: Callable[[int], object] = lambda _: None) -> dict[str, str]:
    """Reads everything; SHA-256 by key."""
    hashed = Hashed(tensors, progress)

    def read(key: str) -> None:
        for _ in hashed.pieces(key):
            pass

    in_threads(read, tensors.specs)
    return hashed.sha256
