"""Tensors in the zip files of `torch.save`, such as Lightning's checkpoints, read without PyTorch and without `pickle`.

A file holds `<name>/data.pkl` and the storages `<name>/data/<number>`, all stored as they are: anything compressed is
refused, so that nothing in a file can be larger than the file.
"""
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from softmask_jax.convert import pickles
from softmask_jax.convert.key_tables import Spec
from softmask_jax.convert.pickles import PersistentId, Stub

STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
REBUILD, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
MOST_MEMBERS = 1_000_000
MOST_AXES = 8


class Tensor(NamedTuple):
    """Where a tensor lies: its storage, and offset and strides in it, counted in elements."""

    storage: str
    spec: Spec
    offset: int
    strides: tuple[int, ...]


class TorchZip:
    """A file of `torch.save`: `content` is its object with every tensor as a `Tensor` and other classes as `Stub`s.

    Raises ValueError, one line, for a file that is damaged, no such file, or means harm.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"{path} is no whole zip file as torch.save writes them ({error}); copy it again, or save it again "
                "with PyTorch 1.6 or later."
            ) from None
        # Of Python 3.12 and later, zipfile's relative seek while it opens a member is not safe among threads.
        self._lock = threading.Lock()
        self._members = self._checked_members()
        root = self._root()
        self.prefix = f"{root}/data/"
        if self._members.get(f"{root}/byteorder") and self._bytes(f"{root}/byteorder", 16) != b"little":
            raise ValueError(f"{path} was written on a big-endian machine; save it again on another.")
        try:
            self.content = self._resolve(pickles.read(self._bytes(f"{root}/data.pkl", pickles.MOST_BYTES)))
        except pickles.BadPickle as error:
            raise ValueError(f"{path} holds {error}; refused. Use a checkpoint from a source that you trust.") from None

    def read(self, tensor: Tensor) -> np.ndarray:
        """The array of one tensor."""
        dtype, shape = tensor.spec
        size = dtype.itemsize
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, tensor.strides)) if 0 not in shape else 0
        try:
            with self._lock, self.zip.open(self.prefix + tensor.storage) as file:
                # The zip's CRC is checked when the member is read to its end, which is here most often the case.
                content = file.read() if not tensor.offset else (file.seek(tensor.offset * size), file.read())[1]
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise ValueError(
                f"{self.path}: storage {tensor.storage} is damaged ({error}); copy the file again."
            ) from None
        flat = np.frombuffer(content[: extent * size], dtype)
        strides = tuple(stride * size for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)

    def _checked_members(self) -> dict[str, zipfile.ZipInfo]:
        infos = self.zip.infolist()
        members = {info.filename: info for info in infos}
        if len(infos) > MOST_MEMBERS or len(members) < len(infos):
            raise ValueError(f"{self.path}: refused, its members are too many or occur twice.")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                raise ValueError(
                    f"{self.path}: refused, {info.filename!r:.100} is compressed or encrypted; torch.save stores as it "
                    "is."
                )
        if sum(info.file_size for info in infos) > self.path.stat().st_size:
            raise ValueError(f"{self.path}: refused, its members overlap.")
        return members

    def _root(self) -> str:
        roots = [
            name.removesuffix("/data.pkl")
            for name in self._members
            if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(roots) != 1:
            raise ValueError(
                f"{self.path} is a zip file, but holds no data.pkl of torch.save; give a PyTorch checkpoint."
            )
        return roots[0]

    def _bytes(self, name: str, limit: int) -> bytes:
        if self._members[name].file_size > limit:
            raise ValueError(f"{self.path}: refused, {name} has {self._members[name].file_size:,} bytes.")
        try:
            return self.zip.read(name)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise ValueError(f"{self.path}: {name} is damaged ({error}); copy the file again.") from None

    def _resolve(self, value: Any) -> Any:
        """Replaces tensors, in containers that are followed once each: a pickle may hold itself."""
        seen = {}

        def replaced(value):
            if isinstance(value, Stub) and value.args is not None and value.name in (REBUILD, PARAMETER):
                # A parameter wraps a tensor, its first argument.
                return self._tensor(value.args[0] if value.name == PARAMETER and value.args else value)
            if isinstance(value, (dict, list)) and id(value) not in seen:
                seen[id(value)] = value
                waiting.append(value)
            return value

        waiting: list = []
        value = replaced(value)
        while waiting:
            container = waiting.pop()
            for key in container if isinstance(container, dict) else range(len(container)):
                container[key] = replaced(container[key])
        return value

    def _tensor(self, stub: Any) -> Tensor:
        try:
            storage, offset, shape, strides = stub.args[:4]
            kind, stored, number, _, count = storage
            dtype = np.dtype(STORAGES[stored.name.rpartition(".")[2]])
            fits = stub.name == REBUILD and isinstance(storage, PersistentId) and kind == "storage"
            numbers = (offset, count, *shape, *strides)
            fits &= all(type(n) is int and 0 <= n < 2**48 for n in numbers) and len(shape) == len(strides) <= MOST_AXES
            size = self._members[self.prefix + number].file_size
            extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides)) if 0 not in shape else 0
            # Strides of 0 could blow up a small storage, so elements are counted as well.
            elements = int(np.prod(shape, dtype=object)) if shape else 1
            fits &= max(elements, extent) + offset <= count and count * dtype.itemsize <= size
        except (AttributeError, KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise pickles.BadPickle("a tensor that does not fit its storage, or is of an unknown kind")
        return Tensor(number, Spec(dtype, tuple(shape)), offset, tuple(strides))


class ZipTensors:
    """Some tensors of a file, by key, for the writers."""

    def __init__(self, file: TorchZip, tensors: dict[str, Tensor]):
        self.file, self.tensors = file, tensors
        self.specs = {key: tensor.spec for key, tensor in tensors.items()}

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        yield self.file.read(self.tensors[key])
