"""Safetensors, one file or several with an index: read and written in pieces.

The library checks every header (limits, overlaps, holes, lengths). Its readers map whole files, whose pages count as
this process's memory, and its writer needs all tensors at once.
"""
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from softmask_jax.convert.key_tables import Spec
from softmask_jax.convert.safe_files import inside, parse_json, read_json
from softmask_jax.convert.tensors import PIECE_BYTES, Tensors, in_threads, num_bytes, raw

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5 * 10**9
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """One file. Raises ValueError, one line, for a header that lies, and for types that are not read here."""

    def __init__(self, path: Path):
        self.path, self.specs, self._starts = path, {}, {}
        try:
            with safe_open(path, "numpy"):
                pass
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ValueError(f"{path} is no valid safetensors file ({reason:.150}); download it again.") from None
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length), path)
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{path}: {key!r:.100} has the type {entry['dtype']:.20}; convert it to BF16 or F32.")
            self.specs[key] = Spec(np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]))
            self._starts[key] = 8 + length + entry["data_offsets"][0]
        self._file = open(path, "rb")

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        spec, offset = self.specs[key], self._starts[key]
        if not spec.shape:
            yield self._read(spec.dtype, (), offset)
            return
        row = spec.dtype.itemsize * int(np.prod(spec.shape[1:]))
        rows = max(1, PIECE_BYTES // max(row, 1))
        for start in range(0, spec.shape[0], rows):
            count = min(rows, spec.shape[0] - start)
            yield self._read(spec.dtype, (count, *spec.shape[1:]), offset + start * row)

    def _read(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        array = np.empty(shape, dtype)
        view, done = raw(array), 0
        while done < len(view):
            # At a position: threads share the file.
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if not count:
                raise ValueError(f"{self.path} has become shorter while it was read; start again.")
            done += count
        return array


class SafetensorsFolder:
    """The tensors of a folder's `name`, or of the files in `name`.index.json. `files`: the file of each key.

    Raises ValueError, one line, when index and files do not belong together.
    """

    def __init__(self, folder: Path, name: str = SINGLE):
        index = f"{name}.index.json"
        self.index_metadata: dict = {}
        if (folder / index).exists() and not (folder / name).exists():
            content = read_json(folder, index)
            self.files = content.get("weight_map")
            self.index_metadata = content.get("metadata") or {}
            if not isinstance(self.files, dict) or not self.files or {*map(type, self.files.values())} != {str}:
                raise ValueError(f"{folder / index} has no weight_map of keys to files; download it again.")
            opened = {file: SafetensorsFile(inside(folder, file)) for file in dict.fromkeys(self.files.values())}
            wrong = [f"not in {file}: {key}" for key, file in self.files.items() if key not in opened[file].specs]
            wrong += [
                f"not in the index: {key} of {name}"
                for name, file in opened.items() for key in file.specs if self.files.get(key) != name
            ]  # fmt: skip
            if wrong:
                more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                raise ValueError(f"{folder / index} does not fit its files ({'; '.join(wrong[:3])}{more}).")
        else:
            opened = {name: SafetensorsFile(inside(folder, name))}
            self.files = dict.fromkeys(opened[name].specs, name)
        self._owner = {key: opened[file] for key, file in self.files.items()}
        self.specs = {key: owner.specs[key] for key, owner in self._owner.items()}

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        return self._owner[key].pieces(key)


def write(
    folder: Path, tensors: Tensors, *, name: str = SINGLE, files: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write tensors as the library would, into one file or, above `shard_bytes`, several and an index.

    files: the file of each key; by default cut at `shard_bytes`.
    """
    if files is None or set(files) != set(tensors.specs):
        files = _shards(tensors, name, shard_bytes)
    members: dict[str, list[str]] = {}
    for key, file in files.items():
        members.setdefault(file, []).append(key)
    offsets, handles = {}, {}
    try:
        for file, keys in members.items():
            handles[file] = open(folder / file, "xb", buffering=0)
            offsets |= _write_header(handles[file], tensors, keys)

        def copy(key: str) -> None:
            handle, offset = offsets[key]
            for piece in tensors.pieces(key):
                view = raw(piece)
                while view:
                    count = os.pwrite(handle, view, offset)
                    view, offset = view[count:], offset + count

        in_threads(copy, offsets)
        for handle in handles.values():
            os.fsync(handle.fileno())
    finally:
        for handle in handles.values():
            handle.close()
    if set(members) != {name}:
        total = num_bytes(tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / f"{name}.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write_header(file, tensors: Tensors, keys: list[str]) -> dict[str, tuple[int, int]]:
    """Write the header; return the descriptor and offset of each tensor."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    # The library's order: large types first, so that all are aligned, then by name.
    for key in sorted(keys, key=lambda key: (-tensors.specs[key].dtype.itemsize, key)):
        spec = tensors.specs[key]
        end = offset + spec.num_bytes
        header[key] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + offset)
    return {key: (file.fileno(), 8 + len(text) + header[key]["data_offsets"][0]) for key in keys}


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
