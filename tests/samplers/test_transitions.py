"""One step of MDLM's and ReMDM's samplers from recorded predictions, and what transitions refuse."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.diffusion.vocab import head as vocab_head
from softmask_jax.samplers import recorded_gumbel, transitions
from tests.golden import load, meta

FILE = "samplers.npz"
MASK = meta(FILE)["mask_index"]


def transition(case: dict):
    own = {key: case[key] for key in ("eta", "t_on", "t_off", "alpha_on")}
    return {
        "mdlm": lambda: transitions.Mdlm(),
        "remdm-cap": lambda: transitions.RemdmCap(own["eta"]),
        "remdm-rescale": lambda: transitions.RemdmRescale(own["eta"]),
        "remdm-conf": lambda: transitions.RemdmConf(),
        "remdm-loop": lambda: transitions.RemdmLoop(**own),
        "forward-backward": lambda: transitions.ForwardBackward(),
    }[case["sampler"]]()


def inputs(case: dict) -> tuple[np.ndarray, np.ndarray]:
    """(log p of the prediction, x_t)."""
    z, own = load(FILE), "allmask/" if case["name"].startswith("allmask") else ""
    return z[f"{own}log_p_x0"], z[f"{own}x"]


def rates(case: dict, tokens) -> transitions.Rates:
    part = transition(case)
    found = part(np.float32([case["t"]]), case["dt"])
    found = transitions.Rates(*(rate[0] for rate in found))
    if part.by_confidence:
        confidence = -load(FILE)[f"{case['name']}/conf_in"]
        found = transitions.less_sure_first(found, jnp.asarray(confidence, jnp.float32), jnp.asarray(tokens != MASK))
    return found


CASES = meta(FILE)["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_rates_give_the_recorded_law_of_every_step(case):
    z = load(FILE)
    _, tokens = inputs(case)
    recorded = z[f"{case['name']}/q_xs"]
    found = rates(case, tokens)
    masked = np.asarray(tokens) == MASK
    stay, take, remask = (np.broadcast_to(np.asarray(rate, np.float64), tokens.shape) for rate in (
        found.stay, found.take, found.remask))
    # Weights below 0 mean what 0 means: they are never the largest.
    np.testing.assert_allclose(stay[masked], recorded[masked][:, MASK].clip(0), atol=5e-6)
    np.testing.assert_allclose(take[masked], np.delete(recorded[masked], MASK, -1).sum(-1), atol=5e-6)
    if case["sampler"] != "mdlm":
        still = transition(case)(np.float32([case["t"]]), case["dt"]).remask[0] == 0 and case["sampler"] == "remdm-loop"
        if not still:  # there tokens are copied, whatever was recorded of their draw
            np.testing.assert_allclose(remask[~masked], recorded[~masked][:, MASK], atol=5e-6)


@functools.cache
def mover(nucleus_p: float):
    vocab_size = load(FILE)["log_p_x0"].shape[-1]
    head = vocab_head.Head(jnp.eye(128, vocab_size), None, vocab_size, MASK, True)

    def run(rates, log_p, tokens, gumbel):
        sweep = vocab_head.sweep(log_p, head, k=3, draw=vocab_head.Draw(gumbel=gumbel, nucleus_p=nucleus_p))
        own = jnp.take_along_axis(gumbel, tokens[..., None], -1)[..., 0]
        masked = tokens == MASK
        after = transitions.move(
            rates, tokens, masked, ~masked, sweep.drawn, sweep.drawn_score, gumbel[..., MASK], own, mask_token_id=MASK
        )  # fmt: skip
        return after, jnp.exp(sweep.drawn_log_p)

    return jax.jit(run)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_one_step_from_recorded_predictions_and_noise_matches(case):
    z, name = load(FILE), case["name"]
    log_p, tokens = inputs(case)
    gumbel = jnp.asarray(recorded_gumbel(z[f"{name}/u"]), jnp.float32)
    after, confidence = mover(case["p_nucleus"])(rates(case, tokens), log_p, jnp.asarray(tokens, jnp.int32), gumbel)
    np.testing.assert_array_equal(after, z[f"{name}/xs"])
    if f"{name}/conf_out" in z:
        new = (tokens == MASK) & (np.asarray(after) != MASK)
        np.testing.assert_allclose(-np.asarray(confidence)[new], z[f"{name}/conf_out"][new], rtol=1e-5)


@pytest.mark.parametrize(
    "part", [transitions.RemdmCap(0.3), transitions.RemdmRescale(0.5), transitions.RemdmLoop(), transitions.Mdlm()],
    ids=lambda part: type(part).__name__,
)
def test_every_step_keeps_the_share_of_masks_that_its_schedule_asks_for(part):
    steps, eps = 64, 1e-5
    times = np.linspace(1, eps, steps + 1).astype(np.float32)
    found = part(times[:-1], (1 - eps) / steps)
    masked = 1.0
    for t, remask, take, stay in zip(times[1:], *(np.float64(rate) for rate in found)):
        masked = masked * stay / (take + stay) + (1 - masked) * remask
        if isinstance(part, transitions.RemdmLoop):
            assert t > part.t_on or masked < 0.12
        else:
            assert masked == pytest.approx(t, abs=1e-4)


def test_at_exactly_t_on_in_float32_the_loop_has_not_begun():
    assert transitions.RemdmLoop(t_on=0.55)(np.float32([0.55]), 0.01).remask[0] == 0


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: transitions.RemdmCap(eta=1.5), "eta, a probability"),
        (lambda: transitions.RemdmRescale(eta=-0.1), "eta, a probability"),
        (lambda: transitions.RemdmLoop(t_on=0.05, t_off=0.55), "t_off < t_on"),
        (lambda: transitions.RemdmLoop(alpha_on=1.0), "alpha_on"),
        (lambda: transitions.RemdmLoop(eta=0.5), "at most 0.111"),
    ],
)
def test_numbers_out_of_range_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
