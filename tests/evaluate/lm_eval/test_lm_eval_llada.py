"""lm-evaluation-harness with a tiny LLaDA: its reference's likelihoods, guidance, and its sampler's options."""
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'softmask_jax[eval]'")

from softmask_jax.evaluate.lm_eval.masks import llada_masks, masks  # noqa: E402
from tests.helpers.harness import by_name, llada, lm, over_all_orders  # noqa: E402, F401


def nats(model, ids, scored) -> float:
    (value, greedy), = model._loglikelihood_tokens([(("a", "b"), ids, scored)], disable_tqdm=True)
    assert not greedy
    return value


def test_likelihoods_are_drawn_as_the_reference_draws_them_unless_told_otherwise(llada):  # noqa: F811
    options = {"soft_mask": "none", "batch_size": 4, "check_greedy": False}
    own, exact = lm("llada", mc_num=128, **options), lm("llada", mc_num=15, estimate="stratified", **options)
    assert own.likelihood.masks is llada_masks and exact.likelihood.masks is masks and own.likelihood.draws == 128
    ids, scored = [40, 41], [50, 51, 52]
    bound = over_all_orders(llada, ids, scored)
    assert nats(exact, ids, scored) == pytest.approx(bound, rel=1e-4)
    # 128 draws of one model, whose single terms are of this size.
    assert nats(own, ids, scored) == pytest.approx(bound, abs=0.15 * abs(bound))
    # One token is exact, and the same by either.
    assert nats(own, ids, scored[:1]) == pytest.approx(nats(exact, ids, scored[:1]), rel=1e-6)


def test_guidance_is_of_likelihoods_too_and_without_a_context_nothing(llada):  # noqa: F811
    options = {"soft_mask": "none", "mc_num": 1, "batch_size": 1, "check_greedy": False}
    plain, guided = lm("llada", **options), lm("llada", cfg_scale=2.0, **options)
    assert guided.likelihood.cfg_scale == 2.0
    assert abs(nats(guided, [40, 41], [50]) - nats(plain, [40, 41], [50])) > 1e-3
    assert nats(guided, [], [50]) == pytest.approx(nats(plain, [], [50]), rel=1e-5)


def test_an_answer_has_a_step_for_each_token_by_low_confidence(llada):  # noqa: F811
    model = lm("llada", confidence_eos_eot_inf=True, block_length=4)
    ask = model._ask("ab", {"max_gen_toks": 8}, 0)
    assert (ask.options.alg, ask.options.steps, ask.options.block_length) == ("low_confidence", 8, 4)
    ((_, tokens),) = model._filled([ask.pattern], [(0, 0)], ask.options)
    assert llada.mask_token_id not in np.asarray(tokens)
    assert lm("llada", threshold=0.5)._ask("ab", {"max_gen_toks": 8}, 0).options.steps is None
    with pytest.raises(ValueError, match="estimate is 'exact'; choose one of stratified, llada"):
        lm("llada", estimate="exact")
