"""Safetensors, one file or several with an index: read and written in pieces.

The library only checks headers: its readers map whole files, counted as our memory, its writer needs all tensors."""
import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from softmask_jax.convert.key_tables import Spec
from softmask_jax.convert.safe_files import inside, parse_json, read_json
from softmask_jax.convert.tensors import PIECE_BYTES, Tensors, in_threads, joined, num_bytes, raw, renamed
from softmask_jax.io.bucket import BucketError
from softmask_jax.io.files import one_line
from softmask_jax.io.paths import BucketPath

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5 * 10**9
LARGEST_HEADER = 100_000_000  # the library's own limit
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """One file. Raises ValueError for an invalid header or an unsupported dtype."""

    def __init__(self, path: Path):
        self.path, self.specs, self._starts = path, {}, {}
        length, header = _read_header(path)
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{path}: {key!r:.100} has the type {entry['dtype']:.20}; convert it to BF16 or F32.")
            self.specs[key] = Spec(np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]))
            self._starts[key] = 8 + length + entry["data_offsets"][0]
        self._file = None if isinstance(path, BucketPath) else open(path, "rb")

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        (dtype, shape), offset = self.specs[key], self._starts[key]
        if not shape:
            yield self._read(dtype, (), offset)
            return
        row = dtype.itemsize * math.prod(shape[1:])
        rows = max(1, PIECE_BYTES // max(row, 1))
        for start in range(0, shape[0], rows):
            yield self._read(dtype, (min(rows, shape[0] - start), *shape[1:]), offset + start * row)

    def _read(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        array = np.empty(shape, dtype)
        view = raw(array)
        if self._file is None:
            view[:] = self.path.read_range(offset, offset + len(view))
            return array
        while view:
            # At a position: threads share the file.
            count = os.preadv(self._file.fileno(), [view], offset)
            if not count:
                raise ValueError(f"{self.path} has become shorter while it was read; start again.")
            view, offset = view[count:], offset + count
        return array


class SafetensorsFolder:
    """The tensors of a folder's `name`, or of the files in `name`.index.json, which must fit them. `files`: by key."""

    def __init__(self, folder: Path, name: str = SINGLE):
        index = f"{name}.index.json"
        if (folder / index).exists() and not (folder / name).exists():
            self.files = read_json(folder, index).get("weight_map")
            if not isinstance(self.files, dict) or not self.files or {*map(type, self.files.values())} != {str}:
                raise ValueError(f"{folder / index} has no weight_map of keys to files; download it again.")
            opened = {file: SafetensorsFile(inside(folder, file)) for file in dict.fromkeys(self.files.values())}
            stored = {(key, file) for file, tensors in opened.items() for key in tensors.specs}
            listed = set(self.files.items())
            wrong = [f"not in {file}: {key}" for key, file in sorted(listed - stored)]
            wrong += [f"not in the index: {key} of {file}" for key, file in sorted(stored - listed)]
            if wrong:
                more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                raise ValueError(f"{folder / index} does not fit its files ({'; '.join(wrong[:3])}{more}).")
        else:
            opened = {name: SafetensorsFile(inside(folder, name))}
            self.files = dict.fromkeys(opened[name].specs, name)
        self.specs, self.pieces = renamed(joined(*opened.values()), {key: key for key in self.files})


def write(folder: Path, tensors: Tensors, *, name: str = SINGLE, files: Mapping[str, str] | None = None,
          shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as the library would. files: the file of each key; by default cut at `shard_bytes`."""
    if files is None or set(files) != set(tensors.specs):
        files = _shards(tensors, name, shard_bytes)
    if isinstance(folder, BucketPath):
        in_threads(lambda file: _send(folder / file, tensors, [key for key in files if files[key] == file]),
                   dict.fromkeys(files.values()))  # fmt: skip
        _write_index(folder, tensors, name, files)
        return
    with contextlib.ExitStack() as stack:
        offsets, handles = {}, []
        for file in dict.fromkeys(files.values()):
            handles.append(stack.enter_context(open(folder / file, "xb", buffering=0)))
            offsets |= _write_header(handles[-1], tensors, [key for key in files if files[key] == file])

        def copy(key: str) -> None:
            handle, offset = offsets[key]
            for piece in tensors.pieces(key):
                view = raw(piece)
                while view:
                    count = os.pwrite(handle, view, offset)
                    view, offset = view[count:], offset + count

        in_threads(copy, offsets)
        for handle in handles:
            os.fsync(handle.fileno())
    _write_index(folder, tensors, name, files)


def _write_index(folder: Path, tensors: Tensors, name: str, files: Mapping[str, str]) -> None:
    if set(files.values()) != {name}:
        index = {"metadata": {"total_size": num_bytes(tensors)}, "weight_map": dict(sorted(files.items()))}
        (folder / f"{name}.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write_header(file, tensors: Tensors, keys: list[str]) -> dict[str, tuple[int, int]]:
    """Write the header; return the descriptor and offset of each tensor."""
    start, offsets, size = _header(tensors, keys)
    file.write(start)
    file.truncate(len(start) + size)
    return {key: (file.fileno(), len(start) + offset) for key, offset in offsets.items()}


def _header(tensors: Tensors, keys: list[str]) -> tuple[bytes, dict[str, int], int]:
    """The file's first bytes; the offset of each tensor after them, in order; the size of all."""
    header, offset, offsets = {"__metadata__": {"format": "pt"}}, 0, {}
    # The library's order: large types first, so that all are aligned, then by name.
    for key in sorted(keys, key=lambda key: (-tensors.specs[key].dtype.itemsize, key)):
        spec = tensors.specs[key]
        end = offset + spec.num_bytes
        header[key] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offsets[key], offset = offset, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, offset


def _send(path: BucketPath, tensors: Tensors, keys: list[str]) -> None:
    """Write a file from its first byte to the last, as objects are."""
    start, offsets, _ = _header(tensors, keys)
    with path.open("xb") as file:
        file.write(start)
        for key in offsets:
            for piece in tensors.pieces(key):
                file.write(raw(piece))


def _read_header(path: Path) -> tuple[int, dict]:
    """Length and content of a header that fits its file. Raises ValueError."""
    try:
        if not isinstance(path, BucketPath):
            with safe_open(path, "numpy"):
                pass
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if length > min(size, LARGEST_HEADER):
                raise ValueError("its header is too large")
            header = parse_json(file.read(length), path)
        if isinstance(path, BucketPath):  # the library maps whole files
            _check_offsets(header, size - 8 - length)
    except BucketError:
        raise
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        message = f"{path} is no valid safetensors file ({one_line(error):.150}); download it again."
        raise ValueError(message) from None
    return length, header


def _check_offsets(header: Mapping, size: int) -> None:
    """Raise ValueError, LookupError or TypeError unless tensors follow one another and fill `size` bytes."""
    entries = [entry for key, entry in header.items() if key != "__metadata__"]
    end = 0
    for entry in sorted(entries, key=lambda entry: entry["data_offsets"]):
        width = np.dtype(DTYPES[entry["dtype"]]).itemsize if entry["dtype"] in DTYPES else 0
        start, stop = entry["data_offsets"]
        if start != end or width and stop - start != width * math.prod(entry["shape"]):
            raise ValueError("its header does not fit its tensors")
        end = stop
    if end != size:
        raise ValueError(f"it has {size} bytes of tensors instead of {end}")


def _shards(tensors: Tensors, name: str, shard_bytes: int) -> dict[str, str]:
    numbers, number, filled = {}, 0, 0
    for key, spec in tensors.specs.items():
        if filled and filled + spec.num_bytes > shard_bytes:
            number, filled = number + 1, 0
        numbers[key], filled = number, filled + spec.num_bytes
    if not number:
        return dict.fromkeys(numbers, name)
    stem = name.removesuffix(".safetensors")
    return {key: f"{stem}-{n + 1:05}-of-{number + 1:05}.safetensors" for key, n in numbers.items()}
