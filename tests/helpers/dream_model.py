"""The small recorded Dream and its adapter in this package's layout, shared by the parity tests."""
import functools
import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from softmask_jax.models.nn.dora import AdapterConfig
from softmask_jax.models.nn.dream import DreamConfig
from tests.golden import FOLDER, load, meta
from tests.helpers.arrays import made_once

FORWARD, DORA = "dream/forward.npz", "dora/dora.npz"
VOCAB, MASK, LAYERS = 200, 198, 2
CONFIGS = {"tiny": "dream/tiny/config.json", "tiny_bf16": "dream/tiny_bf16/config.json"}
WEIGHTS = {
    "tiny": ["dream/tiny/model.safetensors"],
    "tiny_bf16": ["dream/tiny_bf16/model.safetensors"],
    "tiny_sharded": [
        "dream/tiny_sharded/model-00001-of-00005.safetensors",
        "dream/tiny_sharded/model-00002-of-00005.safetensors",
        "dream/tiny_sharded/model-00003-of-00005.safetensors",
        "dream/tiny_sharded/model-00004-of-00005.safetensors",
        "dream/tiny_sharded/model-00005-of-00005.safetensors",
    ],
}
INDEX = "dream/tiny_sharded/model.safetensors.index.json"


def adapter_config(**changes) -> AdapterConfig:
    """The paper's adapter, changed."""
    return replace(AdapterConfig("dora", 16, 16.0, 0.0, r"^(q|k|v|o)$"), **changes)


ADAPTER = adapter_config(rank=meta(DORA)["r"], alpha=meta(DORA)["alpha"])
TORCH_NAMES = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"}


def config_json(name: str = "tiny") -> dict:
    return json.loads((FOLDER / CONFIGS[name]).read_text())


def config(name: str = "tiny", **overrides) -> DreamConfig:
    """The recorded model, in float32 without rematerialisation unless asked otherwise."""
    defaults = {"param_dtype": "float32", "compute_dtype": "float32", "remat": "none"}
    return DreamConfig.from_hf(config_json(name), **{**defaults, **overrides})


@functools.cache
def tensors(name: str) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint under PyTorch's names, in the dtype they are stored in."""
    found = {}
    for path in WEIGHTS[name]:
        found |= load_file(FOLDER / path)
    return found


def _stacked(torch: dict[str, np.ndarray], name: str, *, transposed: bool = False) -> jnp.ndarray:
    every = [torch[f"model.layers.{i}.{name}"] for i in range(LAYERS)]
    return jnp.asarray(np.stack([one.T if transposed else one for one in every]))


@made_once
def params(name: str = "tiny") -> dict:
    """A checkpoint as `dream.init`'s tree."""
    torch = tensors(name)
    layers = {
        "attn_norm": {"scale": _stacked(torch, "input_layernorm.weight")},
        "mlp_norm": {"scale": _stacked(torch, "post_attention_layernorm.weight")},
    }
    for product in ("q", "k", "v", "o", "gate", "up", "down"):
        block = "self_attn" if product in "qkvo" else "mlp"
        layers[product] = {"kernel": _stacked(torch, f"{block}.{product}_proj.weight", transposed=True)}
        if product in "qkv":
            layers[product]["bias"] = _stacked(torch, f"{block}.{product}_proj.bias")

    def padded(table: np.ndarray) -> jnp.ndarray:
        return jnp.asarray(np.pad(table, ((0, -len(table) % 128), (0, 0))))

    return {
        "embed": {"table": padded(torch["model.embed_tokens.weight"])},
        "layers": layers,
        "final_norm": {"scale": jnp.asarray(torch["model.norm.weight"])},
        "head": {"weight": padded(torch["lm_head.weight"])},
    }


@made_once
def adapter(prefix: str = "param") -> dict:
    """Recorded arrays of the adapter's shape (its values, or a loss's gradients) as `dora.init`'s tree."""
    recorded = load(DORA)

    def one(product: str, ours: str, theirs: str) -> jnp.ndarray:
        name = "{}/base_model.model.model.layers.{}.self_attn.{}_proj.{}.default.weight"
        return jnp.asarray(np.stack([recorded[name.format(prefix, i, product, theirs)].T for i in range(LAYERS)]))

    return {
        "layers": {
            product: {ours: one(product, ours, theirs) for ours, theirs in TORCH_NAMES.items()} for product in "qkvo"
        }
    }


def logits(params: dict, hidden) -> jnp.ndarray:
    """Hidden states [B L D] to logits [B L V], in their dtype."""
    return (hidden @ params["head"]["weight"].T)[..., :VOCAB]
