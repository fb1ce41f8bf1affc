"""The two-pass objective against recorded per-token NLL and every gradient; where gradients stop."""
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.diffusion.objective import Noisy
from softmask_jax.diffusion.soft_masking import SoftMask
from tests.golden import load
from tests.helpers import golden_model, torch_weights

RECORDED = "mdlm_dit/nll_grad.npz"
CASES = {"single": ("none", 1), "sm_k1": ("topk", 1), "sm_k3": ("topk", 3), "sm_temp": ("full", 3)}


@functools.cache
def recorded():
    return load(RECORDED)


SOFT = SoftMask("topk", 3)


def noisy_batch() -> Noisy:
    x0, xt = (jnp.asarray(recorded()[name], jnp.int32) for name in ("x0", "xt"))
    return Nelbo(SOFT).noisy(x0, xt, jnp.asarray(recorded()["t"]), golden_model.MASK)


@functools.cache
def nll_and_gradient(case: str):
    variant, k = CASES[case]
    model, soft_mask, noisy = golden_model.model(variant), SoftMask(variant, k), noisy_batch()

    def loss(params):
        feedback = two_pass.feedback_if(True, model, soft_mask, params, noisy)
        weighted = two_pass.token_nll(model, soft_mask, params, noisy, feedback) * noisy.weights
        return weighted.sum(-1).mean(), weighted * noisy.x0.shape[1]

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(golden_model.params())


@pytest.mark.parametrize("case", CASES)
def test_nll_and_every_gradient_match_the_recording(case):
    z = recorded()
    (loss, nll), grads = nll_and_gradient(case)
    np.testing.assert_allclose(nll, z[f"{case}/nll_per_token"], rtol=2e-5, atol=2e-4)
    np.testing.assert_allclose(loss, z[f"{case}/loss"], rtol=1e-5)
    ours = torch_weights.to_torch(jax.tree.map(np.asarray, grads), golden_model.VOCAB)
    wanted = {key.removeprefix(f"{case}/grad/"): z[key] for key in z if key.startswith(f"{case}/grad/")}
    assert wanted.keys() == ours.keys()
    for name, gradient in wanted.items():  # where PyTorch had none it is recorded as zeros
        np.testing.assert_allclose(ours[name], gradient, atol=1e-4 * np.abs(gradient).max(), rtol=0, err_msg=name)


def test_no_gradient_passes_through_pass_1():
    model, noisy = golden_model.model(), noisy_batch()
    x = jnp.asarray(recorded()["xt"], jnp.int32)
    params = golden_model.params()
    grads = jax.jit(jax.grad(lambda p: sum(f.sum() for f in two_pass.pass_1(model, SOFT, p, x)[1:3])))(params)
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, params))
    assert np.any(noisy.xt == golden_model.MASK)


def test_scale_zero_is_plain_mdlm_bit_for_bit():
    model, xt = golden_model.model(), noisy_batch().xt

    def closed_and_plain(params):
        feedback = two_pass.pass_1(model, SOFT, params, xt)
        return two_pass.soft_embed(model, SOFT, params, xt, feedback, 0.0), model.embed(params["backbone"], xt)

    np.testing.assert_array_equal(*jax.jit(closed_and_plain)(golden_model.params()))


def test_a_rows_noise_does_not_depend_on_the_rows_beside_it():
    tokens = jnp.arange(8 * 16, dtype=jnp.int32).reshape(8, 16) % 90
    draw = functools.partial(Nelbo(SOFT).draw, root_key=jax.random.key(3), step=5, mask_token_id=97)
    whole = draw(tokens, jnp.arange(8), 8)
    some = jnp.asarray([6, 1, 3])
    part = draw(tokens[some], some, 8)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[some], whole), part)


def test_the_nelbo_is_an_unbiased_sum_over_t_for_a_model_with_a_known_answer():
    """A head of zeros predicts every token but the mask alike, so the bound is L log(V - 1) whatever the masks."""
    model, params = golden_model.model(), golden_model.params()
    head = jax.tree.map(jnp.zeros_like, params["backbone"]["head"])
    params = params | {"backbone": params["backbone"] | {"head": head}}
    rows = jnp.arange(512)
    tokens = jnp.zeros((512, 16), jnp.int32)
    noisy = Nelbo(SOFT).draw(tokens, rows, 512, jax.random.key(0), 0, mask_token_id=97)
    bound, few = (np.log(97.0) * noisy.weights).sum(-1), jax.tree.map(lambda x: x[:4], noisy)
    scores = jax.jit(lambda params: two_pass.row_scores(model, SoftMask(), params, few))(params)
    np.testing.assert_allclose(scores.loss["one_pass"], bound[:4], rtol=1e-5)
    assert abs(float(bound.mean()) - np.log(97.0)) < 0.25
