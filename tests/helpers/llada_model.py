"""The small recorded LLaDAs as denoisers, shared by the parity tests."""
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from softmask_jax import config
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.models import denoiser, families
from softmask_jax.models.nn import dream, llada_config
from tests.golden import FOLDER

FILES = (
    "llada/tiny/config.json", "llada/tiny/generation_config.json", "llada/tiny/model.safetensors",
    "llada/tiny_bf16/config.json", "llada/tiny_bf16/generation_config.json", "llada/tiny_bf16/model.safetensors",
    "llada/tiny_gqa_sharded/config.json", "llada/tiny_gqa_sharded/generation_config.json",
    "llada/tiny_gqa_sharded/model-00001-of-00004.safetensors",
    "llada/tiny_gqa_sharded/model-00002-of-00004.safetensors",
    "llada/tiny_gqa_sharded/model-00003-of-00004.safetensors",
    "llada/tiny_gqa_sharded/model-00004-of-00004.safetensors",
    "llada/tiny_gqa_sharded/model.safetensors.index.json",
    "llada/tiny_tied/config.json", "llada/tiny_tied/generation_config.json", "llada/tiny_tied/model.safetensors",
)  # fmt: skip
NAMES = ("tiny", "tiny_gqa_sharded", "tiny_tied", "tiny_bf16")


def config_json(name: str = "tiny") -> dict:
    return json.loads((FOLDER / f"llada/{name}/config.json").read_text())


def folder(name: str, into: Path) -> Path:
    """A copy of a recorded folder in Hugging Face's format."""
    into.mkdir(parents=True)
    for file in FILES:
        if file.startswith(f"llada/{name}/"):
            (into / Path(file).name).write_bytes((FOLDER / file).read_bytes())
    return into


def converted(name: str, into: Path) -> Path:
    """A recorded model, converted."""
    assert convert([f"--src={FOLDER / 'llada' / name}", f"--dst={into}", "--verify"]) == 0
    return into


@functools.cache
def model(name: str = "tiny", **changes) -> denoiser.Denoiser:
    """The denoiser in float32."""
    settings = config.Model(**{"kind": "llada", "base": name, "compute_dtype": "float32"} | changes)
    return families.of("llada").build(settings, config.SoftMask("topk", 1), {"hf_config": config_json(name)})


def logits(name: str, params: dict, x: jax.Array, **layout) -> jax.Array:
    """Logits [B L V] of embeddings [B L D]."""
    network = model(name)
    head = network.head(params["backbone"])
    hidden = network.trunk(params["backbone"], x, **layout)[0]
    return jnp.matmul(hidden, head.weight.T, precision="highest")[..., : head.vocab_size]


def llada_config_of(name: str) -> dream.DreamConfig:
    """The network in float32."""
    return llada_config.from_hf(config_json(name))
