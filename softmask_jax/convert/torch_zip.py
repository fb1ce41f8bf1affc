"""Tensors in zip files of `torch.save`, `<name>/data.pkl` and `<name>/data/<number>`; no PyTorch and no `pickle`."""
import math
import re
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
DAMAGED = (zipfile.BadZipFile, OSError, EOFError)


class Tensor(NamedTuple):
    """Position of a tensor: its storage, and offset and strides in it, in elements."""

    storage: str
    spec: Spec
    offset: int
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Elements of the storage from the tensor's first to its last."""
        shape = self.spec.shape
        return 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, self.strides))


class TorchZip:
    """A file of `torch.save`; `content` is its object, in `Tensor`s and `Stub`s. ValueError if damaged or malicious."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
        except (*DAMAGED, ValueError, NotImplementedError) as error:
            remedy = "copy it again, or save it again with PyTorch 1.6 or later"
            raise ValueError(f"{path} is no whole zip file as torch.save writes them ({error}); {remedy}.") from None
        # Since Python 3.12 opening a member, which seeks, is not thread-safe.
        self._lock = threading.Lock()
        self._sizes = self._checked_sizes()
        roots = [name.removesuffix("/data.pkl") for name in self._sizes if re.fullmatch(r"[^/]*/data\.pkl", name)]
        if len(roots) != 1:
            raise ValueError(f"{path} is a zip file with no data.pkl of torch.save; give a PyTorch checkpoint.")
        self.prefix, byteorder = f"{roots[0]}/data/", f"{roots[0]}/byteorder"
        if byteorder in self._sizes and self._bytes(byteorder, 16) != b"little":
            raise ValueError(f"{path} was written on a big-endian machine; save it again on another.")
        try:
            self.content = pickles.read(self._bytes(f"{roots[0]}/data.pkl", pickles.MOST_BYTES), self._called)
        except pickles.BadPickle as error:
            raise ValueError(f"{path} holds {error}; refused. Use a checkpoint from a source that you trust.") from None

    def tensors(self, members: Mapping[str, Tensor]) -> Tensors:
        """Some tensors of the file by key."""
        return View({key: tensor.spec for key, tensor in members.items()}, lambda key: iter([self.read(members[key])]))

    def read(self, tensor: Tensor) -> np.ndarray:
        """The array of one tensor."""
        dtype, shape = tensor.spec
        content, size = self._bytes(self.prefix + tensor.storage), dtype.itemsize
        flat = np.frombuffer(content, dtype, tensor.extent, tensor.offset * size)
        strides = tuple(stride * size for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)

    def _checked_sizes(self) -> dict[str, int]:
        """Bytes of every member."""
        infos = self.zip.infolist()
        sizes = {info.filename: info.file_size for info in infos}
        if len(infos) > MOST_MEMBERS or len(sizes) < len(infos):
            raise ValueError(f"{self.path}: refused, its members are too many or occur twice.")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                reason = "is compressed or encrypted; torch.save stores as it is"
                raise ValueError(f"{self.path}: refused, {info.filename!r:.100} {reason}.")
        if sum(sizes.values()) > self.path.stat().st_size:
            raise ValueError(f"{self.path}: refused, its members overlap.")
        return sizes

    def _bytes(self, name: str, limit: float = math.inf) -> bytes:
        """A member, its CRC checked."""
        if self._sizes[name] > limit:
            raise ValueError(f"{self.path}: refused, {name} has {self._sizes[name]:,} bytes.")
        try:
            with self._lock:
                return self.zip.read(name)
        except DAMAGED as error:
            raise ValueError(f"{self.path}: {name} is damaged ({error}); copy the file again.") from None

    def _called(self, name: str, args: tuple) -> Any:
        """The result of a call in the pickle: a tensor, or a `Stub`."""
        if name == PARAMETER and args and isinstance(args[0], Tensor):
            return args[0]
        if name not in (REBUILD, PARAMETER):
            return Stub(name, args)
        try:
            storage, offset, shape, strides = args[:4]
            kind, stored, number, _, count = storage
            dtype = np.dtype(STORAGES[stored.name.rpartition(".")[2]])
            fits = name == REBUILD and isinstance(storage, PersistentId) and kind == "storage"
            numbers = (offset, count, *shape, *strides)
            fits &= all(type(n) is int and 0 <= n < 2**48 for n in numbers) and len(shape) == len(strides) <= MOST_AXES
            tensor = Tensor(number, Spec(dtype, tuple(shape)), offset, tuple(strides))
            # Elements are counted too: strides of 0 could blow up a small storage.
            fits &= max(math.prod(shape), tensor.extent) + offset <= count
            fits &= count * dtype.itemsize <= self._sizes[self.prefix + number]
        except (AttributeError, KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise pickles.BadPickle("a tensor that does not fit its storage, or is of an unknown kind")
        return tensor
