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
from softmask_jax.convert import tiny_dream
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.distributed import sharding
from softmask_jax.training import loop

pytestmark = pytest.mark.full


def float32_dream(folder):
    """A tiny Dream in float32, in Hugging Face's format."""
    tiny_dream.make(folder, conversations=40)
    path = folder / "hf" / "model.safetensors"
    tensors = {name: value.astype(np.float32) for name, value in load_file(path).items()}
    assert {value.dtype for value in load_file(path).values()} == {np.dtype(ml_dtypes.bfloat16)}
    save_file(tensors, path)
    described = json.loads((folder / "hf" / "config.json").read_text()) | {"torch_dtype": "float32"}
    (folder / "hf" / "config.json").write_text(json.dumps(described))
    return folder / "hf"


def fine_tuned(folder, hf):
    """A run of a few steps, with a learning rate that changes the logits."""
    assert convert([f"--src={hf}", f"--dst={folder / 'model'}"]) == 0
    settings = config.load("configs/dream7b.py:smoke", [
        f"model.base={folder / 'model'}", "model.param_dtype=float32", "model.compute_dtype=float32",
        f"data.paths=jsonl:{folder / 'chats.jsonl'}", f"data.cache_dir={folder / 'cache'}",
        "optimizer.learning_rate=0.02", "train.global_batch_size=2", "train.micro_batches=1", "sample.count=0",
        "sample.every=0",
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
    hf = float32_dream(tmp_path)
    run, adapter = fine_tuned(tmp_path, hf), tmp_path / "adapter"
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
