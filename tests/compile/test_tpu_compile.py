"""The train step compiled ahead of time for four TPU chips, without any: memory, layout and what it never holds."""
import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from softmask_jax import config
from softmask_jax.distributed import sharding
from softmask_jax.models import denoiser
from softmask_jax.training import optimizer, train_state, train_step

pytestmark = pytest.mark.full

# libtpu reads these when it is loaded: without them it looks for a real machine.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# L is long for this D, so that the tables [V D] are smaller than a quarter of the logits [B L V] of one chip.
B, L, V, D = 8, 256, 32_000, 64
MESHES = {"data": (4, 1, 1), "fsdp": (1, 4, 1), "data and tensor": (2, 1, 2)}
# What the partitioner says when it has to gather an array whole to lay it out anew.
REPLICATED = "Involuntary full rematerialization"
REMAT = {"data": "none", "fsdp": "full", "data and tensor": "none"}


@functools.cache
def topology():
    from jax.experimental import topologies

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")


@functools.cache
def compiled(layout: str):
    """(program, state as shapes with shardings, elements of [B L V] on one chip)."""
    data, fsdp, tensor = MESHES[layout]
    mesh = sharding.make_mesh(data, fsdp, tensor, devices=topology().devices)
    c = config.Config(
        model=config.Model(hidden_size=D, num_blocks=2, num_heads=2, cond_dim=16, remat=REMAT[layout]),
        train=config.Train(steps=1000, global_batch_size=B),
    )
    model = denoiser.build(c.model, c.soft_mask, vocab_size=V - 5, mask_token_id=V - 6, mesh=mesh)
    tx = optimizer.make(c.optimizer, c.train.steps)
    state, rows = train_state.abstract(model, tx, mesh), sharding.batch_sharding(mesh)
    batch = {
        "tokens": jax.ShapeDtypeStruct((B, L), jnp.int32, sharding=rows),
        "rows": jax.ShapeDtypeStruct((B,), jnp.int32, sharding=rows),
    }
    key = jax.eval_shape(jax.random.key, 0)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    step = jax.jit(train_step.make(c, model, tx).train_step, donate_argnums=0)
    return step.lower(state, batch, key).compile(), state, B // (data * fsdp) * L * V // tensor


def largest(program) -> int:
    """Elements of the largest array in an optimised program."""
    shapes = re.findall(r"\b[a-z]+\d+[a-z0-9]*\[([\d,]+)\]", program.as_text())
    return max(int(np.prod([int(n) for n in shape.split(",")], dtype=np.int64)) for shape in shapes)


def bytes_per_chip(state) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )


@pytest.mark.parametrize("layout", MESHES)
def test_the_step_compiles_for_tpu_and_no_chip_holds_a_quarter_of_the_logits(layout, capfd):
    program, _, logits = compiled(layout)
    assert largest(program) < logits // 4
    assert program.memory_analysis().temp_size_in_bytes < 4 * logits
    assert REPLICATED not in capfd.readouterr().err


@pytest.mark.parametrize("layout", MESHES)
def test_the_state_is_updated_in_place(layout):
    program, state, _ = compiled(layout)
    memory, own = program.memory_analysis(), bytes_per_chip(state)
    # Small arrays are padded to the chip's tiles.
    assert own <= memory.alias_size_in_bytes <= memory.argument_size_in_bytes < 1.3 * own + 2**20


def test_fsdp_cuts_the_state_of_a_chip_to_a_quarter():
    whole, cut = (compiled(layout)[0].memory_analysis().argument_size_in_bytes for layout in ("data", "fsdp"))
    assert cut < 0.35 * whole


def test_an_array_gathered_whole_to_be_laid_out_anew_is_reported(capfd):
    mesh = sharding.make_mesh(2, 2, devices=topology().devices)

    def turn(x):
        return jax.lax.with_sharding_constraint(2 * x.reshape(4, 6, 8), NamedSharding(mesh, P(None, "fsdp", "data")))

    x = jax.ShapeDtypeStruct((24, 8), jnp.float32, sharding=sharding.batch_sharding(mesh))
    jax.jit(turn).lower(x).compile()
    assert REPLICATED in capfd.readouterr().err


def test_a_dense_loss_is_found_by_the_same_search():
    mesh = sharding.make_mesh(4, devices=topology().devices)
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    def loss(hidden, weight):
        return jax.nn.log_softmax(jnp.einsum("bld,vd->blv", hidden, weight)).max(-1).sum()

    hidden = jax.ShapeDtypeStruct((B, L, D), jnp.bfloat16, sharding=rows)
    weight = jax.ShapeDtypeStruct((V, D), jnp.bfloat16, sharding=everywhere)
    program = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, weight).compile()
    assert largest(program) >= compiled("data")[2] // 4
