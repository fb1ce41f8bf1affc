"""LLaDA's losses against the recorded ones: draws, masks, weights, values and gradients."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softmask_jax
from softmask_jax import config
from softmask_jax.convert.key_tables import keys
from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.dream_loss import DreamLoss
from softmask_jax.diffusion.llada_loss import LLaDALoss, LLaDATextLoss
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.models import families
from softmask_jax.models.keys import llada
from tests.golden import load, meta
from tests.helpers import llada_model

RECORDED, DLLM = "llada/loss.npz", "llada/loss_dllm.npz"
MASK, WITHIN = 291, 1e-5
KEY = jax.random.key(0, impl="threefry2x32")
CASES = {"pretrain": "tiny", "sft": "tiny", "sft_gqa": "tiny_gqa_sharded", "sft_tied": "tiny_tied"}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llada")
    loaded = {name: softmask_jax.load(llada_model.converted(name, folder / name)) for name in set(CASES.values())}
    return {name: {"backbone": model.params["backbone"]} for name, model in loaded.items()}


def case(name):
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in load(RECORDED).items() if key.startswith(prefix)}


def batch_of(z, prompt_lengths, lengths=None, segment_ids=None):
    tokens = jnp.asarray(z["input_ids"], jnp.int32)
    lengths = jnp.full(len(tokens), tokens.shape[1]) if lengths is None else jnp.asarray(lengths)
    segment_ids = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
    return {"tokens": tokens, "prompt_lengths": jnp.asarray(prompt_lengths), "lengths": lengths, "real_lengths": lengths,
            "index": jnp.arange(len(tokens)), "segment_ids": segment_ids}  # fmt: skip


def noisy_of(name, z):
    t, uniforms = jnp.asarray(z["t"]), jnp.asarray(z["uniforms"])
    if name == "pretrain":
        return LLaDATextLoss(SoftMask()).noisy(jnp.asarray(z["input_ids"], jnp.int32), t, uniforms, mask_token_id=MASK)
    return LLaDALoss(SoftMask()).noisy(batch_of(z, z["prompt_lengths"]), t, uniforms, mask_token_id=MASK)


def loss_of(name, params, noisy):
    nll = two_pass.token_nll(llada_model.model(name), SoftMask(), params, noisy, None)
    return (noisy.weights * nll).sum(-1).mean(), nll


@functools.cache
def gradient(name):
    return jax.jit(jax.value_and_grad(lambda params, noisy: loss_of(name, params, noisy), has_aux=True))


@pytest.mark.parametrize("name", CASES)
def test_a_loss_and_its_gradients_match_the_reference(params, name):
    z, checkpoint = case(name), CASES[name]
    noisy = noisy_of(name, z)._replace(segment_ids=None)  # all ones
    np.testing.assert_array_equal(noisy.masked, z["masked"])
    np.testing.assert_array_equal(noisy.xt, z["noisy_batch"])
    (loss, nll), grads = gradient(checkpoint)(params[checkpoint], noisy)
    np.testing.assert_allclose(loss, z["loss"], rtol=WITHIN)
    weighed = np.asarray(nll / z["p_mask"][:, None])[z["masked"]]
    np.testing.assert_allclose(weighed, z["token_loss"], rtol=1e-4, atol=1e-4)
    ours = by_their_keys(checkpoint, grads["backbone"])
    norms = [np.linalg.norm(ours[key]) for key in meta(RECORDED)["cases"][name]["grad_norm_names"]]
    np.testing.assert_allclose(norms, z["grad_norms"], rtol=1e-3)
    for key in (key.removeprefix("grad/") for key in z if key.startswith("grad/")):
        np.testing.assert_allclose(ours[key], z[f"grad/{key}"], atol=1e-4 * np.abs(z[f"grad/{key}"]).max())


def by_their_keys(name, backbone):
    about = llada_model.config_json(name)
    rows, grads = about["embedding_size"] or about["vocab_size"], {}
    for entry in llada.backbone(about["weight_tying"]):
        array = backbone
        for part in entry.path.split("/"):
            array = array[part]
        for i, key in keys(entry, about["n_layers"]):
            one = np.asarray(array[i] if entry.stacked else array)
            grads[key] = one.T if entry.change == "transpose" else one[:rows] if entry.change == "vocabulary" else one
    return grads


@pytest.mark.parametrize("name, settings", [
    ("token_scheduler", {"divisor": "tokens"}), ("token_uniform", {"divisor": "tokens", "weighting": "uniform"}),
    ("sequence_scheduler", {}), ("batch_scheduler", {"divisor": "rows"}),
])  # fmt: skip
def test_the_divisors_of_dllm_match_its_trainer(params, name, settings):
    z = load(DLLM)
    trained = z["labels"] != -100
    segments = jnp.asarray(z["attention_mask"], jnp.int32)
    batch = batch_of(z, trained.argmax(1), z["attention_mask"].sum(1), segments)
    objective = LLaDALoss(SoftMask(), weight_eps=1e-6, **settings)
    noisy = objective.noisy(batch, jnp.asarray(z["u_t"]), jnp.asarray(z["uniforms"]), mask_token_id=MASK)
    assert not np.any(noisy.masked & ~trained)
    np.testing.assert_allclose(loss_of("tiny", params["tiny"], noisy)[0], z[f"{name}/loss"], rtol=WITHIN)


def chats(rows=64, length=64):
    tokens = jax.random.randint(KEY, (rows, length), 0, 250)
    lengths = 20 + jnp.arange(rows) % 40
    batch = batch_of({"input_ids": tokens}, jnp.full(rows, 8), lengths)
    return batch | {"real_lengths": lengths - 5, "epoch": jnp.zeros(rows, jnp.int32)}


def test_drawn_masks_lie_in_the_response_as_often_as_t_says_and_weigh_one_over_p_and_its_length():
    batch, objective = chats(), LLaDALoss(SoftMask())
    noisy = objective.corrupt(batch, KEY, 3, mask_token_id=MASK)
    inside = (np.arange(64) >= 8) & (np.arange(64) < np.asarray(batch["lengths"])[:, None])
    assert not np.any(noisy.masked & ~inside) and noisy.t.min() < 0.1 and noisy.t.max() > 0.9
    p, count = (1 - 1e-3) * np.asarray(noisy.t) + 1e-3, inside.sum(1)
    np.testing.assert_allclose(noisy.weights, noisy.masked / (p * count)[:, None], rtol=1e-5)
    assert abs(float(noisy.weights.sum(-1).mean()) - 1) < 0.1
    without = LLaDALoss(SoftMask(), supervise_pads=False).corrupt(batch, KEY, 3, mask_token_id=MASK)
    assert not np.any(without.masked & (np.arange(64) >= np.asarray(batch["real_lengths"])[:, None]))
    # The next epoch draws anew, the same one does not.
    later = objective.corrupt(batch | {"epoch": jnp.ones(64, jnp.int32)}, KEY, 9, mask_token_id=MASK)
    again = objective.corrupt(batch, KEY, 9, mask_token_id=MASK)
    assert np.any(later.masked != noisy.masked) and not np.any(again.masked != noisy.masked)


def test_a_row_without_masks_adds_nothing_and_an_empty_response_no_infinity():
    batch = chats(2)
    batch["prompt_lengths"] = jnp.array([8, 64])
    noisy = LLaDALoss(SoftMask()).noisy(batch, jnp.zeros(2), jnp.full((2, 64), 0.5), mask_token_id=MASK)
    assert not np.any(noisy.masked) and not np.any(noisy.weights)


def test_a_validation_row_has_the_same_loss_in_any_batch():
    batch, objective = chats(8), LLaDALoss(SoftMask(), divisor="tokens")
    half = {name: value[:4] for name, value in batch.items()}
    whole, part = (objective.validation_batch(b, KEY, 8, mask_token_id=MASK) for b in (batch, half))
    np.testing.assert_array_equal(whole.weights[:4], part.weights)


def test_some_batches_of_text_are_cut_to_one_random_length_and_count_only_what_is_left():
    batch = {"tokens": jnp.zeros((4, 64), jnp.int32), "rows": jnp.arange(4)}
    objective = LLaDATextLoss(SoftMask(), short_batches=0.5)
    draw = jax.jit(lambda step: objective.corrupt(batch, KEY, step, mask_token_id=MASK))
    lengths = []
    for step in range(40):
        noisy = draw(step)
        kept = np.asarray(noisy.segment_ids)
        lengths.append(kept[0].sum())
        assert (kept == kept[0]).all() and not np.any(noisy.masked & (kept == 0))
        p = (1 - 1e-3) * np.asarray(noisy.t) + 1e-3
        np.testing.assert_allclose(noisy.weights, noisy.masked / (p * lengths[-1])[:, None], rtol=1e-5)
    assert 8 < sum(length < 64 for length in lengths) < 32 and len(set(lengths)) > 8 and min(lengths) >= 1
    assert LLaDATextLoss(SoftMask(), short_batches=0.0).corrupt(batch, KEY, 0, mask_token_id=MASK).segment_ids is None


@pytest.mark.parametrize("kind, source, loss, expected", [
    ("llada", "chat", "", LLaDALoss), ("llada", "chat", "dream", DreamLoss), ("llada", "stdlib", "", LLaDATextLoss),
    ("llada", "stdlib", "nelbo", Nelbo), ("dream", "chat", "", DreamLoss), ("dream", "chat", "llada", LLaDALoss),
    ("dit", "stdlib", "", Nelbo), ("dit", "stdlib", "llada", LLaDATextLoss),
])  # fmt: skip
def test_a_config_chooses_the_loss(kind, source, loss, expected):
    base = {"base": "x", "adapter": "dora"} if kind != "dit" else {}
    made = config.from_dict({
        "model": {"kind": kind, **base}, "objective": {"loss": loss, "noise_eps": 0.25},
        "data": {"source": source, "paths": "jsonl:x"},
    })  # fmt: skip
    objective = families.of(kind).objective(made)
    assert type(objective) is expected and objective.noise_eps == 0.25


@pytest.mark.parametrize("change, named", [
    ({"objective": {"loss": "nelbo"}}, "objective.loss"), ({"objective": {"divisor": "all"}}, "objective.divisor"),
])  # fmt: skip
def test_a_loss_for_other_data_is_refused(change, named):
    whole = {"model": {"kind": "llada", "base": "x"}, "data": {"source": "chat", "paths": "jsonl:x"}} | change
    with pytest.raises(ValueError, match=named):
        config.from_dict(whole)
    with pytest.raises(ValueError, match="weighting"):
        LLaDALoss(SoftMask(), weighting="context_adaptive")
