"""Orbax trees, stored by path and read on any mesh, and checksums, in folders of checkpoints and converted models."""
import base64
import contextlib
import functools
import json
import logging
import os
import zlib
from typing import Any, Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict as nested
from jax.experimental import multihost_utils

from softmask_jax.io.bucket import BucketError
from softmask_jax.io.files import DISK_FULL, one_line, write_atomically
from softmask_jax.io.paths import BucketPath
from softmask_jax.io.stored_arrays import check_values, literal

TREES = ("params", "ema", "optimizer")
CHECKSUMS = "checksums.json"
# Orbax touches these after the checksums are taken; they hold times and no data.
UNCHECKED = {CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt"}
MOST_NAMED = 12

# Orbax prints the traceback of every background error; `Checkpoints` raises each once, in one line.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or record.levelno > logging.ERROR)

log = logging.getLogger(__name__)

Path = tuple[str, ...]


class Damaged(Exception):
    """A checkpoint's files are not what was written; the message names the file."""


def flat(tree) -> dict[Path, Any]:
    """The leaves of any pytree by their path; empty nodes and None vanish."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}


def storable(state) -> dict[str, dict]:
    """The non-empty trees of a train state, or of a dict with names in TREES (others: ValueError), as nested dicts."""
    if not isinstance(state, Mapping):
        state = {"params": state.params, "ema": state.ema, "optimizer": state.opt_state}
    if unknown := sorted(set(state) - set(TREES)):
        raise ValueError(f"A checkpoint holds {', '.join(TREES)}; got {', '.join(unknown)}.")
    # Orbax copies JAX's arrays before a save returns; the caller may change numpy's while they are written.
    trees = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.array(leaf), dict(state))
    return {name: nested(leaves) for name, tree in trees.items() if (leaves := flat(tree))}


def write_checksums(folder: os.PathLike, known: Mapping[str, list] | None = None) -> None:
    """Write checksums.json: size and CRC-32 of every file, in a bucket the CRC-32C that it has taken of every object.
    known: those taken in memory, by name; not read again."""
    folder, known = literal(folder), known or {}
    if isinstance(folder, BucketPath):
        files = {name: _listed(about) for name, about in folder.objects().items() if name not in UNCHECKED}
    else:
        names = sorted(os.path.relpath(os.path.join(at, f), folder) for at, _, files in os.walk(folder) for f in files)
        files = {name: known.get(name) or _checksum(folder / name) for name in names if name not in UNCHECKED}
    write_atomically(folder / CHECKSUMS, json.dumps({"crc32": _own_checksum(files), "files": files}))


def verify(folder: os.PathLike, items: Sequence[str] | None = None) -> bool:
    """Compare a checkpoint's files, or those of its sub-folders `items`, with its checksums; False without checksums.
    The first process reads for all. Raises Damaged for a file that is missing, unreadable or changed."""
    verdict, problem = 0, ""
    if jax.process_index() == 0:
        try:
            verdict = int(_compare(literal(folder), items))
        except Damaged as damage:
            verdict, problem = 2, str(damage)
    if jax.process_count() > 1:
        verdict = int(multihost_utils.broadcast_one_to_all(np.int32(verdict)))
    if verdict == 2:
        raise Damaged(problem or "according to the first process")
    return bool(verdict)


def read_trees(
    folder: os.PathLike, items: Sequence[str], abstract: Mapping[str, Any] | None = None, *, narrow: bool = False
) -> dict:
    """Read the trees `items` of a checkpoint or converted model; None for one that neither it nor `abstract` has.

    abstract: trees by item with shape, dtype and sharding; other items are nested dicts on the default device. Floats
      are read into wider dtypes (a bfloat16 run can continue in float32), with `narrow` also, rounded, into narrower.
    FileNotFoundError without `params`; ValueError names keys, shapes and dtypes that differ from `abstract`; Damaged as
    `verify` and, without checksums, for what Orbax cannot read."""

    def converts(stored, wanted) -> bool:
        floats = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (stored, wanted))
        return floats and (narrow or jnp.promote_types(stored, wanted) == wanted)

    folder, abstract = literal(folder), abstract or {}
    verified = verify(folder, items)
    if "params" in items and not (folder / "params").exists():
        raise FileNotFoundError(f"No params in {folder}; give the folder of a checkpoint or of a converted model.")
    with _damage_unless(verified):
        stored = {item: _stored(folder / item) for item in items}
    wanted = {item: flat(abstract[item]) if item in abstract else stored[item] for item in items}
    if absent := [item for item in items if wanted[item] and not stored[item] and not verified]:
        raise Damaged(f"{', '.join(absent)} missing, and no {CHECKSUMS}")
    _require_same(folder, stored, wanted, converts)
    with _damage_unless(verified):
        leaves = {item: _read(folder / item, wanted[item]) for item in items}
    trees = {item: nested(leaves[item]) or None for item in items}
    for item in abstract.keys() & trees.keys():
        trees[item] = jax.tree.structure(abstract[item]).unflatten(leaves[item][path] for path in wanted[item])
    return trees


def read_back(folder: os.PathLike, trees: Mapping[str, dict], data: Mapping | None = None) -> None:
    """Raise ValueError unless a folder just written restores to `data` and `trees`, by item with shapes and dtypes."""
    folder = literal(folder)
    try:
        for item, tree in trees.items():
            _require_same(folder, {item: _stored(folder / item)}, {item: flat(tree)})
            check_values(folder / item)
        if data is not None and read_json(folder, verified=True) != data:
            raise ValueError("data has changed")
    except Exception as error:
        raise ValueError(f"what was written cannot be read back: {one_line(error, 300)}") from error


def read_json(folder: os.PathLike, verified: bool) -> dict:
    """The cursor and metrics of a checkpoint: {"cursor": {...}, "metrics": {...}}."""
    with _damage_unless(verified):
        stored = ocp.JsonCheckpointHandler().restore(literal(folder) / "data")
        return {"cursor": stored["cursor"], "metrics": stored["metrics"]}


def disk_full(error: BaseException | None) -> int | None:
    """The errno if an error, or one of its causes, is a full disk, a used-up quota or a file-size limit; else None."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        for code in DISK_FULL:  # tensorstore's errors have the text alone
            if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                return code
        error = error.__cause__ or error.__context__
    return None


def _listed(about: Mapping) -> list:
    return [about["size"], about["crc32c"]]


def _taken(folder: epath.Path, name: str, recorded: list, listing: Mapping[str, Mapping]) -> list:
    """Size and checksum of a file, of the kind recorded: a number is a CRC-32, text the CRC-32C of a bucket.
    FileNotFoundError."""
    if isinstance(recorded[1], int):
        return _checksum(folder / name)
    if not isinstance(folder, BucketPath):  # a copy
        if not (take := _crc32c()):
            return [(folder / name).stat().length, recorded[1]]
        size, crc = _checksum(folder / name, take)
        return [size, base64.b64encode(crc.to_bytes(4, "big")).decode()]
    if name not in listing:
        raise FileNotFoundError(name)
    return _listed(listing[name])


@functools.cache
def _crc32c() -> Callable[[bytes, int], int] | None:
    """Takes a CRC-32C like zlib.crc32; None, with a warning, without a package for it."""
    try:
        import google_crc32c
    except ImportError:
        log.warning("Files copied from a bucket are compared by size only; pip install 'softmask_jax[gcs]' for checksums.")
        return None
    return lambda block, crc: google_crc32c.extend(crc, block)


def _checksum(path: epath.Path, take: Callable[[bytes, int], int] = zlib.crc32) -> list[int]:
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), take(block, crc)
    return [size, crc]


def _own_checksum(files: Mapping[str, list]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def _compare(folder: epath.Path, items: Sequence[str] | None) -> bool:
    if not (folder / CHECKSUMS).exists():
        return False
    listing = folder.objects() if isinstance(folder, BucketPath) else {}
    try:
        recorded = json.loads((folder / CHECKSUMS).read_text("utf-8"))
        if _own_checksum(recorded["files"]) != recorded["crc32"]:
            raise Damaged(f"{CHECKSUMS} has changed since it was written")
        for name, expected in recorded["files"].items():
            if items is not None and name.split("/")[0] not in items:
                continue
            try:
                actual = _taken(folder, name, expected, listing)
            except FileNotFoundError:
                raise Damaged(f"{name} is missing") from None
            if actual[0] != expected[0]:
                raise Damaged(f"{name} has {actual[0]} bytes instead of {expected[0]}")
            if actual != expected:
                raise Damaged(f"{name} has changed since it was written")
    except BucketError:
        raise  # no answer says nothing about the checkpoint
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{CHECKSUMS}: {one_line(error, 300)}") from error
    return True


@contextlib.contextmanager
def _damage_unless(verified: bool):
    # With every byte as it was written, a failure has another cause (memory, say) and must not discard a checkpoint.
    try:
        yield
    except Exception as error:
        if verified or isinstance(error, BucketError):
            raise
        raise Damaged(one_line(error, 300)) from error


def _stored(folder: epath.Path) -> dict[Path, Any]:
    if not folder.exists():
        return {}
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        leaves = flat(handler.metadata(folder).tree)
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}


def _read(folder: epath.Path, wanted: Mapping[Path, Any]) -> dict[Path, jax.Array]:
    if not wanted:
        return {}
    here = jnp.zeros(()).sharding
    target = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)
        for path, leaf in wanted.items()
    }
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        return flat(reader.restore(folder, args=ocp.args.StandardRestore(nested(target))))


def _require_same(
    folder: epath.Path, stored: Mapping[str, dict], wanted: Mapping[str, dict], converts=lambda stored, wanted: False
) -> None:
    def show(leaf) -> str:
        return "nothing" if leaf is None else f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"

    differences, converted = [], set()
    for item in wanted:
        for path in sorted(stored[item].keys() | wanted[item].keys()):
            has, needs = stored[item].get(path), wanted[item].get(path)
            if show(has) == show(needs):
                continue
            if has is not None and needs is not None and has.shape == needs.shape and converts(has.dtype, needs.dtype):
                converted.add(f"from {has.dtype} as {needs.dtype}")
            else:
                differences.append(f"{'/'.join((item, *path))}: found {show(has)}, wanted {show(needs)}")
    if differences:
        if (more := len(differences) - MOST_NAMED) > 0:
            differences[MOST_NAMED:] = [f"and {more} more"]
        remedy = "Use the config that it was written with, or another folder."
        raise ValueError(f"The checkpoint {folder} is of another model: {'; '.join(differences)}. {remedy}")
    if converted:
        log.info("Arrays of %s are read %s.", folder, " and ".join(sorted(converted)))
