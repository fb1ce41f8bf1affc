"""GPT-2's network against what `transformers` computes with the same weights."""
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.convert.gpt2 import Checkpoint
from softmask_jax.models.nn import gpt2
from softmask_jax.models.nn.gpt2 import GPT2Config
from tests.golden import FOLDER, load

# The second has exact GELU, scores divided by the layer's number (which the library's eager attention alone does), a wide
# epsilon, and an MLP of its own width.
NAMES = ("tiny", "half_sharded")
RECORDED = {"tiny": "gpt2/tiny.npz", "half_sharded": "gpt2/half_sharded.npz"}


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    checkpoint = Checkpoint(FOLDER / "gpt2" / request.param)
    return checkpoint.config, checkpoint.read()[0], load(RECORDED[request.param])


@partial(jax.jit, static_argnums=0)
def logits(config, params, tokens):
    hidden = gpt2.hidden(config, params, tokens)
    return hidden, jnp.einsum("bld,vd->blv", hidden, gpt2.head(params), precision="highest")[..., : config.vocab_size]


def test_hidden_states_and_logits_match_the_reference(case):
    config, params, recorded = case
    hidden, found = logits(config, params, recorded["tokens"])
    real = np.arange(recorded["tokens"].shape[1]) < recorded["lengths"][:, None]
    np.testing.assert_allclose(np.asarray(hidden)[real], recorded["hidden"][real], rtol=0, atol=2e-5)
    np.testing.assert_allclose(np.asarray(found)[real], recorded["logits"][real], rtol=0, atol=2e-5)


def test_embedding_and_first_layer_match_the_reference(case):
    config, params, recorded = case
    x = gpt2.embed(config, params, recorded["tokens"])
    np.testing.assert_allclose(x, recorded["embedded"], rtol=0, atol=1e-6)
    first = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    real = np.arange(x.shape[1]) < recorded["lengths"][:, None]
    found = gpt2.run_layer(config, first, jnp.int32(0), x)
    np.testing.assert_allclose(np.asarray(found)[real], recorded["after_first"][real], rtol=0, atol=2e-5)


def test_what_stands_behind_a_token_changes_nothing_at_it(case):
    config, params, recorded = case
    tokens = recorded["tokens"].copy()
    before = np.asarray(logits(config, params, tokens)[0])
    tokens[:, 10:] = 3
    after = np.asarray(logits(config, params, tokens)[0])
    np.testing.assert_allclose(after[:, :10], before[:, :10], rtol=0, atol=1e-6)
    assert np.abs(after[:, 10:] - before[:, 10:]).max() > 0.1


def test_bfloat16_stays_near_float32(case):
    config, _, recorded = case
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    params = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), case[1], gpt2.shapes(half))
    hidden = gpt2.hidden(half, params, recorded["tokens"])
    assert hidden.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(hidden, np.float32) - recorded["hidden"], axis=-1)
    assert np.median(error / np.linalg.norm(recorded["hidden"], axis=-1)) < 0.02


def test_texts_that_are_too_long_are_refused(case):
    with pytest.raises(ValueError, match="L in 1..24"):
        gpt2.embed(*case[:2], np.zeros((1, 25), np.int32))


HF = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}


def test_what_config_json_leaves_out_is_as_the_library_has_it():
    assert GPT2Config.from_hf(HF) == GPT2Config(96, 32, 2, 4, 24, 128, 1e-5, "gelu_new", True, False, True)
    assert GPT2Config.from_hf(HF | {"activation_function": None, "summary_type": "mean", "n_ctx": 24}) == GPT2Config.from_hf(HF)
    assert GPT2Config.from_hf(HF | {"n_inner": 7, "scale_attn_weights": False}).mlp_width == 7


@pytest.mark.parametrize("change, said", [
    ({"model_type": "llama"}, "only GPT-2's family"),
    ({"n_head": None}, "lacks n_head"),
    ({"n_head": 5}, "divisible by num_heads"),
    ({"n_layer": "2"}, "num_layers must be a positive number"),
    ({"activation_function": "swish"}, "choose one of gelu_new"),
    ({"layer_norm_epsilon": 0}, "norm_eps must be above 0"),
    ({"add_cross_attention": True}, "cross_attention"),
    ({"scale_attn_weights": "no"}, "true or false"),
    ({"rotary_dim": 64}, "rotary_dim = 64"), ({"quantization_config": {"bits": 8}}, "quantization_config"),
])  # fmt: skip
def test_configs_of_other_networks_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        GPT2Config.from_hf(HF | change)
