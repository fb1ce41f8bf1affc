"""Dream's train step: what it draws in each epoch, whoever reads the data; bfloat16 products beside float32."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from softmask_jax import config
from softmask_jax.data.chat.buckets import Buckets, bucket_batches, steps_per_epoch
from softmask_jax.data.chat.sft import Examples
from softmask_jax.diffusion.dream_loss import DreamLoss
from softmask_jax.diffusion.soft_masking import init_scalars
from softmask_jax.models import dream_denoiser
from softmask_jax.training import optimizer, train_state
from softmask_jax.training.train_step import TrainStep
from tests.helpers import dream_model, golden_model

KEY, EXAMPLES = jax.random.key(1231), 400


@functools.cache
def buckets() -> Buckets:
    """Short examples, which all have one bucket."""
    lengths = np.full(EXAMPLES, 40)
    return Buckets(Examples(np.zeros(lengths.sum(), np.uint16), np.stack([40 * np.arange(EXAMPLES), lengths, lengths // 4], 1)), 5, 3)


@functools.cache
def program(spec: DreamLoss):
    model = golden_model.model()

    def draw(batch, key):
        noisy = spec.corrupt(batch, key, 0, mask_token_id=model.mask_token_id)
        return noisy, spec.coins(batch, key, 0, p_sm=0.5, micro_batches=1)

    return jax.jit(draw)


def drawn(spec=DreamLoss(), *, epochs=3, first=0, **options) -> dict[tuple[int, int], tuple]:
    """{(epoch, example): (t, x_t, coin)} of all steps of the epochs, from epoch `first` on."""
    found, size = {}, options.setdefault("global_batch_size", 8)
    steps = steps_per_epoch(buckets(), size)
    with bucket_batches(buckets(), seed=1, start_step=first * steps, **options) as batches:
        for number, batch in enumerate(itertools.islice(batches, (epochs - first) * steps)):
            noisy, coins = jax.device_get(program(spec)(batch, KEY))
            for row, example in enumerate(batch["index"].tolist()):
                found[first + number // steps, example] = noisy.t[row], noisy.xt[row].tobytes(), coins[row]
    return found


@functools.cache
def plain() -> dict:
    return drawn()


def test_over_three_epochs_an_eighth_of_the_examples_has_no_two_passes_at_half_a_chance():
    never = [not any(plain()[epoch, i][2] for epoch in range(3)) for i in range(EXAMPLES)]
    assert abs(np.mean(never) - 0.125) < 4 * np.sqrt(0.125 * 0.875 / EXAMPLES)


def test_every_epoch_draws_other_times_and_masks_for_every_example():
    for part in (0, 1):
        assert all(len({plain()[epoch, i][part] for epoch in range(3)}) == 3 for i in range(EXAMPLES))


def test_noise_that_is_not_fresh_is_the_first_epochs_in_all():
    settings = config.from_dict({"objective": {"fresh_noise": False}, "soft_mask": {"k": 1}})
    fixed = drawn(DreamLoss.from_config(settings))
    assert fixed == {(epoch, i): plain()[0, i] for epoch in range(3) for i in range(EXAMPLES)}


@pytest.mark.parametrize("options", [
    {"global_batch_size": 16}, {"micro_batches": 4}, {"host_count": 2, "host_index": 1}, {"first": 1},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_the_draws_of_an_epoch_do_not_depend_on_batch_micro_batches_hosts_or_where_a_run_continues(options):
    found = drawn(**options)
    assert len(found) == EXAMPLES * (3 - options.get("first", 0)) / options.get("host_count", 1)
    assert found == {which: plain()[which] for which in found}


# Full fine-tuning from a bfloat16 base: four updates, with products in either dtype

RATE, STEPS, MICRO = 1e-4, 4, 4


def rows() -> dict:
    """Eight examples of 24 tokens."""
    made = dict(zip(("prompt_lengths", "real_lengths", "lengths", "epoch"), np.full((4, 8), [[4], [18], [24], [0]], np.int32)))
    made |= {"tokens": np.random.default_rng(0).integers(0, 190, (8, 24), np.int32), "segment_ids": np.ones((8, 24), np.int32)}
    return made | {"index": np.arange(8, dtype=np.int32), "rows": np.arange(8, dtype=np.int32)}


@functools.cache
def traced(compute_dtype: str):
    """States before and after each update, the losses, and the backbone's first gradient."""
    settings = config.Optimizer(learning_rate=RATE, warmup_steps=0, clip_norm=1e9, ema_decay=0.9)
    sizes = config.Model(kind="dream", base="-", param_dtype="bfloat16", compute_dtype=compute_dtype)
    model = dream_denoiser.build(sizes, config.SoftMask(k=1), dream_model.config_json())
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dream_model.params())
    tx = optimizer.make(settings, 100)
    step = TrainStep(model, tx, DreamLoss(), 0.5, MICRO, settings.ema_decay)
    states = [train_state.fresh({"backbone": base, "soft_mask": init_scalars(0.7, -2.0, 2.0)}, tx)]
    update, losses, two_pass = jax.jit(step.train_step), [], []
    for epoch in range(STEPS):
        state, metrics = update(states[-1], rows() | {"epoch": np.full(8, epoch, np.int32)}, KEY)
        states.append(state)
        losses.append(float(metrics.loss))
        two_pass.append(float(metrics.two_pass))
    assert 0 < min(two_pass) and max(two_pass) < 1
    moments = [s.mu for s in jax.tree.leaves(states[1].opt_state, is_leaf=is_adam) if is_adam(s)]
    return states, np.array(losses), jax.tree.map(lambda m: m / (1 - settings.b1), moments[0]["backbone"])


def is_adam(node) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def flattened(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def off(ours, theirs) -> float:
    """Distance of two trees over the length of the second."""
    return np.linalg.norm(flattened(ours) - flattened(theirs)) / np.linalg.norm(flattened(theirs))


@pytest.mark.full
def test_a_bfloat16_trace_of_two_pass_updates_stays_beside_the_float32_one():
    """The yardstick is bfloat16's rounding, 2^-8 of a number: losses within 2, gradients within 5 of it, and updates,
    where Adam makes every gradient as large as another, within 25."""
    (states, losses, gradient), (exact, expected, exact_gradient) = traced("bfloat16"), traced("float32")
    assert {leaf.dtype.name for leaf in jax.tree.leaves((gradient, states[-1].params, states[-1].ema))} == {"float32"}
    np.testing.assert_allclose(losses, expected, rtol=2 * 2**-8)
    assert (losses != expected).all()
    assert off(gradient, exact_gradient) < 5 * 2**-8
    moved, other = (jax.tree.map(jnp.subtract, run[-1].params, run[0].params) for run in (states, exact))
    assert off(moved, other) < 25 * 2**-8


@pytest.mark.full
def test_the_master_weights_of_a_bfloat16_step_move_by_adams_update_to_the_last_bits_of_float32():
    states, _, gradient = traced("bfloat16")
    before, after, g = (flattened(tree) for tree in (states[0].params["backbone"], states[1].params["backbone"], gradient))
    expected = before - RATE * g / (np.abs(g) + 1e-8)
    assert (np.abs(after - expected) <= 2 * np.spacing(np.abs(before).astype(np.float32)) + 1e-5 * RATE).all()
    assert np.mean(after[g != 0] != before[g != 0]) == 1
    # bfloat16 has no such values.
    assert np.mean(np.asarray(after, np.float32).astype(jnp.bfloat16) != after) > 0.9 * np.mean(g != 0)
