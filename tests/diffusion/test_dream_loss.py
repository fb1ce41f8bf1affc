"""Dream's loss: by hand in numpy, against recorded two-pass gradients, the same in every bucket and batch."""
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.diffusion import soft_masking, two_pass
from softmask_jax.diffusion.dream_loss import DreamLoss
from softmask_jax.diffusion.response_loss import example_coins
from softmask_jax.diffusion.objective import Noisy
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.diffusion.vocab import head as vocab_head
from softmask_jax.models import denoiser
from softmask_jax.models.nn import dream
from softmask_jax.training.train_state import TrainState
from softmask_jax.training.train_step import TrainStep
from tests.golden import load, meta
from tests.helpers import dream_model, golden_model
from tests.helpers.arrays import made_once

MASK, PAD = golden_model.MASK, 5
KEY = jax.random.key(1231)


@functools.cache
def tiny() -> denoiser.Denoiser:
    """The recorded DiT, its hidden states shifted and its mask not suppressed, as Dream's are."""
    model = golden_model.model()

    def trunk(backbone, x, **options):
        hidden, cache = model.trunk(backbone, x, **options)
        return dream.shift(hidden), cache

    def head(backbone):
        return dataclasses.replace(model.head(backbone), suppress_mask=False)

    return dataclasses.replace(model, trunk=trunk, head=head)


@made_once
def params() -> dict:
    scalars = soft_masking.init_scalars(scale=0.7, centre=-2.0, steepness=2.0)
    return golden_model.params() | {"soft_mask": scalars}


def batch(rows=3, size=32, first=0) -> dict:
    """Examples first, first + 1, ...: their ids, lengths and prompts depend on their number alone."""
    made = {name: [] for name in ("tokens", "prompt_lengths", "real_lengths", "lengths")}
    for index in range(first, first + rows):
        random = np.random.default_rng(index)
        real = int(random.integers(14, 20))
        ids = random.integers(6, 90, real)
        made["tokens"].append(np.pad(ids, (0, size - real), constant_values=PAD))
        made["prompt_lengths"].append(int(random.integers(3, 9)))
        made["real_lengths"].append(real)
        made["lengths"].append(24)
    made = {name: jnp.asarray(np.array(value), jnp.int32) for name, value in made.items()}
    segments = (jnp.arange(size) < made["lengths"][:, None]).astype(jnp.int32)
    return made | {"segment_ids": segments, "index": jnp.arange(first, first + rows)}


@functools.partial(jax.jit, static_argnums=0)
def corrupt(spec, given, **options) -> Noisy:
    return spec.draw(given, KEY, mask_token_id=MASK, **options)


def test_only_the_response_and_the_recipes_pads_are_masked_at_the_rate_of_t():
    spec, given = DreamLoss(), batch(400)
    noisy = corrupt(spec, given)
    place = np.arange(32)
    prompts, lengths, real = (np.asarray(given[n])[:, None] for n in ("prompt_lengths", "lengths", "real_lengths"))
    maskable = (place >= prompts) & (place < lengths)
    assert not (np.asarray(noisy.masked) & ~maskable).any()
    assert (np.asarray(noisy.masked) & (place >= real)).any()
    t = np.asarray(noisy.t)
    assert 0.2 <= t.min() < 0.22 and 0.78 < t.max() <= 0.8
    rate = np.asarray(noisy.masked).sum(1) / maskable.sum(1)
    assert abs(np.mean(rate - (0.999 * t + 0.001))) < 0.01
    np.testing.assert_array_equal(noisy.xt, np.where(noisy.masked, MASK, given["tokens"]))
    without = corrupt(dataclasses.replace(spec, supervise_pads=False), given)
    assert not (np.asarray(without.masked) & (place >= real)).any()


def test_every_row_has_a_mask_even_where_none_was_drawn_and_any_token_may_be_it():
    given = batch(300)
    masked = np.asarray(corrupt(DreamLoss(t_min=1e-6, t_max=1e-6, noise_eps=0.0), given).masked)
    assert (masked.sum(1) == 1).all()
    counts = np.bincount(masked.argmax(1), minlength=32)
    assert (counts[9:24] > 5).all() and not counts[:3].any() and not counts[24:].any()


def test_an_example_is_corrupted_the_same_way_in_every_batch_bucket_and_row():
    spec = DreamLoss()
    whole, alone = corrupt(spec, batch(6)), corrupt(spec, batch(2, 64, first=3))
    np.testing.assert_array_equal(whole.t[3:5], alone.t)
    np.testing.assert_array_equal(whole.xt[3:5], alone.xt[:, :32])
    assert not alone.masked[:, 32:].any()
    flips = example_coins(KEY, jnp.arange(200), 0.5)
    np.testing.assert_array_equal(flips[50:60], example_coins(KEY, jnp.arange(50, 60), 0.5))
    assert 70 < int(flips.sum()) < 130
    assert not np.array_equal(corrupt(spec, batch(6), epoch=1).xt, whole.xt)


def test_the_first_epoch_has_the_draws_recorded_when_there_was_no_other():
    noisy = corrupt(DreamLoss(), batch(3), epoch=jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(noisy.t, np.float32([0.5474199652671814, 0.7112565040588379, 0.43710198998451233]))
    masked = ["".join(map(str, row)) for row in np.asarray(noisy.masked, int)[:, :24]]
    assert masked == ["000000101000011110111010", "000000011111011011010110", "000011000010011100100111"]
    flips = example_coins(KEY, jnp.arange(40), 0.5, epoch=jnp.zeros(40, jnp.int32))
    assert "".join(map(str, np.asarray(flips, int))) == "0110000011110001010001111101100010011011"


def test_t_of_a_batch_is_that_of_its_first_row_and_validation_t_is_evenly_spaced():
    row, one = corrupt(DreamLoss(), batch(4)), corrupt(DreamLoss(t_per="batch"), batch(4))
    assert len(set(np.asarray(row.t).tolist())) == 4
    np.testing.assert_array_equal(one.t, np.full(4, row.t[0]))
    t = DreamLoss().validation_t(jnp.asarray([0, 3, 6]), 7)
    np.testing.assert_allclose(t, [0.2, 0.5, 0.8], rtol=1e-6)


@functools.cache
def logits():
    """Of the noisy `batch()`, shifted: [B L V] float64."""
    backbone, noisy = params()["backbone"], corrupt(DreamLoss(), batch())

    @jax.jit
    def run(backbone):
        x = tiny().embed(backbone, noisy.xt)
        return tiny().trunk(backbone, x, segment_ids=noisy.segment_ids)[0]

    head = tiny().head(backbone)
    return np.asarray(run(backbone) @ head.weight.T + head.bias, np.float64)[..., : head.vocab_size]


@functools.partial(jax.jit, static_argnums=0)
def compiled_losses(spec, values, noisy, scale):
    feedback = two_pass.feedback_if(True, tiny(), spec.soft_mask, values, noisy)
    return (two_pass.token_nll(tiny(), spec.soft_mask, values, noisy, feedback, scale) * noisy.weights).sum(-1)


def row_losses(variant="topk", weighting="time", scale=1.0):
    noisy = corrupt(DreamLoss(weighting=weighting), batch())
    return np.asarray(compiled_losses(DreamLoss(SoftMask(variant)), params(), noisy, scale))


@pytest.mark.parametrize("weighting", ["time", "context_adaptive"])
def test_the_loss_of_a_row_is_its_weighted_mean_over_masks_as_computed_by_hand(weighting):
    noisy, given = corrupt(DreamLoss(), batch()), batch()
    log_p = logits() - np.log(np.exp(logits()).sum(-1, keepdims=True))  # the mask is a token as any other
    expected = []
    for row in range(3):
        masked, terms = np.flatnonzero(noisy.masked[row]), []
        for place in masked:
            weight = 1 / float(noisy.t[row])
            if weighting == "context_adaptive":
                known = [j for j in range(int(given["lengths"][row])) if j not in masked]
                weight = sum(0.5 * 0.1 * 0.9 ** (abs(place - j) - 1) for j in known)
            terms.append(-weight * log_p[row, place, int(given["tokens"][row, place])])
        expected.append(np.mean(terms))
    np.testing.assert_allclose(row_losses("none", weighting), expected, rtol=2e-5)


def test_two_passes_feed_back_the_shifted_prediction_the_mask_among_it():
    spec, noisy, values = DreamLoss(), corrupt(DreamLoss(), batch()), params()

    @jax.jit
    def fed_back(values):
        return two_pass.feedback_if(True, tiny(), spec.soft_mask, values, noisy).token_ids[..., 0]

    masked = np.asarray(noisy.masked)
    np.testing.assert_array_equal(np.asarray(fed_back(values))[masked], logits().argmax(-1)[masked])
    # A head that prefers the mask: it is fed back.
    bias = values["backbone"]["head"]["bias"].at[MASK].add(1e3)
    head = values["backbone"]["head"] | {"bias": bias}
    pushed = values | {"backbone": values["backbone"] | {"head": head}}
    assert (np.asarray(fed_back(pushed))[masked] == MASK).all()
    assert not np.allclose(row_losses(), row_losses("none"))


def test_without_its_coin_a_row_has_the_loss_of_a_single_pass():
    np.testing.assert_allclose(row_losses(scale=0.0), row_losses("none"), rtol=1e-6)


def gradient(model, spec, trainable, noisy, coins, frozen=None, micro_batches=1):
    """(loss, gradient) of the train step."""
    step = TrainStep(model, None, spec, 0.5, micro_batches, 0.0)
    state = TrainState(jnp.int32(0), trainable, trainable["backbone"], (), frozen or {})
    return step.accumulate(state, noisy, coins)[0]


@jax.jit
def compiled_gradient(values, given, coin):
    """(loss, gradient) of one micro-batch as a training step takes them: pass 1 outside the gradient, under its coin."""
    soft_mask, noisy = DreamLoss().soft_mask, corrupt(DreamLoss(), given)
    feedback = two_pass.feedback_if(coin, tiny(), soft_mask, values, noisy)

    def loss(tree):
        nll = two_pass.token_nll(tiny(), soft_mask, tree, noisy, feedback, coin.astype(jnp.float32))
        return (nll * noisy.weights).sum(-1).mean()

    return jax.value_and_grad(loss)(values)


@functools.cache
def gradient_in(size: int, coin: bool):
    return compiled_gradient(params(), batch(1, size, first=1), jnp.asarray(coin))


def close(ours, theirs, tolerance=2e-5, least=1e-3):
    """Trees that are equal up to `tolerance` times the largest entry of a leaf, or `least`."""
    ours, theirs = (jax.tree.map(lambda x, y: x / np.maximum(np.abs(y).max(), least), tree, theirs)
                    for tree in (ours, theirs))
    chex.assert_trees_all_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.full
def test_the_size_of_the_bucket_changes_neither_loss_nor_gradient():
    close(gradient_in(128, True), gradient_in(256, True))


def test_a_single_pass_gives_the_scalars_no_gradient_and_two_passes_do():
    single, double = (gradient_in(128, coin)[1]["soft_mask"] for coin in (False, True))
    assert not any(np.any(leaf) for leaf in single.values())
    assert all(np.any(double[name]) for name in ("raw_scale", "raw_centre", "raw_steepness"))


def test_validation_has_the_same_losses_in_any_batch():
    spec, count = DreamLoss(), 6

    @jax.jit
    def run(given):
        noisy = spec.validation_batch(given, KEY, count, mask_token_id=MASK)
        return two_pass.row_scores(tiny(), spec.soft_mask, params(), noisy).loss

    whole, parts = run(batch(6)), [run(batch(2, 64, first=first)) for first in (0, 2, 4)]
    chex.assert_trees_all_close(whole, jax.tree.map(lambda *x: np.concatenate(x), *parts), rtol=2e-5)
    assert not np.allclose(whole["one_pass"], whole["two_pass"])


@pytest.mark.parametrize(("case", "variant", "k"), [
    ("sm_k1", "topk", 1), pytest.param("sm_k3", "topk", 3, marks=pytest.mark.full),
    pytest.param("single", "none", 1, marks=pytest.mark.full),
    pytest.param("sm_temp", "full", 3, marks=pytest.mark.full),
])  # fmt: skip
def test_loss_and_adapter_gradients_match_dreams_recording(case, variant, k):
    recorded, head = load(dream_model.DORA), meta(dream_model.DORA)["head"]
    spec, base = DreamLoss(SoftMask(variant, k)), dream_model.params()
    config = dream_model.config()
    plain = dream.trunk(config, adapter=dream_model.ADAPTER)

    def trunk(backbone, x, **options):
        hidden, cache = plain(backbone, x, **options)
        return dream.shift(hidden), cache

    model = dataclasses.replace(
        tiny(), trunk=trunk, embed=dream.embed, embedding=dream.embedding, mask_token_id=dream_model.MASK,
        head=lambda backbone: vocab_head.Head(
            backbone["head"]["weight"], None, dream_model.VOCAB, dream_model.MASK, False
        ),
    )  # fmt: skip
    scalars = soft_masking.init_scalars(head["scale"], head["centre"], head["steep"], head["temp"])
    trainable = {"backbone": {"adapter": dream_model.adapter()}, "soft_mask": scalars}
    x0, xt = (jnp.asarray(recorded[name], jnp.int32) for name in ("x0", "input_ids"))
    masked = jnp.asarray(recorded["labels"] != -100)
    # The recording averages over the masks of both rows at once.
    weights = jnp.where(masked, float(recorded["dsigma"]) * len(x0) / masked.sum(), 0.0)
    noisy = Noisy(x0, xt, masked, jnp.full(len(x0), 0.55), weights, jnp.ones_like(x0))

    loss, grads = jax.jit(
        lambda tree: gradient(model, spec, tree, noisy, jnp.asarray([True, True]), frozen=base)
    )(trainable)
    np.testing.assert_allclose(loss, recorded[f"{case}/loss"], rtol=1e-5)
    close(grads["backbone"], {"adapter": dream_model.adapter(f"{case}/grad")}, 1e-4, least=0.0)
    for ours, theirs in {
        "raw_scale": "raw_scale", "raw_centre": "raw_centre_neg", "raw_steepness": "raw_steep",
        "raw_temperature": "raw_temperature",
    }.items():  # fmt: skip
        expected = recorded.get(f"{case}/grad/base_model.model.transparency.{theirs}", 0.0)
        # Another CPU's order of float32 sums changes the temperature's gradient by 1e-4.
        np.testing.assert_allclose(grads["soft_mask"][ours], expected, rtol=5e-4, atol=1e-8)


@pytest.mark.parametrize(("options", "message"), [
    ({"t_min": 0.0}, "0 < t_min"), ({"cart_p": 2.0}, "cart_p"), ({"weighting": "cart"}, "objective.weighting='cart'"),
    ({"t_per": "token"}, "choose row or batch"),
])  # fmt: skip
def test_an_impossible_loss_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        DreamLoss(**options)
