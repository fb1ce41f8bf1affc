"""A random GPT-2 with a byte-level tokenizer, as Hugging Face lays such a folder out, small enough for tests."""
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from softmask_jax.data.tokenizers.ranks import ALPHABET

# "Ġ" is the space; each makes a token of two that are there.
MERGES = ("t h", "th e", "Ġ the", "a s", "m as", "mas k", "Ġ t", "o k", "Ġt ok", "e n", "Ġtok en")
END_OF_TEXT = "<|endoftext|>"


def write(folder: Path, *, seed: int = 0, positions: int = 64, width: int = 16, layers: int = 1, heads: int = 2) -> Path:
    """Writes config.json, model.safetensors, vocab.json and merges.txt into `folder`, which is made; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES), END_OF_TEXT]
    (folder / "vocab.json").write_text(json.dumps({token: id_ for id_, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    config = {
        "model_type": "gpt2", "vocab_size": len(tokens), "n_embd": width, "n_layer": layers, "n_head": heads,
        "n_positions": positions, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(config, seed), folder / "model.safetensors")
    return folder


def weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Random float32 tensors under PyTorch's keys."""
    random, width = np.random.default_rng(seed), config["n_embd"]
    shapes = {"wte.weight": (config["vocab_size"], width), "wpe.weight": (config["n_positions"], width)}
    for i in range(config["n_layer"]):
        for name, fan_in, fan_out in (
            ("attn.c_attn", width, 3 * width), ("attn.c_proj", width, width), ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):  # fmt: skip
            shapes |= {f"h.{i}.{name}.weight": (fan_in, fan_out), f"h.{i}.{name}.bias": (fan_out,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (width,), f"h.{i}.{name}.bias": (width,)}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    found = {name: random.normal(0, 0.2, shape) for name, shape in shapes.items()}
    found = {name: 1 + x if "ln_" in name and name.endswith("weight") else x for name, x in found.items()}
    return {f"transformer.{name}": x.astype(np.float32) for name, x in found.items()}
