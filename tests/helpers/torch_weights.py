"""A reference MDLM's `state_dict` in memory to and from our parameter trees, by the converter's own tables."""
from collections.abc import Mapping

import jax
import numpy as np

from softmask_jax.convert import mdlm
from softmask_jax.convert.key_tables import Spec, below, keys, match, padded
from softmask_jax.models.keys import Entry, SOFT_MASK, dit

ENTRIES = below("backbone", dit.BACKBONE) + below("soft_mask", SOFT_MASK)


def _table(has_scalars: bool) -> tuple[Entry, ...]:
    return ENTRIES if has_scalars else ENTRIES[: len(dit.BACKBONE)]


def _check(state: Mapping[str, np.ndarray], num_blocks: int, sizes: Mapping[str, int] | None = None) -> tuple[Entry, ...]:
    table = _table(any(entry.key in state for entry in SOFT_MASK))
    match(table, {key: Spec(a.dtype, a.shape) for key, a in state.items()}, num_blocks, "an MDLM", sizes)
    return table


def from_torch(state: Mapping[str, np.ndarray], num_blocks: int) -> dict:
    """{"backbone": tree, "soft_mask": scalars, if the state has some}, float32. ValueError names every wrong key."""
    state = {key: np.asarray(value) for key, value in state.items() if key != mdlm.INVERSE_FREQUENCIES}
    tree: dict = {}
    for entry in _check(state, num_blocks):
        tensors = np.stack([state[key].astype(np.float32) for _, key in keys(entry, num_blocks)])
        if entry.change == "transpose":
            tensors = np.ascontiguousarray(tensors.swapaxes(1, 2))
        elif entry.change == "vocabulary":
            rows = tensors.shape[1]
            tensors = np.pad(tensors, [(0, 0), (0, padded(rows) - rows)] + [(0, 0)] * (tensors.ndim - 2))
        *folders, name = entry.path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = tensors if entry.stacked else tensors[0]
    return tree


def to_torch(params: Mapping, vocab_size: int, *, num_heads: int | None = None) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`; with `num_heads` the rotary buffer is written too."""
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
              for path, leaf in jax.tree.leaves_with_path(params)}  # fmt: skip
    table, state = _table("soft_mask" in params), {}
    assert set(leaves) == {entry.path for entry in table}
    num_blocks = len(leaves["backbone/blocks/norm1/scale"])
    for entry in table:
        for i, key in keys(entry, num_blocks):
            tensor = leaves[entry.path][i] if entry.stacked else leaves[entry.path]
            tensor = tensor.T if entry.change == "transpose" else tensor
            state[key] = np.array(tensor[:vocab_size] if entry.change == "vocabulary" else tensor, order="C")
    _check(state, num_blocks, {"V": vocab_size})
    if num_heads is not None:
        width = leaves["backbone/embed/table"].shape[1]
        state[mdlm.INVERSE_FREQUENCIES] = mdlm.inverse_frequencies(width // num_heads)
    return state
