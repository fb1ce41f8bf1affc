"""Prompts and settings as they come, and errors that say what to do."""
import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.diffusion import soft_masking
from softmask_jax.samplers import SoftMask, diffusion_generate, soft_mask_from
from softmask_jax.samplers.dream_generate import pad_left
from tests.helpers.dream_denoiser import PAD, model, params

SETTINGS = {
    "transparency_alg": "mixinputs_with_topk", "transparency_scale": 0.8984375, "transparency_centre": -3.0,
    "transparency_steepness": 1.5, "mixinputs_k": 3, "mixture_temp": 0.80078125, "transparency_scheduling": "linear",
}  # fmt: skip


def test_settings_are_taken_as_effective_values():
    spec, raw = soft_mask_from(SETTINGS)
    assert spec == SoftMask("topk", 3, "linear")
    np.testing.assert_allclose(soft_masking.effective(raw), [0.8984375, -3.0, 1.5, 0.80078125], rtol=3e-7)


def test_settings_without_soft_masking_need_no_scalars():
    assert soft_mask_from({}) == (SoftMask(), None) == soft_mask_from({**SETTINGS, "transparency_alg": "none"})
    full = {key: SETTINGS[key] for key in SETTINGS if key not in ("mixinputs_k", "transparency_scheduling")}
    assert soft_mask_from({**full, "transparency_alg": "mixinputs_with_temp"})[0] == SoftMask("full", 1, "none")


@pytest.mark.parametrize("change, says", [
    ({"transparency_algorithm": "none"}, "Unknown soft-masking settings transparency_algorithm"),
    ({"transparency_alg": "topk"}, "choose one of mixinputs_with_topk"),
    ({"transparency_scale": None, "mixinputs_k": None}, "lack transparency_scale, mixinputs_k"),
    ({"transparency_scheduling": "cosine"}, "choose one of none, linear, stepwise"),
    ({"transparency_centre": 0.0}, "centre must be below 0"), ({"mixinputs_k": 0}, "at least 1 token"),
    ({"mixinputs_k": "3"}, "mixinputs_k is '3'"), ({"mixinputs_k": 2.5}, "mixinputs_k"),
    ({"mixinputs_k": True}, "mixinputs_k"),
    ({"mixture_temp": "nan"}, "mixture_temp is 'nan', which is no number"), ({"transparency_scale": True}, "no number"),
    ({"transparency_alg": ["none"]}, "transparency_alg"), ({"mixture_temp": 0}, "temperature must be above 0"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        soft_mask_from({**SETTINGS, **change})


def test_prompts_are_padded_on_the_left_to_a_multiple():
    tokens, mask = pad_left([[1, 2, 3], [4]], PAD, 4)
    np.testing.assert_array_equal(tokens, [[PAD, 1, 2, 3], [PAD, PAD, PAD, 4]])
    np.testing.assert_array_equal(mask, [[0, 1, 1, 1], [0, 0, 0, 1]])


def generate(prompts, key=None, weights=None, **options):
    options = {"max_new_tokens": 4, "pad_token_id": PAD, "steps": 2, "alg": "entropy", **options}
    return diffusion_generate(model(), weights or params(), prompts, key, **options)


def test_prompts_of_many_lengths_share_a_compiled_program():
    once = dataclasses.replace(model(), trunk=chex.assert_max_traces(model().trunk, n=1))
    for prompt in ([1, 2, 3], [4], [5] * 7):
        diffusion_generate(once, params(), [prompt, [9]], max_new_tokens=4, pad_token_id=PAD, steps=2, alg="entropy",
                           pad_multiple=8)


@pytest.mark.parametrize("prompts, options, says", [
    ([[1], []], {}, "Prompt 1 is empty"), ([], {}, "no prompts"), ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
    ([[1, 2, 3]], {"max_length": 6}, "7 positions; 6 are allowed"), ([[1]], {"alg": "best"}, "choose one of origin"),
    ([[1, 2]], {"attention_mask": [[1, 0]]}, "0 for padding on the left"), ([[1]], {"temperature": 1.0}, "pass keys"),
    ([[1, 2]], {"attention_mask": [[0, 0]]}, "a token in every row"),
    ([[1, 2]], {"attention_mask": [1, 1]}, "the prompts' shape"),
])  # fmt: skip
def test_prompts_and_options_that_do_not_fit_are_refused(prompts, options, says):
    with pytest.raises(ValueError, match=says):
        generate(prompts, **options)


def test_nan_logits_are_reported():
    weights = {**params(), "backbone": {**params()["backbone"], "final_norm": {"scale": jnp.full(64, jnp.nan)}}}
    with pytest.raises(FloatingPointError, match="NaN or infinite in row 0"):
        generate([[1, 2]], weights=weights)


def test_settings_replace_the_scalars_of_the_checkpoint():
    spec, raw = soft_mask_from(SETTINGS)
    by_settings = generate([[1, 2, 3]], soft_mask=SETTINGS)
    by_checkpoint = generate([[1, 2, 3]], weights={**params(), "soft_mask": raw}, soft_mask=spec)
    np.testing.assert_array_equal(by_settings.history, by_checkpoint.history)
