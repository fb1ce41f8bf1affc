import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.models.nn import layers
from softmask_jax.models.nn.scan import REMAT, check_remat, scan_layers
from tests.golden import load


@pytest.fixture(scope="module")
def recorded():
    return load("mdlm_dit/rotary_attention.npz")


def random(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_rotary_embedding_matches_the_reference(recorded):
    q, k, _ = np.moveaxis(recorded["qkv"], 2, 0)
    angles = layers.rotary_angles(jnp.arange(32), 32, 1e4)
    np.testing.assert_allclose(angles[0][0, :, 0], recorded["cos"][:, :16], atol=2e-6)
    np.testing.assert_allclose(angles[1][0, :, 0], recorded["sin"][:, :16], atol=2e-6)
    np.testing.assert_allclose(layers.rotate(q, angles), recorded["q"], atol=1e-5)
    np.testing.assert_allclose(layers.rotate(k, angles), recorded["k"], atol=1e-5)


def test_attention_matches_the_reference(recorded):
    mixed = layers.attend(recorded["q"], recorded["k"], recorded["v"])
    np.testing.assert_allclose(mixed.reshape(2, 32, 64), recorded["attn_out_preproj"], atol=5e-6)


def test_attention_and_its_gradients_are_those_of_the_plain_softmax_with_and_without_segments():
    q, k, v = (random((2, 6, 2, 8), seed) for seed in range(3))
    segment_ids = jnp.array([[0, 0, 0, 1, 1, 2], [4, 4, 4, 4, 4, 4]])

    def plain(q, k, v, segment_ids):
        scores = jnp.einsum("blkd,bmkd->bklm", q, k) / jnp.sqrt(8.0)
        if segment_ids is not None:
            same = segment_ids[:, :, None] == segment_ids[:, None, :]
            scores = jnp.where(same[:, None], scores, -jnp.inf)
        return jnp.einsum("bklm,bmkd->blkd", jax.nn.softmax(scores), v)

    for ids in (None, segment_ids):
        ours, theirs = (
            jax.value_and_grad(lambda q, k, v, f=f: (f(q, k, v, ids) * v).sum(), argnums=(0, 1, 2))(q, k, v)
            for f in (layers.attend, plain)
        )
        chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_attention_survives_scores_of_a_thousand():
    q = 100 * random((1, 4, 1, 8))
    assert np.isfinite(jax.grad(lambda q: layers.attend(q, q, q).sum())(q)).all()


def test_layer_norm_is_computed_in_float32_whatever_comes_in():
    x = random((2, 3, 16)) + 100
    norm = layers.LayerNorm(16)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_allclose(norm(x).mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(norm(x).var(-1), 1, atol=1e-3)


def test_dropout_keeps_the_mean_and_drops_at_its_rate():
    keys = jax.random.split(jax.random.key(0), 64)
    dropped = layers.dropout(jnp.ones((64, 16, 32)), keys, 0.1)
    assert abs(float((dropped == 0).mean()) - 0.1) < 0.01
    assert abs(float(dropped.mean()) - 1) < 0.01
    np.testing.assert_allclose(dropped[dropped != 0], 1 / 0.9, rtol=1e-4)


def test_dropout_of_a_row_depends_on_its_own_key_alone():
    keys, x = jax.random.split(jax.random.key(0), 4), jnp.ones((4, 8, 16))
    together = layers.dropout(x, keys, 0.5)
    np.testing.assert_array_equal(together[2:3], layers.dropout(x[:1], keys[2:3], 0.5))
    np.testing.assert_array_equal(together[::-1], layers.dropout(x, keys[::-1], 0.5))
    assert not np.array_equal(together[0], together[1])


def test_no_keys_or_no_rate_is_no_dropout():
    x = random((2, 3, 4))
    assert layers.dropout(x, None, 0.5) is x
    assert layers.dropout(x, jax.random.split(jax.random.key(0), 2), 0.0) is x


def test_the_choice_of_attention_fails_where_it_cannot_run():
    assert layers.choose_attention("auto", jnp.bfloat16, 64) == "xla"
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        layers.choose_attention("cudnn", jnp.bfloat16, 64)
    with pytest.raises(ValueError, match="auto, xla, cudnn"):
        layers.choose_attention("flash", jnp.bfloat16, 64)


def test_scan_applies_layers_in_order_and_hands_them_their_index():
    def layer(weight, index, x):
        return x * weight + index

    for unroll in (False, True):
        assert float(scan_layers(layer, jnp.array([2.0, 3.0, 5.0]), jnp.float32(1), unroll=unroll)) == 37


def test_layers_of_unequal_number_are_an_error():
    with pytest.raises(ValueError, match=r"number of layers: \[2, 3\]"):
        scan_layers(lambda w, i, x: x, {"a": jnp.ones(2), "b": jnp.ones(3)}, jnp.float32(1))


def test_an_unknown_remat_policy_is_an_error_listing_the_known_ones():
    with pytest.raises(ValueError, match=f"'everything'; choose one of {', '.join(REMAT)}"):
        check_remat("everything")
