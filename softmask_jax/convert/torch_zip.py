"""Tensors in zip files of `torch.save`, such as Lightning's checkpoints, read without PyTorch and `pickle`.

A file holds `<name>/data.pkl` and the storages `<name>/data/<number>`, never compressed: nothing can be larger than the
file.
"""
import math
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from softmask_jax.convert import pickles
from softmask_jax.convert.key_tables import Spec
from softmask_jax.convert.pickles import PersistentId, Stub
from softmask_jax.convert.tensors import Tensors, View

STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
REBUILD, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
MOST_MEMBERS = 1_000_000
MOST_AXES = 8


class Tensor(NamedTuple):
    """Position of a tensor: its storage, and offset and strides in it, in elements."""

    storage: str
    spec: Spec
    offset: int
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Elements of the storage from the first to the last that the tensor has."""
        shape = self.spec.shape
        return 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, self.strides))


class TorchZip:
    """A file of `torch.save`: `content` is its object, tensors as `Tensor`s and other classes as `Stub`s.

    Raises ValueError, one line, for a file that is damaged, of another format, or malicious.
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
        # Since Python 3.12 opening a member, which seeks, is not thread-safe.
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

    def tensors(self, members: Mapping[str, Tensor]) -> Tensors:
        """Some tensors of the file by key."""
        return View({key: tensor.spec for key, tensor in members.items()}, lambda key: iter([self.read(members[key])]))

    def read(self, tensor: Tensor) -> np.ndarray:
        """The array of one tensor."""
        dtype, shape = tensor.spec
        size = dtype.itemsize
        try:
            with self._lock, self.zip.open(self.prefix + tensor.storage) as file:
                if tensor.offset:
                    file.seek(tensor.offset * size)
                # Read to its end from its beginning, a member's CRC is checked.
                content = file.read()
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            message = f"{self.path}: storage {tensor.storage} is damaged ({error}); copy the file again."
            raise ValueError(message) from None
        flat = np.frombuffer(content[: tensor.extent * size], dtype)
        strides = tuple(stride * size for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)

    def _checked_members(self) -> dict[str, zipfile.ZipInfo]:
        infos = self.zip.infolist()
        members = {info.filename: info for info in infos}
        if len(infos) > MOST_MEMBERS or len(members) < len(infos):
            raise ValueError(f"{self.path}: refused, its members are too many or occur twice.")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                reason = "is compressed or encrypted; torch.save stores as it is"
                raise ValueError(f"{self.path}: refused, {info.filename!r:.100} {reason}.")
        if sum(info.file_size for info in infos) > self.path.stat().st_size:
            raise ValueError(f"{self.path}: refused, its members overlap.")
        return members

    def _root(self) -> str:
        pickled = [name.split("/") for name in self._members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickled) != 1:
            raise ValueError(f"{self.path} is a zip file with no data.pkl of torch.save; give a PyTorch checkpoint.")
        return pickled[0][0]

    def _bytes(self, name: str, limit: int) -> bytes:
        if self._members[name].file_size > limit:
            raise ValueError(f"{self.path}: refused, {name} has {self._members[name].file_size:,} bytes.")
        try:
            return self.zip.read(name)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise ValueError(f"{self.path}: {name} is damaged ({error}); copy the file again.") from None

    def _resolve(self, value: Any) -> Any:
        """Replace tensors in containers, each of which is followed once: a pickle may hold itself."""
        seen, waiting = {}, []

        def replaced(value):
            if isinstance(value, Stub) and value.args is not None and value.name in (REBUILD, PARAMETER):
                # A parameter's first argument is its tensor.
                return self._tensor(value.args[0] if value.name == PARAMETER and value.args else value)
            if isinstance(value, (dict, list)) and id(value) not in seen:
                seen[id(value)] = value
                waiting.append(value)
            return value

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
            tensor = Tensor(number, Spec(dtype, tuple(shape)), offset, tuple(strides))
            size = self._members[self.prefix + number].file_size
            # Elements are counted too: strides of 0 could blow up a small storage.
            fits &= max(math.prod(shape), tensor.extent) + offset <= count and count * dtype.itemsize <= size
        except (AttributeError, KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise pickles.BadPickle("a tensor that does not fit its storage, or is of an unknown kind")
        return tensor
