"""Arrays in Orbax's folders. Its libraries glob every path and read some as URLs: folders pass through `literal`."""
import glob
import json
import math
import os

import tensorstore
from etils import epath

from softmask_jax.io.files import check_folder
from softmask_jax.io.paths import in_bucket, to_path

METADATA, PACKED = "_METADATA", "manifest.ocdbt"
DECODED_BYTES = CACHE_BYTES = 4 * 2**20


class _Literal(type(epath.Path("/"))):
    """A local path, and paths below it, whose characters are no pattern."""

    def glob(self, pattern: str):
        return (self / name for name in glob.glob(pattern, root_dir=self))


def literal(folder: str | os.PathLike) -> epath.Path:
    """A folder for Orbax: absolute, without links; in a bucket as it is. Raises ValueError as `check_folder`."""
    check_folder(folder)
    if in_bucket(folder):
        return to_path(folder)
    return _Literal(os.path.realpath(folder))


def open_arrays(folder: str | os.PathLike) -> dict[tuple[str, ...], tensorstore.TensorStore]:
    """The arrays of one tree by path, in any layout of Orbax, values not read yet. Other folders raise any error."""
    folder = literal(folder)
    metadata = json.loads((folder / METADATA).read_text("utf-8"))
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    packed = (folder / PACKED).exists()
    # Arrays of one database share what was read of it.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    opened = {}
    for entry in metadata["tree_metadata"].values():
        names = tuple(str(part["key"]) for part in entry["key_metadata"])
        name = ".".join(names)
        store = {"driver": "ocdbt", "base": _store(folder), "path": f"{name}/"} if packed else _store(folder / name)
        opened[names] = tensorstore.open({"driver": driver, "kvstore": store}, open=True, read=True, context=context)
    return {names: future.result() for names, future in opened.items()}


def check_values(folder: str | os.PathLike) -> None:
    """Raise ValueError unless every chunk of a tree's arrays, those of all hosts, is stored in full."""
    folder = literal(folder)
    for names, array in open_arrays(folder).items():
        if not array.storage_statistics(query_fully_stored=True).result().fully_stored:
            raise ValueError(f"{'/'.join(names)} lacks values")
        # Decoding large chunks, too, would take half as long as writing them.
        if math.prod(array.chunk_layout.read_chunk.shape or ()) * array.dtype.numpy_dtype.itemsize <= DECODED_BYTES:
            array[tuple(slice(max(size - 1, 0), None) for size in array.shape)].read().result()
    if (folder / PACKED).exists():
        _check_packed(folder)


def _check_packed(folder: epath.Path) -> None:
    """Raise ValueError where an OCDBT database refers to bytes that its files do not have."""
    store = tensorstore.KvStore.open(_store(folder)).result()
    nodes = [tensorstore.ocdbt.dump(store).result()["versions"][-1]["root"]["location"]]
    while nodes:
        for entry in tensorstore.ocdbt.dump(store, nodes.pop()).result()["entries"]:
            if "location" in entry:
                nodes.append(entry["location"])
            elif "indirect_value" in entry:
                # value:BASE:NAME:START:LENGTH, where the file BASENAME has the value.
                where, start, length = entry["indirect_value"].rsplit(":", 2)
                name = "".join(where.split(":", 2)[1:])
                if not (folder / name).exists() or (folder / name).stat().length < int(start) + int(length):
                    raise ValueError(f"{name} lacks values of {entry['key'].decode()}")


def _store(folder: epath.Path) -> str | dict:
    # As a file:// URL its %, # and ? would mean something.
    url = f"{folder}/"
    return url if "://" in url else {"driver": "file", "path": url}
