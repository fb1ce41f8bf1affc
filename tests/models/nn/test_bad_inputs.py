"""Configs, inputs and adapters that no network can have: each is one clear error."""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.models.nn import dit, dora, dream
from softmask_jax.models.nn.dit import DiTConfig
from tests.golden import load
from tests.helpers import dream_model, torch_weights
from tests.helpers.dream_model import ADAPTER, adapter_config

DIT = DiTConfig(vocab_size=98, hidden_size=64, num_blocks=2, num_heads=2, cond_dim=16, mlp_ratio=4, rope_base=1e4, dropout=0.1)
DREAM = dream_model.config()
NETWORKS = {"dit": (dit, DIT), "dream": (dream, DREAM)}
EVERY_CONFIG = [
    ({"rope_base": 0.0}, "rope_base must be above 1"),
    ({"compute_dtype": "float16"}, "choose one of float32, bfloat16"),
    ({"remat": "all"}, "choose one of none, attention, products, dots"),
    ({"attention": "flash"}, "choose one of auto, xla, cudnn"),
    ({"attention": "cudnn"}, "bfloat16 only"),
    ({"num_heads": 3}, "divisible by 2"),
]
CONFIGS = [
    *(("dit", *case) for case in EVERY_CONFIG),
    ("dit", {"vocab_size": 0}, "vocab_size must be at least 1"),
    ("dit", {"num_blocks": 0}, "num_blocks must be at least 1"),
    ("dit", {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    *(("dream", *case) for case in EVERY_CONFIG),
    ("dream", {"num_layers": 0}, "num_layers must be at least 1"),
    ("dream", {"num_kv_heads": 3}, "divisible by num_kv_heads 3"),
    ("dream", {"norm_eps": 0.0}, "norm_eps must be above 0"),
    ("dream", {"param_dtype": "float16"}, "param_dtype 'float16'; choose one of float32, bfloat16"),
    ("dream", {"compute_dtype": "int8"}, "choose one of float32, bfloat16"),
]
EVERY_INPUT = [
    ({"cache": ()}, "cache is None, True"),
    ({"positions": jnp.arange(7)}, "positions must have shape"),
    ({"segment_ids": jnp.zeros((8,), jnp.int32)}, "segment_ids must have shape"),
    ({"dropout_keys": jax.random.key(0)}, "typed keys"),
]
INPUTS = [
    *(("dit", *case) for case in EVERY_INPUT),
    ("dit", {"sigma": jnp.zeros((2, 1))}, "one noise level per row"),
    ("dit", {"dropout_keys": jnp.zeros((2, 2), jnp.uint32)}, "typed keys"),
    *(("dream", *case) for case in EVERY_INPUT),
    ("dream", {"sigma": jnp.zeros(2)}, "not conditioned on the noise level"),
]


@pytest.fixture(scope="module")
def params():
    """By network."""
    recorded = torch_weights.from_torch(load("mdlm_dit/params.npz"), 2)["backbone"]
    return {"dit": jax.tree.map(jnp.asarray, recorded), "dream": dream_model.params()}


@pytest.mark.parametrize("name, change, message", CONFIGS)
def test_a_config_that_cannot_be_built_is_an_error(name, change, message):
    with pytest.raises(ValueError, match=message):
        replace(NETWORKS[name][1], **change)


@pytest.mark.parametrize("name, inputs, message", INPUTS)
def test_a_wrong_input_to_the_trunk_is_an_error(params, name, inputs, message):
    module, config = NETWORKS[name]
    with pytest.raises(ValueError, match=message):
        module.trunk(config)(params[name], jnp.zeros((2, 8, 64)), **inputs)


@pytest.mark.parametrize("name", NETWORKS)
class TestEveryNetwork:
    def test_embeddings_of_another_width_are_an_error(self, params, name):
        module, config = NETWORKS[name]
        with pytest.raises(ValueError, match=r"embeddings \[B, L, 64\]"):
            module.trunk(config)(params[name], jnp.zeros((2, 8, 32)))

    def test_a_token_beyond_the_table_is_nan_and_no_other_token(self, params, name):
        module, _ = NETWORKS[name]
        beyond = len(params[name]["embed"]["table"])
        x = module.embed(params[name], jnp.array([[5, beyond]]))
        assert np.isfinite(x[0, 0]).all() and np.isnan(x[0, 1]).all()

    def test_the_trunk_of_a_config_is_one_object(self, name):
        module, config = NETWORKS[name]
        assert module.trunk(config) is module.trunk(replace(config))


# Adapters


@pytest.mark.parametrize("change, message", [
    ({"kind": "ia3"}, "choose one of dora, lora"),
    ({"rank": 0}, "rank must be at least 1"),
    ({"alpha": 0}, "alpha must be above 0"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ({"targets": "("}, "no regular expression"),
])  # fmt: skip
def test_an_adapter_s_config_that_cannot_be_built_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        adapter_config(**change)


def test_targets_that_match_nothing_are_an_error_that_names_the_choices(params):
    with pytest.raises(ValueError, match="'q_proj' matches none of down, gate, k, o, q, up, v"):
        dora.init(params["dream"], adapter_config(targets="q_proj"), jax.random.key(0))


def test_an_adapter_of_another_config_is_an_error(params):
    base, adapter, x = params["dream"], dream_model.adapter(), jnp.zeros((1, 4, 64))
    with pytest.raises(ValueError, match="A dora adapter on q, v has"):
        dora.merge(base, adapter, replace(ADAPTER, targets="^(q|v)$"))
    with pytest.raises(ValueError, match="A lora adapter on k, o, q, v has"):
        dream.trunk(DREAM, adapter=replace(ADAPTER, kind="lora"))({**base, "adapter": adapter}, x)
    with pytest.raises(ValueError, match="put one into params"):
        dream.trunk(DREAM, adapter=ADAPTER)(base, x)
    with pytest.raises(ValueError, match="the trunk was made without"):
        dream.trunk(DREAM)({**base, "adapter": adapter}, x)
