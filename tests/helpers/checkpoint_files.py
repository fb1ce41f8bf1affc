"""The recorded checkpoints as folders, and small files in the formats that are read, good and bad."""
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np

from softmask_jax.convert import lightning
from softmask_jax.convert.__main__ import main
from softmask_jax.convert.tensors import whole
from tests.golden import FOLDER

# By name, so that each golden file is named by a test.
FILES = (
    "dora/adapter/adapter_config.json", "dora/adapter/adapter_model.safetensors",
    "dora/adapter/transparency_config.json", "dream/tiny/config.json", "dream/tiny/model.safetensors",
    "dream/tiny_bf16/config.json", "dream/tiny_bf16/model.safetensors",
    "dream/tiny_sharded/model-00001-of-00005.safetensors", "dream/tiny_sharded/model-00002-of-00005.safetensors",
    "dream/tiny_sharded/model-00003-of-00005.safetensors", "dream/tiny_sharded/model-00004-of-00005.safetensors",
    "dream/tiny_sharded/model-00005-of-00005.safetensors", "dream/tiny_sharded/model.safetensors.index.json",
    "mdlm_dit/mdlm.ckpt", "mdlm_dit/mdlm_sm.ckpt",
)  # fmt: skip


def recorded(name: str, into: Path) -> Path:
    """A copy of the folder `dream/tiny` and the like; `dream/tiny_sharded` shares its config with `dream/tiny`."""
    into.mkdir(parents=True)
    for file in FILES:
        if file.startswith(f"{name}/"):
            (into / Path(file).name).write_bytes((FOLDER / file).read_bytes())
    if not (into / "config.json").exists() and name.startswith("dream/"):
        (into / "config.json").write_bytes((FOLDER / "dream/tiny/config.json").read_bytes())
    return into


def safetensors(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with whatever header, whose length may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


class Global:
    """Pickles as a name that the reader would have to import, called with arguments if there are some."""

    def __init__(self, name: str, *args):
        self.name, self.args = name, args


class Persistent(tuple):
    """Pickles as a persistent id."""


class _Names(pickle._Pickler):
    """Python's own pickler, which writes `Global` without importing it."""

    def persistent_id(self, value):
        return tuple(value) if isinstance(value, Persistent) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Global):
            module, _, name = value.name.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
            if value.args:
                self.save(value.args)
                self.write(pickle.REDUCE)
            return
        super().save(value, save_persistent_id)


def pickled(value) -> bytes:
    file = io.BytesIO()
    _Names(file, protocol=2).dump(value)
    return file.getvalue()


def tensor(number: int, shape: tuple, strides: tuple, count: int, offset: int = 0, kind: str = "FloatStorage"):
    """What torch.save pickles for a tensor."""
    storage = Persistent(("storage", Global(f"torch.{kind}"), str(number), "cpu", count))
    return Global("torch._utils._rebuild_tensor_v2", storage, offset, shape, strides, False, {})


def mdlm_checkpoint(path: Path, name: str = "mdlm", *, rename=lambda key: key, average=False, **content) -> Path:
    """The recorded Lightning checkpoint `name`, its raw weights under other keys, as their own average, beside `content`."""
    tensors, _ = lightning.read(FOLDER / f"mdlm_dit/{name}.ckpt", "raw")
    arrays = {rename(key): whole(tensors, key) for key in tensors.specs}
    state = {}
    for number, (key, array) in enumerate(arrays.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        state[key] = tensor(number, array.shape, strides, array.size)
    if average:
        content["ema"] = {"shadow_params": [x for key, x in state.items() if "rotary" not in key and "tran_head" not in key]}
    return torch_zip(path, {"state_dict": state} | content, list(arrays.values()))


def torch_zip(path: Path, content, storages=(), *, compression=zipfile.ZIP_STORED, byteorder="little") -> Path:
    """A file as torch.save writes it; content: an object, or a pickle's bytes."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content if isinstance(content, bytes) else pickled(content))
        file.writestr("archive/byteorder", byteorder)
        for number, storage in enumerate(storages):
            file.writestr(f"archive/data/{number}", np.asarray(storage).tobytes())
    return path


def converts(src, dst, *more) -> None:
    assert main([f"--src={src}", f"--dst={dst}", *more]) == 0


def same_files(one, other) -> None:
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in one.iterdir():
        a, b = path.read_bytes(), (other / path.name).read_bytes()
        if path.suffix == ".json":
            a, b = (json.loads(text) for text in (a, b))
            for found in (a, b):
                found.get("metadata", {}).pop("total_parameters", None)  # of newer transformers alone
        assert a == b, path.name
