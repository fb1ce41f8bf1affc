from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.distributed.sharding import RULES
from softmask_jax.models.nn import dream, layers
from softmask_jax.models.nn.dream import DreamConfig
from softmask_jax.models.nn.scan import REMAT
from tests.golden import FOLDER, load
from tests.helpers import dream_model
from tests.helpers.dream_model import VOCAB, logits
from tests.helpers.trees import assert_trees_close

TINY = dream_model.config()


@pytest.fixture(scope="module")
def params():
    return dream_model.params()


@pytest.fixture(scope="module")
def recorded():
    return load("dream/forward.npz")


@partial(jax.jit, static_argnums=0)
def hidden(config, params, x, **inputs):
    return dream.trunk(config)(params, x, **inputs)[0]


@partial(jax.jit, static_argnums=0)
def gradients(config, params, x):
    """Gradients of a fixed weighting of the hidden state for parameters and input, and the hidden state."""

    def loss(params, x):
        out = dream.trunk(config)(params, x)[0]
        return jnp.sum(out.astype(jnp.float32) * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def distance(a, b):
    return float(np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b))


# Parity with the reference


def test_logits_from_tokens_match_the_reference(params, recorded):
    out = hidden(TINY, params, dream.embed(params, recorded["full/input_ids"]))
    np.testing.assert_allclose(logits(params, out), recorded["full/logits"], atol=2e-5)
    np.testing.assert_allclose(out, recorded["full/hidden_states"][2], atol=2e-5)


def test_the_first_layer_matches_the_reference_inside(params, recorded):
    x = dream.embed(params, recorded["full/input_ids"])
    np.testing.assert_array_equal(x, recorded["full/hidden_states"][0])
    first = dream.layer(TINY, jax.tree.map(lambda leaf: leaf[0], params["layers"]))
    cos, sin = angles = layers.rotary_angles(jnp.arange(24), TINY.head_width, TINY.rope_base)
    np.testing.assert_allclose(np.tile(cos[:, :, 0], 2), recorded["rope/cos"], atol=1e-6)
    np.testing.assert_allclose(np.tile(sin[:, :, 0], 2), recorded["rope/sin"], atol=1e-6)
    normed = first.attn_norm(x)
    np.testing.assert_allclose(normed, recorded["layer0/normed"], atol=2e-6)
    mixed = first.attention(normed, angles, None)
    np.testing.assert_allclose(mixed, recorded["layer0/attn_out"], atol=2e-6)
    np.testing.assert_allclose(first(x, angles, None), recorded["full/hidden_states"][1], atol=2e-5)


def test_logits_from_soft_inputs_match_the_reference(params, recorded):
    x = recorded["embeds/p"] @ dream.embedding(params)[:VOCAB]
    np.testing.assert_allclose(logits(params, hidden(TINY, params, x)), recorded["embeds/logits"], atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_at_tokens_match_the_reference_where_a_side_is_padded(params, recorded, side):
    prompt_mask = recorded[f"{side}/attention_mask_2d"]
    mask = np.pad(prompt_mask, ((0, 0), (0, 24 - prompt_mask.shape[1])), constant_values=1)
    positions, segment_ids = dream.padded_inputs(mask)
    np.testing.assert_array_equal(positions, recorded[f"{side}/tok_idx"])
    seen = segment_ids[:, :, None] * segment_ids[:, None, :]
    np.testing.assert_array_equal(seen, recorded[f"{side}/attention_mask_4d"][:, 0])
    x = dream.embed(params, recorded[f"{side}/x_step0"])
    out = hidden(TINY, params, x, positions=positions, segment_ids=segment_ids)
    np.testing.assert_allclose(logits(params, out)[mask == 1], recorded[f"{side}/logits"][mask == 1], atol=2e-5)
    assert np.isfinite(out).all()


def test_a_mask_without_zeros_is_no_mask(params, recorded):
    assert recorded["ones/mask_is_full"]
    x = dream.embed(params, recorded["ones/x_step0"])
    positions, segment_ids = dream.padded_inputs(np.ones(x.shape[:2]))
    for out in (hidden(TINY, params, x), hidden(TINY, params, x, positions=positions, segment_ids=segment_ids)):
        np.testing.assert_allclose(logits(params, out), recorded["ones/logits"], atol=2e-5)


def test_the_loss_of_shifted_logits_matches_the_reference(params, recorded):
    labels = recorded["loss/labels"]
    out = dream.shift(hidden(TINY, params, dream.embed(params, recorded["full/input_ids"])))
    scored = (labels != -100) & (np.arange(24) > 0)  # the reference never trains position 0
    log_p = jax.nn.log_softmax(logits(params, out))
    nll = -np.take_along_axis(log_p, np.where(scored, labels, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll[scored].mean(), recorded["loss/loss"], rtol=1e-5)


def test_a_shifted_position_gets_its_left_neighbours_state_and_the_first_keeps_its_own():
    h = jnp.arange(8.0).reshape(2, 4, 1)
    np.testing.assert_array_equal(dream.shift(h)[..., 0], [[0, 0, 1, 2], [4, 4, 5, 6]])
    # The first behind padding, too; padding behind a row changes nothing.
    segments = jnp.array([[0, 0, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(dream.shift(h, segment_ids=segments)[..., 0], [[0, 0, 2, 2], [4, 4, 5, 6]])


def test_the_sharded_checkpoint_is_the_same_model(params):
    assert (FOLDER / "dream/tiny_sharded/model.safetensors.index.json").is_file()
    chex.assert_trees_all_equal(dream_model.params("tiny_sharded"), params)


def test_a_bfloat16_model_is_as_close_to_float32_as_the_references(recorded):
    params = dream_model.params("tiny_bf16")
    config = dream_model.config("tiny_bf16", param_dtype="bfloat16", compute_dtype="bfloat16")
    shapes = jax.eval_shape(partial(dream.init, config), jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    exact, x = recorded["full/logits"], dream.embed(params, recorded["full/input_ids"])
    theirs = distance(recorded["full/logits_bf16"], exact)
    out = hidden(config, params, x)
    assert out.dtype == jnp.bfloat16
    assert distance(logits(params, out.astype(jnp.float32)), exact) < 1.1 * theirs
    wide = hidden(replace(config, compute_dtype="float32"), params, x)
    assert distance(logits(params, wide), exact) < 0.8 * theirs


# Shapes and the start


def test_the_7b_model_has_7_615_616_512_parameters():
    sizes = {"hidden_size": 3584, "num_layers": 28, "num_heads": 28, "num_kv_heads": 4, "intermediate_size": 18_944}
    assert dream.num_params(DreamConfig(vocab_size=152_064, **sizes, rope_base=1e6, norm_eps=1e-6)) == 7_615_616_512


def test_sizes_are_read_from_hugging_faces_config():
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 128}
    expected = DreamConfig(vocab_size=200, **sizes, rope_base=1e6, norm_eps=1e-6, remat="dots")
    assert DreamConfig.from_hf(dream_model.config_json(), remat="dots") == expected
    assert DreamConfig.from_hf(dream_model.config_json("tiny_bf16"), num_layers=1).num_layers == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": None, "rope_theta": None}, "lacks vocab_size, rope_theta"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True; only False is built here"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; only 'silu' or 'swish'"),
        ({"head_dim": 32}, "head_dim = 32"),
    ],
)
def test_the_config_of_another_network_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        DreamConfig.from_hf({**dream_model.config_json(), **change})


def test_initial_values_are_normal_with_biases_at_zero_norms_at_one_and_pad_rows_at_zero():
    config = replace(TINY, param_dtype="bfloat16")
    fresh = jax.jit(partial(dream.init, config))(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.dtype == jnp.bfloat16
        values = np.asarray(leaf, np.float32)
        if "norm" in name:
            np.testing.assert_array_equal(values, 1)
        elif name.endswith("bias"):
            np.testing.assert_array_equal(values, 0)
        else:
            values = values[:VOCAB] if name in ("embed/table", "head/weight") else values
            assert abs(values.std() / 0.02 - 1) < 0.05 and abs(values.mean()) < 0.002, name
    np.testing.assert_array_equal(fresh["embed"]["table"][VOCAB:], 0)
    np.testing.assert_array_equal(fresh["head"]["weight"][VOCAB:], 0)
    assert not np.array_equal(*fresh["layers"]["q"]["kernel"])


def test_every_axis_of_every_parameter_has_a_name_with_a_rule():
    fresh = jax.eval_shape(partial(dream.init, TINY), jax.random.key(0))
    axes = dream.logical_axes(TINY)
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
        names = axes
        for key in path:
            names = names[key.key]
        assert len(names) == leaf.ndim == len(set(names)) and set(names) <= set(RULES)
    assert axes["layers"]["k"]["kernel"] == ("layers", "embed", "kv")
    assert axes["head"]["weight"] == ("vocab", "embed")


def test_num_params_counts_real_parameters_without_the_vocabularys_padding(params):
    assert dream.num_params(TINY) == sum(tensor.size for tensor in dream_model.tensors("tiny").values())
    assert dream.num_params(TINY) == sum(leaf.size for leaf in jax.tree.leaves(params)) - 2 * 56 * 64


def test_flops_count_every_matrix_product():
    config = replace(TINY, num_layers=1, vocab_size=256)
    run = jax.jit(lambda p, x: dream.trunk(config)(p, x)[0] @ p["head"]["weight"].T)
    shapes = jax.eval_shape(partial(dream.init, config), jax.random.key(0))
    counted = run.lower(shapes, jax.ShapeDtypeStruct((4, 64, 64), jnp.float32)).compile().cost_analysis()["flops"]
    ours = dream.flops_per_token(config, 64) * 4 * 64
    assert ours < counted < 1.2 * ours  # XLA counts the elementwise work too


# One function, many ways to run it


@pytest.fixture(scope="module")
def plain(params, recorded):
    x = dream.embed(params, recorded["full/input_ids"])
    return x, gradients(TINY, params, x)


@pytest.mark.full
@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_rematerialisation_changes_no_gradient(params, plain, remat):
    x, expected = plain
    assert_trees_close(gradients(replace(TINY, remat=remat), params, x), expected, 1e-5)


def test_the_scan_is_a_loop_over_layers_rematerialised_or_not(params, plain):
    x, expected = plain
    assert_trees_close(gradients(replace(TINY, unroll=True, remat="full"), params, x), expected, 1e-5)


def test_pads_on_either_side_change_nothing_at_tokens(params, recorded):
    x = dream.embed(params, recorded["full/input_ids"])
    alone = hidden(TINY, params, x)
    for left, right in ((8, 0), (0, 8), (3, 5)):
        mask = np.pad(np.ones((2, 24)), ((0, 0), (left, right)))
        positions, segment_ids = dream.padded_inputs(mask)
        padded = jnp.pad(x, ((0, 0), (left, right), (0, 0)), constant_values=7.0)
        out = hidden(TINY, params, padded, positions=positions, segment_ids=segment_ids)
        np.testing.assert_allclose(out[:, left : left + 24], alone, atol=2e-5)
        assert np.isfinite(out).all()


def test_a_row_of_pads_alone_is_finite_and_so_are_gradients(params, recorded):
    x = dream.embed(params, recorded["full/input_ids"])
    positions, segment_ids = dream.padded_inputs(np.stack([np.zeros(24), np.ones(24)]))
    for leaf in jax.tree.leaves(
        jax.grad(lambda x: hidden(TINY, params, x, positions=positions, segment_ids=segment_ids)[1].sum())(x)
    ):
        assert np.isfinite(leaf).all()
        np.testing.assert_array_equal(leaf[0], 0)


def test_a_row_does_not_depend_on_its_batch(params, recorded):
    x = dream.embed(params, recorded["full/input_ids"])
    many = hidden(TINY, params, jnp.concatenate([x, 2 * x, x[::-1]]))
    np.testing.assert_allclose(many[:2], hidden(TINY, params, x), atol=2e-5)
    np.testing.assert_allclose(hidden(TINY, params, x[:1]), many[:1], atol=2e-5)


def test_segments_do_not_see_each_other(params, recorded):
    x = dream.embed(params, recorded["full/input_ids"])
    segment_ids = jnp.broadcast_to(jnp.arange(24) // 16, (2, 24))
    both = hidden(TINY, params, x, segment_ids=segment_ids)
    np.testing.assert_allclose(both[:, :16], hidden(TINY, params, x[:, :16]), atol=2e-5)
    disturbed = hidden(TINY, params, x.at[:, 20].add(1.0), segment_ids=segment_ids)
    np.testing.assert_array_equal(disturbed[:, :16], both[:, :16])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_of_a_group_share_keys_and_values(kv_heads):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 10, n, 8)) for i, n in enumerate((4, kv_heads, kv_heads)))
    segment_ids = jnp.array([[0] * 6 + [1] * 4, [0] * 10])
    repeated = [jnp.repeat(x, 4 // kv_heads, axis=2) for x in (k, v)]
    for ids in (None, segment_ids):
        np.testing.assert_allclose(layers.attend(q, k, v, ids), layers.attend(q, *repeated, ids), atol=1e-6)
