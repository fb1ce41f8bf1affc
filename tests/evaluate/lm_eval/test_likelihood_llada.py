"""LLaDA's likelihoods against the recorded estimates of its reference."""
import dataclasses
import math

import numpy as np
import pytest

import softmask_jax
from softmask_jax.evaluate.lm_eval.likelihood import Likelihood, Span
from softmask_jax.evaluate.lm_eval.masks import llada_masks, spread_masks
from softmask_jax.samplers import SoftMask
from tests.golden import load, meta
from tests.helpers import llada_model
from tests.helpers.llada_samplers import SCALARS

RECORDED = "llada/likelihood.npz"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = softmask_jax.load(llada_model.converted("tiny", tmp_path_factory.mktemp("llada") / "tiny"))
    return dataclasses.replace(model, params=model.params | {"soft_mask": SCALARS})


@pytest.mark.parametrize("case", ["cfg0", "cfg1.5", "one_token"])
def test_the_estimate_is_the_recorded_one_for_its_draws(model, case):
    z = {name.removeprefix(f"{case}/"): x for name, x in load(RECORDED).items() if name.startswith(f"{case}/")}
    settings = meta(RECORDED)["cases"][case]
    masked, weights = spread_masks(z["k"], z["perms"])
    start, text = len(z["prompt"]), np.concatenate([z["prompt"], z["answer"]]).astype(np.int32)
    noisy = z["noisy"].reshape(-1, len(text))
    np.testing.assert_array_equal(masked, (noisy == model.mask_token_id)[:, start:])
    np.testing.assert_allclose(1 / (weights * settings["mc_num"]), z["p_mask"].reshape(-1), rtol=1e-6)
    estimate = Likelihood(model, settings["mc_num"], settings["batch_size"], soft_mask=SoftMask(),
                          cfg_scale=settings["cfg_scale"], masks=lambda *_: (masked, weights))  # fmt: skip
    (_, value), = estimate([Span(text, start, 0)])
    assert value == pytest.approx(float(z["value"]), rel=1e-5)


@pytest.mark.parametrize("count, draws, sizes", [(1, 128, [1]), (16, 16, range(1, 17)), (7, 4, None), (40, 128, None)])
def test_masks_are_spread_over_all_sizes_and_unbiased(count, draws, sizes):
    masked, weights = llada_masks(count, draws, 0, 5)
    assert len(masked) == len(weights) == (1 if count == 1 else draws) and masked.any(1).all()
    np.testing.assert_allclose(weights, count / (masked.sum(1) * len(masked)))
    if sizes:
        assert sorted(masked.sum(1)) == sorted(sizes)
    # The expected value of any token's share is 1 / count of the whole: the estimate of a constant is that constant.
    assert (weights * masked.sum(1)).sum() == pytest.approx(count)
    again = llada_masks(count, draws, 0, 5)
    np.testing.assert_array_equal(masked, again[0])
    assert count < 3 or (llada_masks(count, draws, 1, 5)[0] != masked).any()


def test_with_soft_masking_and_guidance_a_row_s_neighbours_change_nothing(model):
    random, estimate = np.random.default_rng(0), Likelihood(
        model, 4, 3, soft_mask=SoftMask("topk", 2), cfg_scale=0.5, masks=llada_masks)  # fmt: skip
    spans = [Span(random.integers(0, 280, size).astype(np.int32), 4, size) for size in (9, 5, 12)]
    together = dict(estimate(spans))
    plain = dict(Likelihood(model, 4, 3, soft_mask=SoftMask(), cfg_scale=0.5, masks=llada_masks)(spans))
    for index, span in enumerate(spans):
        (_, alone), = estimate([span])
        assert alone == pytest.approx(together[index], rel=1e-5) and math.isfinite(alone)
        assert abs(plain[index] - alone) > 1e-4
