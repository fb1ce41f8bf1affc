"""Fine-tuning Dream and LLaDA, as the TPU compiler plans its memory: whole models, and a small one in detail."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.full

# The two-pass step of a small Dream for one chip: a line of Python for each figure that is asserted.
SMALL = r"""
import json, re, sys
from softmask_jax.compile.topology import Topology
devices = Topology("v5e:1x1").devices()
import jax, jax.numpy as jnp
from softmask_jax import config
from softmask_jax.distributed import sharding
from softmask_jax.models import dream_denoiser
from softmask_jax.training import optimizer, train_state, train_step

sizes = {
    "vocab_size": 2048, "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 2048, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "mask_token_id": 2047, "tie_word_embeddings": False,
}
c = config.load("configs/dream7b.py", [f"model.base_dtype={sys.argv[1]}", "train.global_batch_size=1", "train.micro_batches=1"])
mesh = sharding.make_mesh(devices=devices)
model = dream_denoiser.build(c.model, c.soft_mask, sizes, mesh=mesh)
tx = optimizer.make(c.optimizer, c.updates)
state, rows = train_state.abstract(model, tx, mesh), sharding.batch_sharding(mesh)
shapes = dict.fromkeys(("tokens", "segment_ids"), (1, 256))
shapes |= dict.fromkeys(("rows", "epoch", "index", "prompt_lengths", "real_lengths", "lengths"), (1,))
batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name, shape in shapes.items()}
key = jax.eval_shape(jax.random.key, 0)
key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
program = jax.jit(train_step.make(c, model, tx).train_step, donate_argnums=0).lower(state, batch, key).compile()
memory, text = program.memory_analysis(), program.as_text()
layers = state.frozen["layers"]
stacked = {",".join(map(str, leaves["kernel"].shape)) for leaves in layers.values() if "kernel" in leaves}
bits = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
print(json.dumps({
    "layers": bits, "parameters": sum(leaf.size for leaf in jax.tree.leaves(layers)),
    "arguments": memory.argument_size_in_bytes, "temporary": memory.temp_size_in_bytes,
    "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "types": sorted({kind for kind, shape in re.findall(r"\b([a-z]+\d+)\[([\d,]+)\]", text) if shape in stacked}),
}))
"""


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figure(said: str, name: str) -> float:
    """GiB of a chip, from the report's line of this name."""
    found = re.search(rf"^ +{name} +([\d.]+)", said, re.M)
    assert found, said
    return float(found[1])


@pytest.mark.parametrize("variant, words, gib", [
    (":int8", "--topology=v5e:1x1", 15.0),
    *(pytest.param(*case, marks=pytest.mark.soak) for case in (
        (":int8", "--topology=v5e:1x1 --config.data.max_tokens=4096 --config.model.remat=full", 13.9),
        ("", "--topology=v6e:1x1", 20.2),
        ("", "--topology=v6e:1x1 --config.data.max_tokens=4096", 24.8),
        ("", "--topology=v5e:4x4 --config.train.global_batch_size=16", 7.6),
        ("", "--topology=v5e:4x4 --config.train.global_batch_size=16 --config.data.max_tokens=4096", 13.9),
        (":int8", "--topology=v5e:4x4 --config.train.global_batch_size=16 --config.mesh.data=-1 --config.mesh.fsdp=1", 13.3),
    )),
])  # fmt: skip
def test_the_two_pass_step_of_llada_8b_fits(variant, words, gib):
    printed = run("-m", "softmask_jax.compile", f"--config=configs/llada8b.py{variant}", *words.split())
    assert "8,032,882,688 parameters" in printed and figure(printed, "together") < gib


@pytest.mark.parametrize("kernels, variant, topology, gib", [
    pytest.param("bfloat16", "", "v6e:1x1", 20.5, marks=pytest.mark.soak),
    ("int8", ":int8", "v5e:1x1", 14.5),
])  # fmt: skip
def test_the_two_pass_step_of_dream_7b_at_length_2048_fits_one_chip(kernels, variant, topology, gib):
    said = run("-m", "softmask_jax.compile", f"--config=configs/dream7b.py{variant}", f"--topology={topology}", "--length=2048")
    print(said)
    # One row of a micro-batch: what temporary memory there is, all of the chip's state beside it.
    assert "8 rows of 2048 tokens in 8 micro-batches" in said and "7,625,938,432 parameters" in said
    together = figure(said, "together")
    assert figure(said, "temporary") < 6 and figure(said, "arguments") < together < gib


@pytest.mark.parametrize("base_dtype, types", [("float", ["bf16"]), ("int8", ["s8"])])
def test_kernels_are_never_copied_or_turned_as_a_whole_into_another_type(base_dtype, types):
    found = json.loads(run("-c", SMALL, base_dtype).splitlines()[-1])
    # Of the stacked kernels there is one kind of array in the whole program, and no room for a second.
    assert found["types"] == types
    assert found["temporary"] < 0.6 * found["parameters"] and found["output"] < 2**20
    assert found["layers"] / found["parameters"] < (2.02 if base_dtype == "float" else 1.05)
