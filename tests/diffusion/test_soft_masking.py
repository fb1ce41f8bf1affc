"""Soft-masking against the recorded reference, and where its gradients and exactness must hold."""
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.diffusion import soft_masking
from softmask_jax.diffusion.soft_masking import Feedback, SoftMask, blend
from softmask_jax.diffusion.vocab.head import Head
from tests.golden import load, meta
from tests.helpers.dense_feedback import feedback_from_logits

MASK = 63
GOLDEN = load("soft_mask.npz")
META = meta("soft_mask.npz")
TOKENS = jnp.asarray(GOLDEN["input_ids"], jnp.int32)
EMBEDDING = jnp.asarray(GOLDEN["embedding"])
COTANGENT = jnp.asarray(GOLDEN["cotangent"])
RAW = {
    name: soft_masking.init_scalars(p["init_scale"], p["init_centre"], p["init_steep"], p["init_temperature"])
    for name, p in META["params"].items()
}
RAW_KEYS = {"raw_scale": "raw_scale", "raw_centre": "raw_centre_neg", "raw_steepness": "raw_steep"}
# what the recorded inference calls were given, used without the 1e-6
INFER_RAW = soft_masking.raw_from_effective(
    *(META["infer"][name] for name in ("scale", "centre", "steepness", "mixture_temp"))
)


def identity_head():
    """A head whose logits are the hidden states themselves; two pad rows test that padding does not matter."""
    return Head(jnp.eye(66, 64), None, 64, MASK, False)


def feedback_of(logits, k):
    return feedback_from_logits(logits, k=k)._replace(hidden=logits)


def run(raw, embedding, logits, scale=1.0, *, variant="topk", k=3):
    """(loss, blended embeddings), and the gradients for the raw scalars and the embedding."""
    # one shape and dtype for every way of saying the same thing: one compile for each variant and k
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), TOKENS.shape)
    return compiled(raw, embedding, jnp.asarray(logits), scale, variant=variant, k=k)


@functools.partial(jax.jit, static_argnames=("variant", "k"))
def compiled(raw, embedding, logits, scale, *, variant, k):
    def loss(raw, embedding):
        padded = jnp.pad(embedding, [(0, 2), (0, 0)])
        x = blend(
            TOKENS, feedback_of(logits, k), raw, padded,
            mask_token_id=MASK, scale=scale, variant=variant, head=identity_head(),
        )  # fmt: skip
        return jnp.sum(x * COTANGENT), x

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(raw, embedding)


def near(actual, expected, relative=1e-4):
    """Equal up to `relative` times the largest entry expected."""
    expected = np.asarray(expected, np.float32)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max() + 1e-30)


def cases(setting):
    return [case for case in META["cases"] if case.endswith(setting)]


@pytest.mark.parametrize("setting", ["topk1", "topk3", "topk5", "temp"])
def test_blend_and_gradients_match_the_reference_in_every_recorded_case(setting):
    variant, k = ("full", 3) if setting == "temp" else ("topk", int(setting[-1]))
    assert cases(setting)
    for case in cases(setting):
        logits, params = case.split("/")[1:3]
        want = {key: GOLDEN[f"{case}/{key}"] for key in ("blend", "loss", "grad_embedding", "grad_raw_temperature")}
        (loss, x), (d_raw, d_embedding) = run(
            RAW[params], EMBEDDING, GOLDEN[f"logits/{logits}"], variant=variant, k=k
        )
        near(x, want["blend"], 1e-5)
        np.testing.assert_allclose(loss, want["loss"], rtol=1e-5, atol=1e-5)
        near(d_embedding, want["grad_embedding"])
        for ours, theirs in RAW_KEYS.items():
            near(d_raw[ours], GOLDEN[f"{case}/grad_{theirs}"])
        near(d_raw["raw_temperature"], want["grad_raw_temperature"])
        if setting != "temp":
            assert d_raw["raw_temperature"] == 0


def dense_weights(tokens, feedback, raw, mask=MASK, vocab_size=64):
    """The weight of every row of the table in the blended embeddings: [B L V]."""
    return blend(tokens, feedback, raw, jnp.eye(vocab_size), mask_token_id=mask)


def recorded_weights(ids, weights, vocab_size=64):
    """Recorded sparse weights [B L k+1] of the rows `ids` as [B L V]."""
    return (jax.nn.one_hot(ids, vocab_size) * jnp.asarray(weights)[..., None]).sum(-2)


@pytest.mark.parametrize("setting", ["topk1", "topk3", "topk5"])
def test_lambda_and_the_weights_of_rows_match_the_reference_in_every_recorded_case(setting):
    @jax.jit
    def evaluate(raw, logits):
        feedback = feedback_of(logits, int(setting[-1]))
        lam = soft_masking.masked_weight(TOKENS, feedback.neg_entropy, raw, mask_token_id=MASK)
        return feedback.neg_entropy, lam, dense_weights(TOKENS, feedback, raw)

    masked = GOLDEN["input_ids"] == MASK
    for case in cases(setting):
        family, logits, params = case.split("/")[:3]
        neg_entropy, lam, weights = evaluate(RAW[params], GOLDEN[f"logits/{logits}"])
        np.testing.assert_allclose(neg_entropy, GOLDEN[f"{case}/neg_entropy"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lam, GOLDEN[f"{case}/lambda"], rtol=2e-4, atol=0)
        if family == "lang":
            # A lambda that 1 - lambda rounds away leaves exactly the mask's row.
            want = recorded_weights(GOLDEN[f"{case}/indices"], GOLDEN[f"{case}/probs"])
            np.testing.assert_allclose(weights[masked], want[masked], rtol=2e-4, atol=2**-25)
        else:
            np.testing.assert_allclose(weights, GOLDEN[f"{case}/p_out"], rtol=2e-4, atol=2**-25)


def test_bfloat16_reference_is_matched_to_its_own_precision():
    for case in cases("/bf16"):
        setting = case.split("/")[3]
        variant, k = ("full", 3) if setting == "temp" else ("topk", int(setting[-1]))
        logits = jnp.asarray(GOLDEN["logits/normal3"], jnp.bfloat16).astype(jnp.float32)
        rounded = EMBEDDING.astype(jnp.bfloat16).astype(jnp.float32)
        (_, x), (d_raw, d_embedding) = run(RAW["learnB"], rounded, logits, variant=variant, k=k)
        near(x, GOLDEN[f"{case}/blend"], 2e-2)
        near(d_embedding, GOLDEN[f"{case}/grad_embedding"], 2e-2)


def test_ties_among_the_top_k_give_the_reference_weights():
    # Equal logits share lambda whichever tokens are taken.
    weights = dense_weights(TOKENS, feedback_of(jnp.asarray(GOLDEN["lang_ties/logits"]), 3), RAW["learnA"])
    masked = GOLDEN["input_ids"] == MASK
    np.testing.assert_allclose(np.sort(weights[masked])[:, -4:], np.sort(GOLDEN["lang_ties/probs"][masked]), rtol=2e-4)


def test_rows_without_masks_are_left_alone():
    tokens = jnp.asarray(GOLDEN["lang_nomask/input_ids"], jnp.int32)
    weights = dense_weights(tokens, feedback_of(jnp.asarray(GOLDEN["logits/normal3"]), 3), RAW["learnA"])
    want = recorded_weights(GOLDEN["lang_nomask/indices"], GOLDEN["lang_nomask/probs"])
    np.testing.assert_array_equal(weights, want)


@pytest.mark.parametrize("setting", ["topk1", "topk3", "topk5", "temp"])
def test_decoding_schedules_match_the_reference(setting):
    variant, k = ("full", 3) if setting == "temp" else ("topk", int(setting[-1]))
    for schedule, length in META["infer"]["max_gen_length"].items():
        # the reference's ratio is one number for the whole batch
        scale = soft_masking.schedule_factor(schedule, META["infer"]["num_mask"], length)
        (_, x), _ = run(INFER_RAW, EMBEDDING, GOLDEN["logits/normal3"], scale, variant=variant, k=k)
        near(x, GOLDEN[f"infer/{setting}/{schedule}/p_out"] @ GOLDEN["embedding"], 1e-5)


def test_the_denoiser_s_recorded_feedback_is_matched():
    golden, mask = load("mdlm_dit/forward.npz"), 97
    raw = soft_masking.init_scalars(0.9, -2.5, 1.5, 0.8)
    feedback = feedback_from_logits(jnp.asarray(golden["log_probs_pass1"]), k=3)
    tokens, masked = jnp.asarray(golden["xt"], jnp.int32), golden["xt"] == mask
    np.testing.assert_array_equal(feedback.token_ids[masked], golden["sm_indices"][masked][:, 1:])
    want = recorded_weights(golden["sm_indices"], golden["sm_probs"], 98)
    np.testing.assert_allclose(dense_weights(tokens, feedback, raw, mask, 98)[masked], want[masked], atol=1e-6)
    np.testing.assert_allclose(feedback.neg_entropy, golden["sm_neg_entropy"], atol=2e-5)
    lam = soft_masking.masked_weight(tokens, feedback.neg_entropy, raw, mask_token_id=mask)
    np.testing.assert_allclose(lam, golden["sm_lambda"], rtol=2e-5)


@pytest.mark.parametrize("variant", ["topk", "full", "slerp"])
def test_lambda_zero_is_plain_mdlm(variant):
    (_, x), (d_raw, d_embedding) = run(
        RAW["learnA"], EMBEDDING, GOLDEN["logits/normal3"], 0.0, variant=variant
    )
    np.testing.assert_array_equal(x, EMBEDDING[TOKENS])
    assert all(value == 0 for value in d_raw.values())
    plain = jax.grad(lambda e: jnp.sum(e[TOKENS] * COTANGENT))(EMBEDDING)
    np.testing.assert_allclose(d_embedding, plain, atol=1e-6)


def test_lambda_one_with_k_one_feeds_the_argmax_back():
    logits = GOLDEN["logits/normal3"]
    raw = soft_masking.raw_from_effective(1.0, -100.0, 1.0)
    for variant in ("topk", "slerp"):
        (_, x), _ = run(raw, EMBEDDING, logits, variant=variant, k=1)
        argmax = EMBEDDING[jnp.where(TOKENS == MASK, logits.argmax(-1), TOKENS)]
        if variant == "slerp":
            unit = argmax / jnp.linalg.norm(argmax, axis=-1, keepdims=True)
            argmax = jnp.where((TOKENS == MASK)[..., None], unit * jnp.linalg.norm(EMBEDDING[MASK]), argmax)
        np.testing.assert_allclose(x, argmax, atol=1e-6)


@pytest.mark.parametrize("variant", ["topk", "full", "slerp"])
def test_unmasked_positions_keep_their_embedding_bit_for_bit(variant):
    embedding = EMBEDDING.at[:, 0].set(-0.0)  # a sign that 0 * x + y would lose
    (_, x), _ = run(RAW["learnA"], embedding, GOLDEN["logits/normal3"], variant=variant)
    plain = np.asarray(embedding[TOKENS])
    unmasked = np.asarray(TOKENS != MASK)
    np.testing.assert_array_equal(np.asarray(x)[unmasked].view(np.uint32), plain[unmasked].view(np.uint32))
    assert np.abs(np.asarray(x) - plain)[~unmasked].max() > 0.1


def test_variant_none_is_binary_masking_and_needs_no_feedback():
    x = blend(TOKENS, None, RAW["learnA"], EMBEDDING.astype(jnp.bfloat16), mask_token_id=MASK, variant="none")
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(x, EMBEDDING.astype(jnp.bfloat16)[TOKENS].astype(jnp.float32))


def test_scale_applies_row_by_row():
    feedback = feedback_of(jnp.asarray(GOLDEN["logits/normal3"]), 3)
    (_, whole), _ = run(RAW["learnA"], EMBEDDING, GOLDEN["logits/normal3"])
    for scale in (jnp.asarray([1.0, 0.0]), jnp.asarray([[1.0], [0.0]])):
        x = blend(TOKENS, feedback, RAW["learnA"], EMBEDDING, mask_token_id=MASK, scale=scale)
        np.testing.assert_allclose(x[0], whole[0], atol=1e-6)
        np.testing.assert_array_equal(x[1], EMBEDDING[TOKENS[1]])


def test_no_gradient_reaches_the_feedback():
    feedback = feedback_of(jnp.asarray(GOLDEN["logits/normal3"]), 3)

    def loss(top_logits, neg_entropy):
        given = Feedback(feedback.token_ids, top_logits, neg_entropy)
        return jnp.sum(blend(TOKENS, given, RAW["learnA"], EMBEDDING, mask_token_id=MASK) ** 2)

    for gradient in jax.grad(loss, argnums=(0, 1))(feedback.top_logits, feedback.neg_entropy):
        assert not gradient.any()


@pytest.mark.parametrize("variant", ["topk", "slerp"])
def test_neither_the_vocabulary_nor_k_multiplies_the_activations(variant):
    b, length, d, k, v = 4, 32, 64, 3, 64

    def loss(raw, embedding, tokens, feedback):
        return jnp.sum(blend(tokens, feedback, raw, embedding, mask_token_id=MASK, variant=variant) ** 2)

    tokens = jnp.full((b, length), MASK, jnp.int32)
    feedback = Feedback(*(jnp.zeros(shape, dtype) for shape, dtype in [
        ((b, length, k), jnp.int32), ((b, length, k), jnp.float32), ((b, length), jnp.float32)
    ]))  # fmt: skip
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(
        RAW["learnA"], jnp.zeros((v, d)), tokens, feedback
    )
    shapes = re.findall(r"(?:f32|s32|pred)\[([\d,]+)\]", compiled.compile().as_text())
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)
    assert largest == b * length * d


def test_one_hot_feedback_remembers_its_token_with_certainty():
    tokens = jnp.asarray([[5, 0, 63], [1, 2, 3]])
    for k in (1, 3):
        feedback = soft_masking.one_hot_feedback(tokens, k)
        chex.assert_shape([feedback.token_ids, feedback.top_logits], (2, 3, k))
        raw = soft_masking.raw_from_effective(1.0, -100.0, 1.0)
        masks = jnp.full_like(tokens, MASK)
        x = blend(masks, feedback, raw, EMBEDDING, mask_token_id=MASK)
        np.testing.assert_array_equal(x, EMBEDDING[tokens])


def test_hidden_adds_the_projected_state_at_masks_and_cuts_its_gradient():
    random, tokens = np.random.default_rng(3), jnp.asarray([[5, MASK, 63], [MASK, 2, MASK]])
    shapes = ((2, 3, EMBEDDING.shape[1]), (EMBEDDING.shape[1],) * 2)
    hidden, projection = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    logits = jnp.asarray(random.standard_normal((2, 3, 64)), jnp.float32)
    raw = RAW["learnA"] | {"projection": jnp.asarray(projection)}

    def mixed(raw, hidden, scale=1.0):
        feedback = feedback_from_logits(logits, 1)._replace(hidden=hidden)
        return blend(tokens, feedback, raw, EMBEDDING, mask_token_id=MASK, scale=scale, variant="hidden")

    x, lam = mixed(raw, jnp.asarray(hidden)), soft_masking.masked_weight(
        tokens, feedback_from_logits(logits, 1).neg_entropy, raw, mask_token_id=MASK)
    np.testing.assert_allclose(x, EMBEDDING[tokens] + lam[..., None] * (hidden @ projection), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mixed(raw, jnp.asarray(hidden), 0.0), EMBEDDING[tokens])
    grads = jax.grad(lambda *args: (mixed(*args) ** 2).sum(), argnums=(0, 1))(raw, jnp.asarray(hidden))
    assert all(np.any(grads[0][name]) for name in ("projection", "raw_scale", "raw_centre")) and not np.any(grads[1])


@pytest.mark.parametrize("schedule, expected", [
    ("none", [1, 1, 1, 1, 1]), ("linear", [1, 0.5001, 0.5, 0.25, 0]), ("stepwise", [1, 1, 0, 0, 0])])  # fmt: skip
def test_schedules_follow_the_share_of_masks_left(schedule, expected):
    scale = soft_masking.schedule_factor(schedule, jnp.asarray([10000, 5001, 5000, 2500, 0]), jnp.full(5, 10000))
    np.testing.assert_allclose(scale, expected, rtol=1e-7)


def test_bad_requests_are_answered_by_name():
    feedback = feedback_from_logits(jnp.asarray(GOLDEN["logits/normal3"]), k=3)
    ask = functools.partial(blend, mask_token_id=MASK)
    with pytest.raises(ValueError, match="'cosine'.*none, linear, stepwise"):
        SoftMask(schedule="cosine")
    with pytest.raises(ValueError, match="variant 'topp'.*topk, full, slerp, hidden, none"):
        ask(TOKENS, feedback, RAW["init"], EMBEDDING, variant="topp")
    with pytest.raises(ValueError, match="needs feedback.hidden and head"):
        ask(TOKENS, feedback, RAW["init"], EMBEDDING, variant="full")
    with pytest.raises(ValueError, match="needs feedback.hidden and a projection"):
        ask(TOKENS, feedback, RAW["init"], EMBEDDING, variant="hidden")
    with pytest.raises(ValueError, match="needs feedback of that shape"):
        ask(TOKENS[:1], feedback, RAW["init"], EMBEDDING)
    with pytest.raises(ValueError, match="raw_centre"):
        ask(TOKENS, feedback, {"raw_scale": jnp.zeros(())}, EMBEDDING)
