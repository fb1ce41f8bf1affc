"""Dream's step on meshes of eight devices: the same losses and gradients, its tables cut by rows of the vocabulary."""
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax import config
from softmask_jax.config.sections import Model, SoftMask
from softmask_jax.diffusion.dream_loss import DreamLoss
from softmask_jax.diffusion.response_loss import example_coins
from softmask_jax.diffusion.soft_masking import init_scalars
from softmask_jax.distributed import sharding
from softmask_jax.models import dream_denoiser
from softmask_jax.training import train_state
from softmask_jax.training.optimizer import make
from softmask_jax.training.train_step import TrainStep
from tests.helpers import dream_model
from tests.helpers.trees import assert_trees_close

MODEL = Model(kind="dream", base="-", compute_dtype="float32", remat="full", adapter="dora")
KEY = jax.random.key(3)


def batch(rows: int = 8, length: int = 24) -> dict:
    random = np.random.default_rng(0)
    column = {"prompt_lengths": 4, "real_lengths": 18, "lengths": 24}
    found = {name: np.full(rows, value, np.int32) for name, value in column.items()}
    found |= {"tokens": random.integers(0, 190, (rows, length), np.int32), "index": np.arange(rows, dtype=np.int32)}
    return found | {"segment_ids": np.ones((rows, length), np.int32), "rows": np.arange(rows, dtype=np.int32)}


def build(mesh=None, **changes):
    model = dataclasses.replace(MODEL, **changes)
    return dream_denoiser.build(model, SoftMask(k=1), dream_model.config_json(), mesh=mesh)


def state(model) -> train_state.TrainState:
    params = {
        "backbone": dream_model.params() | {"adapter": dream_model.adapter()},
        "soft_mask": init_scalars(0.7, -2.0, 2.0),
    }
    return train_state.fresh(params, make(config.from_dict({}).optimizer, 10), model.frozen)


def gradients(model, given, at):
    step = TrainStep(model, None, DreamLoss(), 0.5, 2, 0.0)
    noisy = step.objective.draw(given, KEY, mask_token_id=model.mask_token_id)
    return step.accumulate(at, noisy, example_coins(KEY, given["index"], 0.5))


@functools.cache
def alone():
    model = build()
    return jax.jit(functools.partial(gradients, model))(jax.tree.map(jnp.asarray, batch()), state(model))


# data, fsdp, tensor, sequence, slices
@pytest.mark.full
@pytest.mark.parametrize("sizes", [(1, 4, 1, 1, 1), *(pytest.param(sizes, marks=pytest.mark.full) for sizes in (
    (2, 2, 1, 1, 1), (1, 2, 2, 1, 1), (1, 1, 1, 4, 1), (1, 2, 1, 2, 1), (1, 1, 2, 2, 1), (2, 1, 1, 1, 2), (1, 2, 1, 1, 4)
))])  # fmt: skip
def test_losses_and_gradients_are_the_same_on_every_mesh(sizes):
    mesh = sharding.make_mesh(*sizes[:3], devices=jax.devices()[: int(np.prod(sizes))], sequence=sizes[3], dcn_data=sizes[4])
    model = build(mesh)
    layout = jax.tree.map(lambda s: s.sharding, train_state.abstract(model, make(config.from_dict({}).optimizer, 10), mesh))
    placed = jax.device_put(state(model), layout)
    (loss, grads), sums = jax.jit(functools.partial(gradients, model))(sharding.global_batch(batch(), mesh), placed)
    (expected_loss, expected), expected_sums = alone()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_trees_close(grads, expected, 1e-4)
    np.testing.assert_array_equal(sums["xent_count"], expected_sums["xent_count"])
    np.testing.assert_allclose(sums["lambda_sum"], expected_sums["lambda_sum"], rtol=1e-4)


def test_without_a_tensor_axis_the_tables_are_cut_by_rows_of_the_vocabulary():
    mesh = sharding.make_mesh(1, 4, 1, devices=jax.devices()[:4])
    model = build(mesh)
    frozen = train_state.abstract(model, make(config.from_dict({}).optimizer, 10), mesh).frozen
    for table in (frozen["embed"]["table"], frozen["head"]["weight"]):
        assert table.sharding.shard_shape(table.shape) == (table.shape[0] // 4, table.shape[1])
    kernel = frozen["layers"]["gate"]["kernel"]
    assert np.prod(kernel.sharding.shard_shape(kernel.shape)) == np.prod(kernel.shape) // 4


@pytest.mark.full
@pytest.mark.parametrize("base_dtype, stored", [("int8", "s8"), ("float", "f32")])
def test_a_frozen_base_is_gathered_as_it_is_stored(base_dtype, stored):
    mesh = sharding.make_mesh(1, 4, 1, devices=jax.devices()[:4])
    model = build(mesh, base_dtype=base_dtype)
    at, rows = train_state.abstract(model, make(config.from_dict({}).optimizer, 10), mesh), sharding.batch_sharding(mesh)
    given = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for name, x in batch().items()}
    text = jax.jit(functools.partial(gradients, model)).lower(given, at).compile().as_text()
    width, hidden = at.frozen["layers"]["up"]["kernel"].shape[1:]
    gathered = re.findall(rf"= (\w+)\[(?:1,)?{width},{hidden}\]\S* all-gather", text)
    # gate and up, in both passes and backwards
    assert set(gathered) == {stored} and len(gathered) == 6
