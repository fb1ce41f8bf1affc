"""The scorer compiled ahead of time for TPU chips, without any: GPT-2-large fits, and logits of all tokens never exist."""
import re

import jax
import jax.numpy as jnp
import pytest

from softmask_jax.compile.topology import Topology
from softmask_jax.distributed import sharding
from softmask_jax.evaluate.generative.scorer import compiled
from softmask_jax.models.nn import gpt2

pytestmark = pytest.mark.soak
ROWS, LENGTH, VOCAB = 16, 1024, 50_257


@pytest.mark.parametrize("chips, dtype, most", [(1, "float32", 5.5), (4, "bfloat16", 2.0)])
def test_gpt2_large_scores_texts_on_chips_of_16_gib(chips, dtype, most):
    pytest.importorskip("libtpu")
    topology = Topology("v5e:2x2")
    mesh = sharding.make_mesh(chips, devices=topology.devices()[:chips])
    config = gpt2.GPT2Config(VOCAB, 1280, 36, 20, LENGTH, 5120, compute_dtype=dtype)
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), gpt2.shapes(config))
    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for shape in ((ROWS, LENGTH), (ROWS,)))
    program = compiled(config, mesh).lower(params, tokens, lengths).compile()
    memory = program.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    # 3.1 or 1.5 GB of weights on every chip; most of the rest are scores of attention, which the rows share out.
    assert 1.4 * 2**30 < used < most * 2**30 < topology.memory
    assert memory.temp_size_in_bytes < ROWS // chips * LENGTH * VOCAB * 4
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", program.as_text())}
    assert not [dims for dims in shapes if len(dims) > 2 and dims[-1] >= VOCAB]
