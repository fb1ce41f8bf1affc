"""LLaDA's samplers against recorded histories of its `generate` and of Fast-dLLM, and a plain loop."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softmask_jax
from softmask_jax.samplers import BlockSampler, Constraints, Draws, DreamSampler, SoftMask
from tests.helpers import llada_model
from tests.helpers.llada_samplers import EOS, EOT, MASK, SCALARS, compiled, decode, recorded

QUICK = (
    "llada/generate/mask_in_prompt_b8_s8.npz",
    "llada/generate/mask_predicted_b8_s8.npz",
    "llada/generate/low_confidence_b8_s8_leftpad.npz",
    "llada/generate/low_confidence_b8_s6_uneven.npz",
    "llada/generate/low_confidence_b8_s32_more_steps_than_tokens.npz",
    "llada/generate/cfg1.5_b8_s8_leftpad.npz",
    "llada/generate/both_inf_b8_s8.npz",
    "llada/generate/gumbel_t0.8_confidence_eos_eot_inf_b8_s4.npz",
    "llada/generate/gumbel_t0.5_random_b8_s4.npz",
    "llada/generate/fastdllm_dual_thr0.25.npz",
    "llada/generate/fastdllm_prefix_s16.npz",
)
MORE = (
    "llada/generate/cfg1.5_b8_s8.npz",
    "llada/generate/confidence_eos_eot_inf_b16_s16.npz",
    "llada/generate/fastdllm_dual_s16.npz",
    "llada/generate/fastdllm_dual_thr0.9.npz",
    "llada/generate/fastdllm_parallel_nocache_s16.npz",
    "llada/generate/fastdllm_parallel_nocache_thr0.25.npz",
    "llada/generate/fastdllm_parallel_nocache_thr0.9.npz",
    "llada/generate/fastdllm_prefix_thr0.25.npz",
    "llada/generate/fastdllm_prefix_thr0.9.npz",
    "llada/generate/gqa_low_confidence_b8_s8.npz",
    "llada/generate/gumbel_t0.8_b8_s4.npz",
    "llada/generate/logits_eos_inf_b16_s16.npz",
    "llada/generate/low_confidence_b16_s16.npz",
    "llada/generate/low_confidence_b8_s16.npz",
    "llada/generate/low_confidence_b8_s2_one_step_per_block.npz",
    "llada/generate/random_b8_s8.npz",
)


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """Parameters of a recorded checkpoint, converted once: params("tiny")."""
    folder, made = tmp_path_factory.mktemp("llada"), {}

    def of(name: str) -> dict:
        if name not in made:
            made[name] = softmask_jax.load(llada_model.converted(name, folder / name)).params | {"soft_mask": SCALARS}
        return made[name]

    return of


def exchanged(params: dict) -> dict:
    """With the head rows of mask and eot exchanged: such a model predicts the mask."""
    weight = params["backbone"]["head"]["weight"]
    weight = weight.at[jnp.array([MASK, EOT])].set(weight[jnp.array([EOT, MASK])])
    return params | {"backbone": params["backbone"] | {"head": {"weight": weight}}}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)])
def test_the_history_is_the_recorded_one(params, name):
    z, about, sampler, (tokens, mask, draws) = recorded(name)
    checkpoint, *changed = about["checkpoint"].split(" ", 1)
    weights = exchanged(params(checkpoint)) if changed else params(checkpoint)
    out = compiled(sampler)(weights, None, tokens, mask, draws)
    assert int(out.calls) == about["num_calls"] == len(z["history"])
    np.testing.assert_array_equal(out.row_calls, about["num_calls"])
    np.testing.assert_array_equal(out.history[: about["num_calls"]], z["history"])
    np.testing.assert_array_equal(out.tokens, z["final"])
    assert (np.asarray(out.tokens) == MASK).sum() == about.get("masks_left", 0)
    if "query_lens" in z:
        assert float(out.positions[0]) == z["query_lens"].sum()


# The plain loop


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Three rows that continue 5 tokens: one padded, one with a mask in the prompt, one with known tokens and a whole
    known block."""
    tokens = np.random.default_rng(4).integers(0, 280, (3, 17))
    tokens[:, 5:], mask = MASK, np.ones((3, 17), np.int32)
    mask[0, :2], tokens[1, 1] = 0, MASK
    tokens[2, [5, 7]], tokens[2, 9:13] = 9, [4, 5, 6, 7]
    return tokens, mask


def sampler(**options) -> BlockSampler:
    options = {"alg": "low_confidence", "steps": 9, "prompt_length": 5, "block_length": 4, "top_k": None, **options}
    return BlockSampler(llada_model.model(), constraints=Constraints(end_token_ids=(EOS, EOT)), **options)


@pytest.mark.parametrize("options", [
    {"cfg_scale": 0.7, "soft_mask": SoftMask("topk", 3, "linear"), "temperature": 0.6, "confidence_eos_eot_inf": True},
    {"alg": "random", "compat": True, "logits_eos_inf": True, "temperature": 1.1},
    *(pytest.param(options, marks=pytest.mark.full) for options in (
        # Rounding grows from call to call of a random model that reads its predictions: few of them.
        {"compat": True, "cfg_scale": 2.0, "soft_mask": SoftMask("topk", 2), "steps": 6},
        {"threshold": 0.02, "soft_mask": SoftMask("topk", 1, "stepwise"), "steps": None},
        {"threshold": 0.02, "compat": True, "temperature": 0.5},
        {"alg": "random", "cfg_scale": 1.0, "steps": 20},
    )),
])  # fmt: skip
def test_the_compiled_loop_is_the_plain_loop(params, options):
    this, (tokens, mask) = sampler(**options), rows()
    shape, rng = (this.most_calls(17), *tokens.shape), np.random.default_rng(2)
    coins = rng.random(shape).astype(np.float32)
    gumbel = rng.gumbel(size=(*shape, 384)).astype(np.float32) if this.temperature else None
    # Every row draws by its own calls; those of the plain loop are the batch's, as with compat.
    if not this.compat:
        tokens, mask = tokens[:2], mask[:2]
        coins, gumbel = coins[:, :2], None if gumbel is None else gumbel[:, :2]
    draws = jax.tree.map(jnp.asarray, Draws(coins=coins, gumbel=gumbel))
    out = compiled(this)(params("tiny"), None, jnp.asarray(tokens), jnp.asarray(mask), draws)
    history = decode(this, params("tiny"), tokens, mask, draws)
    assert int(out.calls) == len(history)
    np.testing.assert_array_equal(out.history[: len(history)], history)
    assert bool(out.finite.all())


# What every row may rely on


def test_by_default_a_model_that_predicts_masks_and_rows_without_a_token_writes_neither(params):
    tokens, mask = rows()
    weights = exchanged(params("tiny"))
    head = weights["backbone"]["head"]["weight"]
    weights["backbone"]["head"]["weight"] = head.at[300:384].multiply(3.0)
    free = compiled(sampler(compat=True))(weights, None, jnp.asarray(tokens), jnp.asarray(mask))
    assert (free.tokens >= 300).any() and (free.tokens[:, 5:] == MASK).any()
    out = compiled(sampler())(weights, None, jnp.asarray(tokens), jnp.asarray(mask))
    assert (out.tokens[:, 5:] < 300).all() and (out.tokens[:, 5:] != MASK).all()
    # Masks before the first block stay, and take no other's place.
    kept = tokens != MASK
    kept[:, :5] = True
    np.testing.assert_array_equal(np.asarray(out.tokens)[kept], tokens[kept])
    np.testing.assert_array_equal(out.filled, (~kept).sum(-1))
    # Each row counts its own masks and makes no call that fills nothing: the third has two, none and four in a block.
    np.testing.assert_array_equal(out.row_calls, [9, 9, 2 + 0 + 3])


GUIDED = {"cfg_scale": 0.6, "soft_mask": SoftMask("topk", 2), "temperature": 0.7, "alg_temp": 0.2}


@pytest.mark.parametrize("cache", ["dual", pytest.param("prefix", marks=pytest.mark.full),
                                   pytest.param("none", marks=pytest.mark.full)])  # fmt: skip
def test_a_row_does_not_depend_on_its_neighbours_or_its_padding(params, cache):
    tokens, mask = rows()
    keys = jax.random.split(jax.random.key(3, impl="threefry2x32"), 3)
    this = sampler(cache=cache, steps=8, **GUIDED)
    whole = compiled(this)(params("tiny"), keys, jnp.asarray(tokens), jnp.asarray(mask))
    # The rows in another order, behind three more pads.
    order, more = np.array([2, 0, 1]), ((0, 0), (3, 0))
    shifted = compiled(dataclasses.replace(this, prompt_length=8))(
        params("tiny"), keys[order], jnp.asarray(np.pad(tokens[order], more, constant_values=EOS)),
        jnp.asarray(np.pad(mask[order], more)))  # fmt: skip
    np.testing.assert_array_equal(shifted.tokens[:, 8:], whole.tokens[order, 5:])
    np.testing.assert_array_equal(shifted.row_calls, whole.row_calls[order])
    assert bool(whole.finite.all()) and (whole.tokens[:, 5:] != MASK).all()


def test_a_block_of_the_whole_text_is_the_same_with_every_cache_and_with_a_trace(params):
    tokens, mask = rows()
    texts, whole = [], {"prompt_length": 0, "block_length": 17, "steps": 5}
    for options in ({"cache": "none", "trace": True}, {"cache": "dual"}, {"cache": "prefix"}):
        this = sampler(**whole, cfg_scale=0.6, soft_mask=SoftMask("topk", 2), **options)
        out = compiled(this)(params("tiny"), None, jnp.asarray(tokens), jnp.asarray(mask))
        texts.append(np.asarray(out.tokens))
        assert (texts[-1] != MASK).all() and int(out.calls) == 5
        if this.trace:
            weight = np.asarray(out.trace.weight)
            masked = (np.asarray(out.trace.tokens) == MASK) & (mask == 1)
            assert not weight[0].any() and (weight[1:][masked[1:]] > 0).all() and not weight[~masked].any()
    np.testing.assert_array_equal(texts[1], texts[0])
    np.testing.assert_array_equal(texts[2], texts[0])


def test_without_blocks_masks_are_filled_wherever_they_are(params):
    tokens, mask = rows()
    this = DreamSampler(llada_model.model(), alg="low_confidence", steps=4, top_k=None, logits_eos_inf=True,
                        constraints=Constraints((17,), (int(EOS), EOT), 2.0))  # fmt: skip
    out = compiled(this)(params("tiny"), None, jnp.asarray(tokens), jnp.asarray(mask))
    assert (out.tokens != MASK).all() and not np.isin(np.asarray(out.tokens)[tokens == MASK], [17, EOS]).any()
    masks = (np.concatenate([tokens[None], out.history]) == MASK).sum(-1)
    # Equal numbers, what is left over to the first steps.
    np.testing.assert_array_equal(-np.diff(masks, axis=0), [[3, 4, 2], [3, 3, 2], [3, 3, 1], [3, 3, 1]])


@pytest.mark.parametrize("options, says", [
    ({"cfg_scale": -1.0}, "cfg_scale must be 0"), ({"tokens_per_step": 2, "threshold": 0.5}, "give one"),
    ({"threshold": 0.5, "factor": 1.0}, "give one"), ({"threshold": 2.0}, "threshold must be"),
    ({"logits_eos_inf": True, "constraints": Constraints()}, "logits_eos_inf needs to know"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(sampler(), **options)


@pytest.mark.parametrize("options, says", [
    ({"compat": True, "steps": 8}, "steps must be a multiple of the 3 blocks"),
    ({"alg": "random"}, "pass keys"), ({"steps": 2}, "2 steps are too few"),
])  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(params, options, says):
    with pytest.raises(ValueError, match=says):
        sampler(**options)(params("tiny"), None, *map(jnp.asarray, rows()))
