"""The likelihood's bound: exact against brute force in NumPy over all orders, unbiased, the same in any batch."""
import itertools
import math

import jax
import numpy as np
import pytest

import softmask_jax
from softmask_jax import config
from softmask_jax.data import ByteTokenizer
from softmask_jax.diffusion import soft_masking
from softmask_jax.evaluate.lm_eval.likelihood import Likelihood, Span, key_of, masks
from softmask_jax.models import denoiser
from softmask_jax.samplers import SoftMask
from tests.helpers.tiny_run import settings

MASK = ByteTokenizer.mask_token_id
CONTEXT = [256, 10, 20]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of windows of 16 bytes, far from uniform, whose soft-masking is open."""
    wanted, tokenizer = config.from_dict(settings(tmp_path_factory.mktemp("mdlm"))), ByteTokenizer()
    network = denoiser.build(wanted.model, wanted.soft_mask, vocab_size=258, mask_token_id=MASK)
    params = jax.jit(network.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params["backbone"])
    random = np.random.default_rng(0)
    leaves = [leaf + 0.3 * random.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    params = {"backbone": jax.tree.unflatten(tree, leaves), "soft_mask": params["soft_mask"]}
    return softmask_jax.Model(wanted, tokenizer, network, params, 8)


def log_softmax(z):
    z = np.asarray(z, np.float64)
    return z - z.max(-1, keepdims=True) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))


def plain(model, noisy, _):
    return model.logits(noisy)


def soft(schedule):
    """Two passes, from the formula: the second one reads mixtures of the two likeliest tokens at masks."""

    def logits(model, noisy, scored):
        known = log_softmax(np.where(np.arange(258) == MASK, -np.inf, model.logits(noisy)))
        table = np.asarray(model.denoiser.embedding(model.params["backbone"]), np.float64)
        x = table[noisy]
        values = soft_masking.effective(model.params["soft_mask"])
        for row, place in np.argwhere(noisy == MASK):
            logs = known[row, place]
            logs = logs[np.isfinite(logs)]
            top = np.argsort(-logs)[:2]
            shares = np.exp(logs[top]) / np.exp(logs[top]).sum()
            open_ = 1 / (1 + math.exp(-float(values.steepness) * ((np.exp(logs) * logs).sum() - float(values.centre))))
            weight = float(values.scale) * open_
            weight *= 1.0 if schedule == "none" else (noisy[row] == MASK).sum() / scored
            x[row, place] = (1 - weight) * table[MASK] + weight * shares @ table[top]
        hidden, _ = model.denoiser.trunk(model.params["backbone"], x.astype(np.float32))
        head = model.denoiser.head(model.params["backbone"])
        return np.asarray(hidden) @ np.asarray(head.weight).T[:, :258] + np.asarray(head.bias)[:258]

    return logits


def over_all_orders(model, context, scored, logits) -> float:
    """The mean over orders of the sum of log p, one order after another."""
    count = len(scored)
    sets = [left for size in range(1, count + 1) for left in itertools.combinations(range(count), size)]
    noisy = np.array([[*context, *(MASK if i in left else scored[i] for i in range(count))] for left in sets])
    z = np.where(np.arange(258) == MASK, -np.inf, logits(model, noisy, count))
    logs = dict(zip(sets, log_softmax(z)[:, len(context) :]))
    totals = []
    for order in itertools.permutations(range(count)):
        left, total = set(range(count)), 0.0
        for place in order:
            total += logs[tuple(sorted(left))][place, scored[place]]
            left.remove(place)
        totals.append(total)
    return float(np.mean(totals))


def span(context, scored, *key):
    return Span(np.array([*context, *scored], np.int32), len(context), key_of(*key))


@pytest.mark.parametrize("soft_mask, logits", [
    (SoftMask(), plain),
    (SoftMask("topk", 2), soft("none")),
    (SoftMask("topk", 2, "linear"), soft("linear")),
], ids=["plain", "soft-masked", "scheduled"])
def test_a_short_continuation_s_bound_is_the_mean_over_all_orders(model, soft_mask, logits):
    estimate = Likelihood(model, draws=7, batch_size=8, soft_mask=soft_mask)
    asked = [span(CONTEXT, scored) for scored in ([7], [65, 66], [7, 200, 7])]
    found = dict(estimate(asked))
    for index, one in enumerate(asked):
        scored = one.tokens[one.start :].tolist()
        assert found[index] == pytest.approx(over_all_orders(model, CONTEXT, scored, logits), rel=2e-5)
    assert len(set(found.values())) == 3


def test_the_model_s_own_soft_masking_is_the_default(model):
    asked = [span(CONTEXT, [65, 66])]
    own, same, none = (
        dict(Likelihood(model, draws=3, batch_size=8, soft_mask=soft_mask)(asked))[0]
        for soft_mask in (None, SoftMask("topk", 2), SoftMask())
    )
    assert own == same and abs(own - none) > 1e-3


def test_one_token_s_bound_is_its_log_probability(model):
    z = np.asarray(model.logits(np.array([[*CONTEXT, MASK]])))[0, 3]
    logs = log_softmax(np.where(np.arange(258) == MASK, -np.inf, z))
    (_, found), = Likelihood(model, draws=1, batch_size=8, soft_mask=SoftMask())([span(CONTEXT, [42])])
    assert found == pytest.approx(logs[42], rel=1e-5)


@pytest.mark.parametrize("count, draws", [(3, 2), (4, 6), (5, 3), (9, 8)])
def test_draws_are_unbiased_and_their_masks_never_empty(count, draws):
    # Any number for every set of masks, in place of a network's log-probabilities.
    value = np.random.default_rng(count).standard_normal(2**count)
    bits = 1 << np.arange(count)

    def estimate(masked, weights):
        assert masked.any(1).all() and len(masked) == len(weights)
        return float((weights * value[(masked * bits).sum(1)]).sum())

    exact = estimate(*masks(count, 2**count, 0, 0))
    found = np.array([estimate(*masks(count, draws, 0, key)) for key in range(4_000)])
    assert abs(found.mean() - exact) < 4 * found.std() / math.sqrt(len(found))


def test_sizes_of_masks_are_stratified():
    for key in range(20):
        masked, weights = masks(8, 16, 0, key)
        sizes = masked.sum(1)
        assert np.bincount(sizes, minlength=9)[1:].tolist() == [2] * 8
        np.testing.assert_allclose(weights, 8 / (sizes * 16))


def test_masks_depend_on_seed_and_key_alone():
    same = [masks(9, 4, 1, key_of("a", 2))[0].tobytes() for _ in range(2)]
    others = [masks(9, 4, seed, key)[0].tobytes() for seed, key in ((2, key_of("a", 2)), (1, key_of("a", 3)))]
    assert same[0] == same[1] and same[0] not in others


def test_the_rows_beside_a_span_and_the_batch_change_nothing(model):
    random = np.random.default_rng(1)
    asked = [span(CONTEXT, random.integers(0, 256, count).tolist(), count) for count in (6, 2, 9, 0, 13, 1)]
    together = dict(Likelihood(model, draws=5, batch_size=8)(asked))
    assert set(together) == set(range(6)) and together[3] == 0.0
    for size in (3, 8):
        for index, one in enumerate(asked):
            (_, alone), = Likelihood(model, draws=5, batch_size=size)([one])
            assert alone == pytest.approx(together[index], rel=1e-5)


def test_padding_changes_nothing(model):
    # Both lengths are padded to the model's own, which is more of it where the model is longer.
    longer = config.from_dict({**model.config.to_dict(), "data": {**model.config.to_dict()["data"], "seq_len": 64}})
    longer = softmask_jax.Model(longer, model.tokenizer, model.denoiser, model.params, 8)
    asked = [span(CONTEXT, [1, 2, 3, 4, 5])]
    short, long = (dict(Likelihood(one, draws=5, batch_size=8)(asked))[0] for one in (model, longer))
    assert short == pytest.approx(long, rel=1e-5)


def test_what_has_no_likelihood_is_one_line(model):
    with pytest.raises(ValueError, match="17 tokens is longer than the model's 16 positions"):
        list(Likelihood(model)([span(CONTEXT, [1] * 14)]))
    broken = softmask_jax.Model(
        model.config, model.tokenizer, model.denoiser, jax.tree.map(lambda x: x * np.nan, model.params), 8
    )
    with pytest.raises(ValueError, match="NaN or infinite"):
        list(Likelihood(broken, draws=5)([span(CONTEXT, [1, 2, 3, 4, 5])]))
