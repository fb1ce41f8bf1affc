import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.models.nn import dit
from tests.golden import load
from tests.helpers import torch_weights

INVERSE_FREQUENCIES = "backbone.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def state():
    return load("mdlm_dit/params.npz")


def test_there_and_back_is_bit_exact_rotary_buffer_included(state):
    back = torch_weights.to_torch(torch_weights.from_torch(state, 2), 98, num_heads=2)
    assert set(back) == set(state)
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_the_tree_is_the_models_and_pad_rows_are_zero(state):
    params = torch_weights.from_torch(state, 2)
    config = dit.DiTConfig(vocab_size=98, hidden_size=64, num_blocks=2, num_heads=2, cond_dim=16, mlp_ratio=4, rope_base=1e4)
    fresh = jax.eval_shape(lambda key: dit.init(config, key), jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params["backbone"]) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), fresh
    )
    for name, leaf in (("embed", "table"), ("head", "weight"), ("head", "bias")):
        assert not params["backbone"][name][leaf][98:].any()
        assert params["backbone"][name][leaf][:98].any()


def test_what_the_model_initialises_can_be_exported_and_read_again():
    config = dit.DiTConfig(vocab_size=130, hidden_size=8, num_blocks=3, num_heads=2, cond_dim=4, mlp_ratio=2, rope_base=1e4)
    params = {"backbone": jax.jit(lambda key: dit.init(config, key))(jax.random.key(0))}
    exported = torch_weights.to_torch(params, 130)
    assert sum(value.size for value in exported.values()) == dit.num_params(config)
    again = torch_weights.from_torch(exported, 3)
    chex.assert_trees_all_equal(params, again)


def test_soft_masking_scalars_keep_their_meaning_and_may_be_absent_together(state):
    soft = torch_weights.from_torch(state, 2)["soft_mask"]
    assert soft["raw_centre"] == state["tran_head.raw_centre_neg"]
    assert soft["raw_steepness"] == state["tran_head.raw_steep"]
    plain = {key: value for key, value in state.items() if not key.startswith("tran_head.")}
    assert "soft_mask" not in torch_weights.from_torch(plain, 2)
    assert not any(key.startswith("tran_head.") for key in torch_weights.to_torch(torch_weights.from_torch(plain, 2), 98))


def test_the_rotary_buffer_is_optional(state):
    without = {key: value for key, value in state.items() if key != INVERSE_FREQUENCIES}
    assert set(torch_weights.to_torch(torch_weights.from_torch(without, 2), 98)) == set(without)


def test_bfloat16_weights_become_float32(state):
    rounded = {key: np.asarray(jnp.asarray(value, jnp.bfloat16)) for key, value in state.items()}
    assert torch_weights.from_torch(rounded, 2)["backbone"]["embed"]["table"].dtype == np.float32


def test_every_problem_is_named_at_once(state):
    broken = dict(state)
    del broken["backbone.blocks.1.mlp.0.bias"], broken["tran_head.raw_steep"]
    broken["backbone.lm_head.weight"] = np.zeros(3, np.float32)
    broken["backbone.blocks.0.attn_qkv.weight"] = np.zeros((128, 64), np.float32)
    broken["backbone.output_layer.linear.bias"] = np.zeros((98, 1), np.float32)
    with pytest.raises(ValueError) as error:
        torch_weights.from_torch(broken, 2)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(" has ")[0].strip() for line in lines] == [
        "missing: backbone.blocks.1.mlp.0.bias",
        "missing: tran_head.raw_steep",
        "unexpected: backbone.lm_head.weight",
        "misshapen: backbone.blocks.0.attn_qkv.weight",
        "misshapen: backbone.output_layer.linear.bias",
    ]
    assert lines[3].endswith("shape (128, 64), expected [3D=192, D=64]")


def test_another_number_of_blocks_is_an_error(state):
    with pytest.raises(ValueError, match=r"unexpected: backbone\.blocks\.1\.norm1\.weight"):
        torch_weights.from_torch(state, 1)
    with pytest.raises(ValueError, match=r"missing: backbone\.blocks\.2\.norm1\.weight"):
        torch_weights.from_torch(state, 3)


def test_another_vocabulary_than_the_configs_is_an_error(state):
    with pytest.raises(ValueError, match="V=200"):
        torch_weights.to_torch(torch_weights.from_torch(state, 2), 200)
