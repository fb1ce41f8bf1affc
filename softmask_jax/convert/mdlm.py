"""MDLM's and soft-masked MDLM's PyTorch weights to and from our parameter tree, by a table of keys. Numpy only.

The left side of the table is our path, the right side the key in the references' `state_dict` (`kuleshov-group/mdlm`,
`IBM/soft-masked-diffusion-language-models`). Every key must be accounted for and every shape must fit, in both
directions; all problems are reported at once.

Letters: D width, V vocabulary, N blocks, F MLP width, C conditioning width.
"""
from collections.abc import Iterator, Mapping

import numpy as np

from softmask_jax.convert.key_tables import Entry, keys, misshapen, padded
from softmask_jax.convert.wrappers import own_keys

ROPE_BASE = 1e4
INVERSE_FREQUENCIES = "backbone.rotary_emb.inv_freq"
OWN_KEYS = own_keys(r"backbone\.(?:vocab_embed|sigma_map|rotary_emb|blocks|output_layer)", "tran_head")

BACKBONE = (
    Entry("embed/table", "backbone.vocab_embed.embedding", "vocabulary", ("V", "D")),
    Entry("sigma_map/in/kernel", "backbone.sigma_map.mlp.0.weight", "transpose", ("C", 256)),
    Entry("sigma_map/in/bias", "backbone.sigma_map.mlp.0.bias", "none", ("C",)),
    Entry("sigma_map/out/kernel", "backbone.sigma_map.mlp.2.weight", "transpose", ("C", "C")),
    Entry("sigma_map/out/bias", "backbone.sigma_map.mlp.2.bias", "none", ("C",)),
    Entry("blocks/norm1/scale", "backbone.blocks.{i}.norm1.weight", "none", ("D",)),
    Entry("blocks/qkv/kernel", "backbone.blocks.{i}.attn_qkv.weight", "transpose", ("3D", "D")),
    Entry("blocks/attn_out/kernel", "backbone.blocks.{i}.attn_out.weight", "transpose", ("D", "D")),
    Entry("blocks/norm2/scale", "backbone.blocks.{i}.norm2.weight", "none", ("D",)),
    Entry("blocks/mlp_in/kernel", "backbone.blocks.{i}.mlp.0.weight", "transpose", ("F", "D")),
    Entry("blocks/mlp_in/bias", "backbone.blocks.{i}.mlp.0.bias", "none", ("F",)),
    Entry("blocks/mlp_out/kernel", "backbone.blocks.{i}.mlp.2.weight", "transpose", ("D", "F")),
    Entry("blocks/mlp_out/bias", "backbone.blocks.{i}.mlp.2.bias", "none", ("D",)),
    Entry("blocks/adaln/kernel", "backbone.blocks.{i}.adaLN_modulation.weight", "transpose", ("6D", "C")),
    Entry("blocks/adaln/bias", "backbone.blocks.{i}.adaLN_modulation.bias", "none", ("6D",)),
    Entry("final/norm/scale", "backbone.output_layer.norm_final.weight", "none", ("D",)),
    Entry("final/adaln/kernel", "backbone.output_layer.adaLN_modulation.weight", "transpose", ("2D", "C")),
    Entry("final/adaln/bias", "backbone.output_layer.adaLN_modulation.bias", "none", ("2D",)),
    Entry("head/weight", "backbone.output_layer.linear.weight", "vocabulary", ("V", "D")),
    Entry("head/bias", "backbone.output_layer.linear.bias", "vocabulary", ("V",)),
)
SOFT_MASK = (
    Entry("raw_scale", "tran_head.raw_scale", "none", ()),
    Entry("raw_centre", "tran_head.raw_centre_neg", "none", ()),
    Entry("raw_steepness", "tran_head.raw_steep", "none", ()),
    Entry("raw_temperature", "tran_head.raw_temperature", "none", ()),
)


def from_torch(state: Mapping[str, np.ndarray], num_blocks: int) -> dict:
    """A reference `state_dict` as numpy arrays -> {"backbone": tree, "soft_mask": scalars}, float32 numpy arrays.

    The soft-masking scalars may be absent, all four together; the result then has no "soft_mask". The rotary buffer
    is recognised and left out. ValueError naming every missing, unexpected and misshapen key.
    """
    state = {key: np.asarray(value) for key, value in state.items() if key != INVERSE_FREQUENCIES}
    soft = SOFT_MASK if any(entry.key in state for entry in SOFT_MASK) else ()
    expected = {key: entry for entry in (*BACKBONE, *soft) for _, key in keys(entry, num_blocks)}
    problems = [f"missing: {key}" for key in expected if key not in state]
    problems += [f"unexpected: {key}" for key in state if key not in expected]
    present = {key: (entry, state[key].shape) for key, entry in expected.items() if key in state}
    problems += misshapen(present)
    if problems:
        raise ValueError(f"These weights are not an MDLM of {num_blocks} blocks:\n  " + "\n  ".join(problems))

    def ours(entry: Entry) -> np.ndarray:
        tensors = [_to_ours(state[key].astype(np.float32), entry.change) for _, key in keys(entry, num_blocks)]
        return np.stack(tensors) if "{i}" in entry.key else tensors[0]

    params = {"backbone": _nest({entry.path: ours(entry) for entry in BACKBONE})}
    if soft:
        params["soft_mask"] = {entry.path: ours(entry) for entry in soft}
    return params


def to_torch(params: Mapping, vocab_size: int, *, num_heads: int | None = None) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: our parameters -> a reference `state_dict` of float32 numpy arrays, pad rows cut.

    "soft_mask" may be absent. With num_heads the rotary buffer is written too: the reference loads strictly and wants
    it. ValueError naming every missing, unexpected and misshapen path.
    """
    soft = SOFT_MASK if "soft_mask" in params else ()
    paths = {f"backbone/{entry.path}": entry for entry in BACKBONE} | {f"soft_mask/{e.path}": e for e in soft}
    leaves = {path: np.asarray(leaf) for path, leaf in _leaves(params)}
    problems = [f"missing: {path}" for path in paths if path not in leaves]
    problems += [f"unexpected: {path}" for path in leaves if path not in paths]
    state, shaped = {}, {}
    for path, entry in paths.items():
        if path not in leaves:
            continue
        stacked = leaves[path] if "{i}" in entry.key else leaves[path][None]
        for i, key in keys(entry, len(stacked)):
            state[key] = _to_theirs(stacked[i], entry.change, vocab_size)
            shaped[f"{path}, as {key}"] = (entry, state[key].shape)
    depths = {path: len(leaves[path]) for path, entry in paths.items() if path in leaves and "{i}" in entry.key}
    if len(set(depths.values())) > 1:
        problems.append(f"different numbers of blocks: {depths}")
    problems += misshapen(shaped, {"V": vocab_size})
    if problems:
        raise ValueError("These parameters are not a DiT's:\n  " + "\n  ".join(problems))
    if num_heads is not None:
        state[INVERSE_FREQUENCIES] = inverse_frequencies(leaves["backbone/embed/table"].shape[1] // num_heads)
    return state


def inverse_frequencies(head_width: int) -> np.ndarray:
    """The rotary buffer [head_width / 2] float32, bit for bit as the reference computes it."""
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return (1.0 / np.float32(ROPE_BASE) ** exponents).astype(np.float32)


def _to_ours(tensor: np.ndarray, change: str) -> np.ndarray:
    if change == "transpose":
        return np.ascontiguousarray(tensor.T)
    if change == "vocabulary":
        return np.pad(tensor, [(0, padded(len(tensor)) - len(tensor))] + [(0, 0)] * (tensor.ndim - 1))
    return tensor


def _to_theirs(tensor: np.ndarray, change: str, vocab_size: int) -> np.ndarray:
    if change == "transpose":
        return np.ascontiguousarray(tensor.T)
    return tensor[:vocab_size].copy() if change == "vocabulary" else tensor.copy()


def _nest(flat: Mapping[str, np.ndarray]) -> dict:
    tree: dict = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def _leaves(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from _leaves(node, f"{prefix}{name}/")
        else:
            yield prefix + name, node
