"""Our parameters in Orbax's layout, written and read one block at a time; Orbax itself saves whole arrays from memory.

Each block is one chunk, a plain file of an uncompressed zarr array; Orbax makes the metadata. Any layout is read."""
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from softmask_jax.convert.key_tables import Spec, keys, our_shape, padded
from softmask_jax.convert.tensors import PIECE_BYTES, Tensors, in_threads, raw, whole
from softmask_jax.io import stored_arrays, tree_files
from softmask_jax.io.paths import BucketPath, remove_tree
from softmask_jax.models.keys import Entry
from softmask_jax.models.nn.network_config import VOCABULARY_MULTIPLE

CHUNK_BYTES = 64 * 2**20


def write(folder: Path, tensors: Tensors, table: Mapping[str, tuple[Entry, int]], num_blocks: int) -> dict:
    """Write a params folder for `tree_files.read_trees`; each tensor is read once. table: entry and block of every key.
    Returns [size, CRC-32] of every file of values, by its name in the folder, as they were in memory."""
    arrays, written = {}, {}
    for key, (entry, _) in table.items():
        dtype, shape = tensors.specs[key]
        arrays[entry.path] = Spec(dtype, our_shape(entry, shape, num_blocks))
    chunks = {entry.path: _chunk_shape(entry, arrays[entry.path]) for entry, _ in table.values()}
    _make_folder(folder, arrays, chunks)

    def copy(key: str) -> None:
        entry, block = table[key]
        array_folder = folder / entry.path.replace("/", ".")
        if entry.change == "vocabulary":
            for number, array in enumerate(_chunks(tensors, key, chunks[entry.path], arrays[entry.path].shape[0])):
                _write_chunk(written, array_folder, [number] + [0] * (array.ndim - 1), array)
        else:
            array = _changed(tensors, key, entry)
            _write_chunk(written, array_folder, [block] * entry.stacked + [0] * array.ndim, array)

    in_threads(copy, table)
    return written


class OurTensors:
    """Parameters stored by Orbax, as tensors under PyTorch's keys: `write` inverted. vocab_size: rows without padding.
    Raises ValueError naming every array that is missing, unexpected or misshapen."""

    def __init__(self, folder: Path, entries: Sequence[Entry], vocab_size: int = 0):
        self.folder, self.vocab_size, self._arrays, self.specs = folder, vocab_size, {}, {}
        stored, depths = _open(folder), {}
        problems = [f"missing: {entry.path}" for entry in entries if entry.path not in stored]
        problems += [f"unexpected: {path}" for path in sorted(set(stored) - {entry.path for entry in entries})]
        for entry in (entry for entry in entries if entry.path in stored):
            array = stored[entry.path]
            shape = array.shape
            if entry.stacked:
                depths[entry.path], *shape = shape
            if entry.change == "vocabulary" and shape[0] != padded(vocab_size):
                problems.append(f"misshapen: {entry.path} has {shape[0]} rows for a vocabulary of {vocab_size}")
            if entry.change == "vocabulary":
                shape = (vocab_size, *shape[1:])
            shape = tuple(shape[::-1] if entry.change == "transpose" else shape)
            for i, key in keys(entry, depths.get(entry.path, 1)):
                self._arrays[key], self.specs[key] = (array, entry, i), Spec(np.dtype(array.dtype.numpy_dtype), shape)
        self.num_blocks = max(depths.values(), default=1)
        if len(set(depths.values())) > 1:
            problems.append(f"different numbers of blocks: {depths}")
        if problems:
            raise ValueError(f"The parameters in {folder} are of another model:\n  " + "\n  ".join(problems))

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        array, entry, block = self._arrays[key]
        if entry.change == "vocabulary":
            yield from self._rows(array, key)
            return
        values = np.asarray((array[block] if entry.stacked else array).read().result())
        if entry.change != "transpose":
            yield values
            return
        rows = max(1, PIECE_BYTES // (values.itemsize * values.shape[0]))
        for start in range(0, values.shape[1], rows):
            part = values[:, start : start + rows]
            piece = np.empty(part.shape[::-1], part.dtype)
            _transpose(part, piece)
            yield piece

    def _rows(self, array, key: str) -> Iterator[np.ndarray]:
        step = array.chunk_layout.read_chunk.shape[0] or array.shape[0]
        for start in range(0, array.shape[0], step):
            values = np.asarray(array[start : start + step].read().result())
            real = max(0, min(self.vocab_size - start, len(values)))
            if np.any(raw(values[real:])):
                raise ValueError(f"{self.folder}: a pad row of {key} is not zero: damaged; convert again.")
            if real:
                yield values[:real]


def stored_specs(folder: Path) -> dict[str, Spec]:
    """Dtype and shape of every array of a params folder, by its path. Raises ValueError, one line."""
    return {path: Spec(np.dtype(a.dtype.numpy_dtype), tuple(a.shape)) for path, a in _open(folder).items()}


def _open(folder: Path) -> dict:
    try:
        return {"/".join(names): array for names, array in stored_arrays.open_arrays(folder).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = tree_files.one_line(error)
        raise ValueError(f"{folder} holds no readable parameters ({reason:.150}); convert or train again.") from None


def _transpose(source: np.ndarray, target: np.ndarray) -> None:
    """Copy 128 rows at a time: a matrix transposed as a whole misses the processor's caches at every element."""
    for start in range(0, len(source), 128):
        target[:, start : start + 128] = source[start : start + 128].T


def _chunk_shape(entry: Entry, spec: Spec) -> tuple[int, ...]:
    if entry.stacked:
        return (1, *spec.shape[1:])
    if entry.change != "vocabulary":
        return spec.shape
    # The last chunk is stored in full, so all are of one size: a multiple of 128 rows that divides them.
    units = spec.shape[0] // VOCABULARY_MULTIPLE
    row = spec.dtype.itemsize * math.prod(spec.shape[1:])
    fitting = [n for n in range(1, units + 1) if units % n == 0 and n * VOCABULARY_MULTIPLE * row <= CHUNK_BYTES]
    return (VOCABULARY_MULTIPLE * max(fitting, default=1), *spec.shape[1:])


def _make_folder(folder: Path, arrays: Mapping[str, Spec], chunks: Mapping[str, tuple[int, ...]]) -> None:
    """Orbax's own folder of a tree of one-element arrays, which are then replaced by empty ones of full size."""
    tree = tree_files.nested({tuple(path.split("/")): np.zeros(1, np.float32) for path in arrays})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)) as checkpointer:
        checkpointer.save(stored_arrays.literal(folder), tree)
    for path, spec in arrays.items():
        array_folder = folder / path.replace("/", ".")
        if not (array_folder / ".zarray").is_file():
            raise RuntimeError("This version of orbax-checkpoint stores arrays in another way; install an earlier one.")
        remove_tree(array_folder)
        array_folder.mkdir()
        description = {
            "zarr_format": 2, "shape": list(spec.shape), "chunks": list(chunks[path]), "order": "C", "filters": None,
            "dtype": "bfloat16" if spec.dtype == jnp.bfloat16 else spec.dtype.str, "compressor": None,
            "dimension_separator": ".", "fill_value": None,
        }  # fmt: skip
        (array_folder / ".zarray").write_text(json.dumps(description), "utf-8")


def _changed(tensors: Tensors, key: str, entry: Entry) -> np.ndarray:
    """A tensor as one array, transposed if the entry says so."""
    if entry.change != "transpose":
        return whole(tensors, key)
    (dtype, shape), row = tensors.specs[key], 0
    array = np.empty(shape[::-1], dtype)
    for piece in tensors.pieces(key):
        _transpose(piece, array[:, row : row + len(piece)])
        row += len(piece)
    return array


def _chunks(tensors: Tensors, key: str, shape: tuple, rows: int) -> Iterator[np.ndarray]:
    """A tensor's rows, and zeros up to `rows`, in chunks of equal size: one buffer, used again."""
    buffer, filled, spec = np.zeros(shape, tensors.specs[key].dtype), 0, tensors.specs[key]
    padding = np.zeros((rows - spec.shape[0], *spec.shape[1:]), spec.dtype)
    for piece in itertools.chain(tensors.pieces(key), [padding]):
        while len(piece):
            count = min(len(piece), len(buffer) - filled)
            buffer[filled : filled + count] = piece[:count]
            filled, piece = filled + count, piece[count:]
            if filled == len(buffer):
                yield buffer
                filled = 0


def _write_chunk(written: dict, folder: Path, index: Sequence[int], array: np.ndarray) -> None:
    path, view = folder / (".".join(map(str, index)) or "0"), raw(array)
    written[f"{folder.name}/{path.name}"] = [len(view), zlib.crc32(view)]
    if isinstance(path, BucketPath):
        path.write_bytes(view)
        return
    with open(path, "xb", buffering=0) as file:
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())
