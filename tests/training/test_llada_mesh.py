"""LLaDA's step on a mesh: the same losses and gradients, tied heads and grouped heads included."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax import config
from softmask_jax.diffusion.llada_loss import LLaDALoss
from softmask_jax.diffusion.response_loss import example_coins
from softmask_jax.distributed import sharding
from softmask_jax.models import families
from softmask_jax.training import optimizer, train_state
from softmask_jax.training.train_step import TrainStep
from tests.helpers import llada_model
from tests.helpers.trees import assert_trees_close
from tests.training.test_dream_mesh import KEY, batch


def build(name, adapter, mesh=None):
    model = config.Model(kind="llada", base="-", compute_dtype="float32", remat="mlp", adapter=adapter, adapter_rank=4)
    about = {"hf_config": llada_model.config_json(name)}
    return families.of("llada").build(model, config.SoftMask(k=1, init_scale=0.7), about, mesh=mesh)


def gradients(model, given, at):
    step = TrainStep(model, None, LLaDALoss(), 0.5, 2, 0.0)
    noisy = step.objective.draw(given, KEY, mask_token_id=model.mask_token_id)
    return step.accumulate(at, noisy, example_coins(KEY, given["index"], 0.5))[0]


@pytest.mark.full
@pytest.mark.parametrize("name, adapter", [("tiny_tied", "none"), ("tiny_tied", "dora"), ("tiny_gqa_sharded", "dora")])
def test_losses_and_gradients_are_the_same_on_a_mesh(name, adapter):
    plain, tx = build(name, adapter), optimizer.make(config.from_dict({}).optimizer, 10)
    mesh = sharding.make_mesh(2, 2, devices=jax.devices()[:4])
    params = plain.init(jax.random.key(0, impl="threefry2x32"))
    state = train_state.fresh(params, tx, plain.frozen)
    expected_loss, expected = jax.jit(functools.partial(gradients, plain))(jax.tree.map(jnp.asarray, batch()), state)
    model = build(name, adapter, mesh)
    layout = jax.tree.map(lambda s: s.sharding, train_state.abstract(model, tx, mesh))
    placed = jax.device_put(state, layout)
    loss, grads = jax.jit(functools.partial(gradients, model))(sharding.global_batch(batch(), mesh), placed)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_trees_close(grads, expected, 1e-4)
    if adapter == "none":
        assert np.abs(grads["backbone"]["embed"]["table"]).max() > 0
