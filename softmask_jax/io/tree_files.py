"""Trees of arrays and checksums of one checkpoint's folder: what `checkpoint.py` and readers of models share.

A tree is stored under plain nested keys (a NamedTuple's field, a list's index, a dict's key), so its structure is the
reader's: it is read into whatever tree has the same paths. Orbax does the arrays, on any mesh.
"""
import contextlib
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
from jax.experimental import multihost_utils

from softmask_jax.io.files import DISK_FULL, write_atomically
from softmask_jax.io.stored_arrays import check_values, literal

TREES = ("params", "ema", "optimizer")
CHECKSUMS = "checksums.json"
# Orbax touches these after the checksums are taken; they hold times and no data.
UNCHECKED = {CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt"}
MOST_NAMED = 12

# Orbax prints the traceback of every background error; `Checkpoints` raises each once, in one line.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or record.levelno > logging.ERROR)

Path = tuple[str, ...]

log = logging.getLogger(__name__)


class Damaged(Exception):
    """A checkpoint's files are not what was written; the message names the file."""


def flat(tree) -> dict[Path, Any]:
    """The leaves of any pytree by their path; empty nodes and None vanish."""
    return {tuple(_name(key) for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def nested(leaves: Mapping[Path, Any]) -> dict:
    """Nested dicts of the leaves of `flat`."""
    tree: dict = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def storable(state) -> dict[str, dict]:
    """The trees of a train state, or of a dict with names in TREES, as nested dicts of arrays; without the empty ones.

    Raises:
      ValueError: a dict with other names.
    """
    if not isinstance(state, Mapping):
        state = {"params": state.params, "ema": state.ema, "optimizer": state.opt_state}
    if unknown := sorted(set(state) - set(TREES)):
        raise ValueError(f"A checkpoint holds {', '.join(TREES)}; got {', '.join(unknown)}.")
    # Orbax copies JAX's arrays before a save returns; the caller may change numpy's while they are written.
    trees = {
        name: {path: leaf if isinstance(leaf, jax.Array) else np.array(leaf) for path, leaf in flat(tree).items()}
        for name, tree in state.items()
    }
    return {name: nested(leaves) for name, leaves in trees.items() if leaves}


def write_checksums(folder: os.PathLike, known: Mapping[str, list[int]] | None = None) -> None:
    """Record size and CRC-32 of every file below a checkpoint's folder in its checksums.json.

    known: those of some files, by their name in the folder, as they were in memory; they are not read again.
    """
    folder = literal(folder)
    names = sorted(os.path.relpath(os.path.join(at, f), folder) for at, _, files in os.walk(folder) for f in files)
    known = known or {}
    files = {name: known.get(name) or _checksum(folder / name) for name in names if name not in UNCHECKED}
    write_atomically(folder / CHECKSUMS, json.dumps({"crc32": _own_checksum(files), "files": files}))


def verify(folder: os.PathLike, items: Sequence[str] | None = None) -> bool:
    """Compare a checkpoint's files with its checksums; the first process reads, all get its verdict.

    Args:
      folder: of one checkpoint.
      items: only these of its sub-folders; None for all.

    Returns:
      False if there are no checksums to compare with.

    Raises:
      Damaged: a file is missing, unreadable or changed.
    """
    verdict, problem = 0, ""
    if jax.process_index() == 0:
        try:
            verdict = int(_compare(literal(folder), items))
        except Damaged as damage:
            verdict, problem = 2, str(damage)
    if jax.process_count() > 1:
        verdict = int(multihost_utils.broadcast_one_to_all(np.int32(verdict)))
    if verdict == 2:
        raise Damaged(problem or "found by the first process")
    return bool(verdict)


def read_trees(
    folder: os.PathLike, items: Sequence[str], abstract: Mapping[str, Any] | None = None, *, narrow: bool = False
) -> dict:
    """Read trees of a checkpoint, or of any folder that holds Orbax trees of these names, such as a converted model.

    Floating-point arrays are read into a wider dtype, with the same values, if `abstract` wants it: a run that trained
    in bfloat16 goes on in float32.

    Args:
      folder: holds the sub-folders `items`.
      items: which of them.
      abstract: trees by item with shape, dtype and sharding, as for `Checkpoints.restore_latest`; an item that is not
        in it is read as it was saved, as nested dicts of arrays on the default device.
      narrow: read floating-point arrays into narrower dtypes, too, rounded.

    Returns:
      Trees by item; an item that the folder lacks is None if it is not in `abstract`, unless it is `params`.

    Raises:
      FileNotFoundError: no `params` in the folder.
      ValueError: keys, shapes or dtypes differ from `abstract`; they are named.
      Damaged: see `verify`; without checksums, also what Orbax cannot read.
    """

    def converts(has, needs) -> bool:
        floats = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (has, needs))
        return floats and (narrow or jnp.promote_types(has, needs) == needs)

    folder, abstract = literal(folder), abstract or {}
    verified = verify(folder, items)
    if "params" in items and not (folder / "params").exists():
        raise FileNotFoundError(f"No params in {folder}; give the folder of a checkpoint or of a converted model.")
    with _damage_unless(verified):
        found = {item: _stored(folder / item) for item in items}
    wanted = {item: flat(abstract[item]) if item in abstract else found[item] for item in items}
    if absent := [item for item in items if wanted[item] and not found[item] and not verified]:
        raise Damaged(f"{', '.join(absent)} missing, and no {CHECKSUMS}")
    _require_same(folder, found, wanted, converts)
    with _damage_unless(verified):
        leaves = {item: _read(folder / item, wanted[item]) for item in items}
    trees = {}
    for item in items:
        if item in abstract:
            structure = jax.tree.structure(abstract[item])
            trees[item] = jax.tree.unflatten(structure, [leaves[item][path] for path in wanted[item]])
        else:
            trees[item] = nested(leaves[item]) or None
    return trees


def read_back(folder: os.PathLike, trees: Mapping[str, dict], data: Mapping | None = None) -> None:
    """Raise ValueError, one line, unless a folder just written can be restored: structure, shapes, dtypes and chunks.

    Args:
      trees: nested dicts by item, of leaves with shape and dtype, as they were saved.
      data: the cursor and metrics, if there are some.
    """
    folder = literal(folder)
    try:
        for item, tree in trees.items():
            _require_same(folder, {item: _stored(folder / item)}, {item: flat(tree)})
            check_values(folder / item)
        if data is not None and read_json(folder, verified=True) != data:
            raise ValueError("data has changed")
    except Exception as error:
        raise ValueError(f"what was written cannot be read back: {one_line(error)}") from error


def read_json(folder: os.PathLike, verified: bool) -> dict:
    """The cursor and metrics of a checkpoint: {"cursor": {...}, "metrics": {...}}."""
    with _damage_unless(verified):
        stored = ocp.JsonCheckpointHandler().restore(literal(folder) / "data")
        return {"cursor": stored["cursor"], "metrics": stored["metrics"]}


def one_line(error: BaseException) -> str:
    """The first line of an error's text, shortened."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first if len(first) <= 300 else first[:300] + "..."


def disk_full(error: BaseException | None) -> int | None:
    """The errno, if an error or what it came from says that a disk, quota or file-size limit is full."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        for code in DISK_FULL:
            # tensorstore's errors carry the text only.
            if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                return code
        error = error.__cause__ or error.__context__
    return None


def _name(key) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _checksum(path: epath.Path) -> list[int]:
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _own_checksum(files: Mapping[str, list[int]]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def _compare(folder: epath.Path, items: Sequence[str] | None) -> bool:
    if not (folder / CHECKSUMS).exists():
        return False
    try:
        recorded = json.loads((folder / CHECKSUMS).read_text("utf-8"))
        if _own_checksum(recorded["files"]) != recorded["crc32"]:
            raise Damaged(f"{CHECKSUMS} has changed since it was written")
        for name, expected in recorded["files"].items():
            if items is not None and name.split("/")[0] not in items:
                continue
            if not (folder / name).exists():
                raise Damaged(f"{name} is missing")
            actual = _checksum(folder / name)
            if actual[0] != expected[0]:
                raise Damaged(f"{name} has {actual[0]} bytes instead of {expected[0]}")
            if actual != expected:
                raise Damaged(f"{name} has changed since it was written")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{CHECKSUMS}: {one_line(error)}") from error
    return True


@contextlib.contextmanager
def _damage_unless(verified: bool):
    # With every byte as it was written, a failure has another cause (memory, say) and must not discard a checkpoint.
    try:
        yield
    except Exception as error:
        if verified:
            raise
        raise Damaged(one_line(error)) from error


def _stored(folder: epath.Path) -> dict[Path, Any]:
    if not folder.exists():
        return {}
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        found = flat(handler.metadata(folder).tree)
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in found.items()}


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
    folder: epath.Path, found: Mapping[str, dict], wanted: Mapping[str, dict], converts: Callable = lambda has, needs: False
) -> None:  # fmt: skip
    def show(leaf) -> str:
        return "nothing" if leaf is None else f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"

    differences, converted = [], set()
    for item in wanted:
        for path in sorted(found[item].keys() | wanted[item].keys()):
            has, needs = found[item].get(path), wanted[item].get(path)
            if show(has) == show(needs):
                continue
            if has is not None and needs is not None and has.shape == needs.shape and converts(has.dtype, needs.dtype):
                converted.add(f"from {has.dtype} as {needs.dtype}")
            else:
                differences.append(f"{'/'.join((item, *path))}: found {show(has)}, wanted {show(needs)}")
    if differences:
        more = f"; and {len(differences) - MOST_NAMED} more" if len(differences) > MOST_NAMED else ""
        raise ValueError(
            f"The checkpoint {folder} is of another model: {'; '.join(differences[:MOST_NAMED])}{more}. "
            "Use the config that it was written with, or another folder."
        )
    if converted:
        log.info("Arrays of %s are read %s.", folder, " and ".join(sorted(converted)))
