"""An adapter that was trained here, loaded by PEFT under PyTorch: the same logits. Needs torch, peft and transformers:

    pip install torch peft transformers && python -m pytest tests/convert/test_peft.py -m full
"""
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import softmask_jax
from softmask_jax import config
from softmask_jax.convert import tiny
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.distributed import sharding
from softmask_jax.training import loop

pytestmark = pytest.mark.full


def float32(folder, family):
    """A tiny model in float32, in Hugging Face's format."""
    tiny.make(folder, family=family, conversations=40)
    path = folder / "hf" / "model.safetensors"
    tensors = {name: value.astype(np.float32) for name, value in load_file(path).items()}
    assert {value.dtype for value in load_file(path).values()} == {np.dtype(ml_dtypes.bfloat16)}
    save_file(tensors, path)
    described = json.loads((folder / "hf" / "config.json").read_text()) | {"torch_dtype": "float32"}
    (folder / "hf" / "config.json").write_text(json.dumps(described))
    return folder / "hf"


def fine_tuned(folder, hf, recipe, *more):
    """A run of a few steps, with a learning rate that changes the logits."""
    assert convert([f"--src={hf}", f"--dst={folder / 'model'}"]) == 0
    settings = config.load(f"configs/{recipe}.py:smoke", [
        f"model.base={folder / 'model'}", "model.param_dtype=float32", "model.compute_dtype=float32",
        f"data.paths=jsonl:{folder / 'chats.jsonl'}", f"data.cache_dir={folder / 'cache'}",
        "optimizer.learning_rate=0.02", "train.global_batch_size=2", "train.micro_batches=1", "sample.count=0",
        "sample.every=0", *more,
    ])  # fmt: skip
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.sharding, "make_mesh", lambda **_: mesh)
        loop.train(settings, str(folder / "run"))
    return folder / "run"


def test_peft_loads_an_exported_adapter_and_gives_the_same_logits(tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    hf = float32(tmp_path, "dream")
    run, adapter = fine_tuned(tmp_path, hf, "dream7b"), tmp_path / "adapter"
    assert convert([f"--src={run}", f"--dst={adapter}", "--to=hf"]) == 0
    tokens = np.random.default_rng(0).integers(0, 250, (2, 32))
    ours, base = (np.asarray(softmask_jax.load(path).logits(tokens)) for path in (run, tmp_path / "model"))

    # Dream is Qwen2 without a causal mask.
    described = json.loads((hf / "config.json").read_text()) | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    network = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**described)).eval()
    weights = {name: torch.from_numpy(value) for name, value in load_file(hf / "model.safetensors").items()}
    network.load_state_dict(weights)
    everything = torch.zeros(2, 1, 32, 32)
    with torch.no_grad():
        plain = network(torch.from_numpy(tokens), attention_mask=everything).logits.numpy()
        adapted = peft.PeftModel.from_pretrained(network, str(adapter)).eval()
        theirs = adapted(torch.from_numpy(tokens), attention_mask=everything).logits.numpy()
    np.testing.assert_allclose(base, plain, atol=2e-5)
    assert np.abs(theirs - plain).max() > 1e-2
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def llada_in_torch(torch, transformers, about):
    """LLaDA under PyTorch with the published names of its modules."""
    nn, width, hidden, heads = torch.nn, about["d_model"], about["mlp_hidden_size"], about["n_heads"]
    functional, rows = nn.functional, about["embedding_size"]

    def linear(fan_in, fan_out):
        return nn.Linear(fan_in, fan_out, bias=False)

    def rotated(x):
        length, size = x.shape[-2:]
        frequencies = about["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(length)[:, None] * frequencies
        (low, high), cos, sin = x.chunk(2, -1), angles.cos(), angles.sin()
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_norm, self.ff_norm = (nn.RMSNorm(width, about["rms_norm_eps"]) for _ in range(2))
            self.q_proj, self.k_proj, self.v_proj, self.attn_out = (linear(width, width) for _ in range(4))
            self.ff_proj, self.up_proj, self.ff_out = linear(width, hidden), linear(width, hidden), linear(hidden, width)

        def forward(self, x):
            h = self.attn_norm(x)
            q, k, v = (p(h).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            mixed = functional.scaled_dot_product_attention(rotated(q), rotated(k), v)
            x = x + self.attn_out(mixed.transpose(1, 2).flatten(2))
            h = self.ff_norm(x)
            return x + self.ff_out(functional.silu(self.ff_proj(h)) * self.up_proj(h))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.model = transformers.PretrainedConfig(**about), nn.Module()
            self.model.transformer = nn.ModuleDict({
                "wte": nn.Embedding(rows, width), "ln_f": nn.RMSNorm(width, about["rms_norm_eps"]),
                "blocks": nn.ModuleList(Block() for _ in range(about["n_layers"])), "ff_out": linear(width, rows),
            })  # fmt: skip

        def prepare_inputs_for_generation(self, *_, **__):
            """PEFT asks for it."""

        def forward(self, input_ids, **_):
            parts = self.model.transformer
            x = parts.wte(input_ids)
            for block in parts.blocks:
                x = block(x)
            return parts.ff_out(parts.ln_f(x))

    return Network().eval()


def test_peft_puts_an_adapter_of_all_lladas_products_onto_the_layers_and_not_onto_the_head(tmp_path):
    torch = pytest.importorskip("torch")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    hf = float32(tmp_path, "llada")
    targets = "model.adapter_targets=^(q|k|v|o|gate|up|down)$"
    run, adapter = fine_tuned(tmp_path, hf, "llada8b", targets), tmp_path / "adapter"
    assert convert([f"--src={run}", f"--dst={adapter}", "--to=hf"]) == 0
    tokens = np.random.default_rng(0).integers(0, 250, (2, 32))
    ours, base = (np.asarray(softmask_jax.load(path).logits(tokens)) for path in (run, tmp_path / "model"))
    network = llada_in_torch(torch, transformers, json.loads((hf / "config.json").read_text()))
    weights = {name: torch.from_numpy(value) for name, value in load_file(hf / "model.safetensors").items()}
    network.load_state_dict(weights)
    with torch.no_grad():
        plain = network(torch.from_numpy(tokens)).numpy()
        adapted = peft.PeftModel.from_pretrained(network, str(adapter)).eval()
        theirs = adapted(input_ids=torch.from_numpy(tokens)).numpy()
    names = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert names and all(".transformer.blocks." in name for name in names)
    np.testing.assert_allclose(base, plain, atol=2e-5)
    assert np.abs(theirs - plain).max() > 1e-2
    np.testing.assert_allclose(ours, theirs, atol=5e-5)
