"""LLaDA's network against the recorded PyTorch model: logits, hidden states, masks, embeddings as input."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softmask_jax
from softmask_jax.models.nn import dream, layers, llada_config
from tests.golden import load
from tests.helpers import llada_model

RECORDED = {
    "tiny": "llada/forward.npz", "tiny_gqa_sharded": "llada/forward_gqa.npz", "tiny_tied": "llada/forward_tied.npz",
}  # fmt: skip
WITHIN = 1e-4


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Converted models by name, opened by `load`."""
    folder = tmp_path_factory.mktemp("llada")
    return {name: softmask_jax.load(llada_model.converted(name, folder / name)) for name in llada_model.NAMES}


@pytest.mark.parametrize("name", RECORDED)
def test_logits_match_the_reference_with_all_rows_of_the_embedding(loaded, name):
    z, about = load(RECORDED[name]), llada_model.config_json(name)
    out = loaded[name].logits(z["full/input_ids"])
    assert out.shape[-1] == (about["embedding_size"] or about["vocab_size"])
    np.testing.assert_allclose(out, z["full/logits"], atol=WITHIN)


@pytest.mark.parametrize("name, side", [("tiny", "right"), ("tiny", "left"), ("tiny_gqa_sharded", "left")])
def test_padding_is_hidden_and_moves_no_position(loaded, name, side):
    z, model = load(RECORDED[name]), loaded[name]
    tokens, mask = z[f"{side}/input_ids"], z[f"{side}/attention_mask"]
    out = np.asarray(model.logits(tokens, mask))
    np.testing.assert_allclose(out[mask == 1], z[f"{side}/logits"][mask == 1], atol=WITHIN)
    # What stands at padding makes no difference, and a row of padding alone stays finite.
    other = np.asarray(model.logits(np.where(mask, tokens, 7), mask))
    np.testing.assert_array_equal(other[mask == 1], out[mask == 1])
    assert np.isfinite(model.logits(tokens, mask * np.array([[1], [0], [1]]))).all()


def test_padding_in_the_middle_of_a_row_keeps_the_positions_behind_it(loaded):
    tokens, mask = load(RECORDED["tiny"])["full/input_ids"][:1], np.ones((1, 24), int)
    mask[:, 9:12] = 0
    out = loaded["tiny"].logits(tokens, mask)
    params, network = loaded["tiny"].params, loaded["tiny"].denoiser
    kept = np.flatnonzero(mask[0])
    config = llada_model.llada_config_of("tiny")
    x = network.embed(params["backbone"], tokens[:, kept])
    hidden = dream.trunk(config)(params["backbone"], x, positions=kept)[0]
    head = network.head(params["backbone"])
    alone = jnp.matmul(hidden, head.weight.T, precision="highest")[..., : head.vocab_size]
    np.testing.assert_allclose(np.asarray(out)[:, kept], alone, atol=WITHIN)


def test_a_row_with_a_mask_of_two_segments_matches_the_reference(loaded):
    z, params = load(RECORDED["tiny"]), loaded["tiny"].params
    bias = z["bias4d/attention_bias"][0, 0]
    segments = 1 + np.cumsum(np.r_[False, ~bias[np.arange(23), np.arange(1, 24)]])
    np.testing.assert_array_equal(segments[:, None] == segments, bias)
    x = llada_model.model().embed(params["backbone"], z["bias4d/input_ids"])
    out = llada_model.logits("tiny", params, x, segment_ids=jnp.asarray(segments)[None])
    np.testing.assert_allclose(out, z["bias4d/logits"], atol=WITHIN)


def test_logits_of_mixed_embeddings_match_the_reference(loaded):
    z, params = load(RECORDED["tiny"]), loaded["tiny"].params
    rows = llada_model.model().embedding(params["backbone"])[z["embeds/indices"]]
    out = llada_model.logits("tiny", params, (z["embeds/probs"][..., None] * rows).sum(2))
    np.testing.assert_allclose(out, z["embeds/logits"], atol=WITHIN)


def test_hidden_states_and_the_first_layer_match_the_reference_inside(loaded):
    z, backbone = load(RECORDED["tiny"]), loaded["tiny"].params["backbone"]
    config = llada_model.llada_config_of("tiny")
    x = dream.embed(backbone, z["full/input_ids"])
    cos, sin = angles = layers.rotary_angles(jnp.arange(24), config.head_width, config.rope_base)
    np.testing.assert_allclose(np.tile(cos[0, :, 0], 2), z["rope/cos"], atol=1e-6)
    np.testing.assert_allclose(np.tile(sin[0, :, 0], 2), z["rope/sin"], atol=1e-6)
    for i, expected in enumerate(z["full/hidden_states"][:-1]):
        np.testing.assert_allclose(x, expected, atol=2e-5)
        layer = dream.layer(config, jax.tree.map(lambda leaf: leaf[i], backbone["layers"]))
        if i == 0:
            normed = layer.attn_norm(x[:1])
            np.testing.assert_allclose(normed, z["layer0/normed"], atol=5e-6)
            np.testing.assert_allclose(layer.attention(normed, angles, None), z["layer0/attn_out"], atol=5e-6)
        x = layer(x, angles, None)
    np.testing.assert_allclose(dream.trunk(config)(backbone, dream.embed(backbone, z["full/input_ids"]))[0],
                               z["full/hidden_states"][-1], atol=2e-5)


def test_a_bfloat16_model_is_as_close_to_float32_as_the_reference(loaded):
    z = load(RECORDED["tiny"])
    out = np.asarray(loaded["tiny_bf16"].logits(z["full/input_ids"]), np.float32)
    mine, theirs = np.abs(out - z["full/logits"]), np.abs(z["full/logits_bf16"] - z["full/logits"])
    assert 0 < mine.mean() < 1.3 * theirs.mean() and mine.max() < 1.5 * theirs.max()


def test_a_tied_head_is_the_embedding_and_trains_with_it(loaded):
    params, network = loaded["tiny_tied"].params, loaded["tiny_tied"].denoiser
    assert "head" not in params["backbone"] and "head" not in network.axes["backbone"]
    assert network.head(params["backbone"]).weight is params["backbone"]["embed"]["table"]
    assert network.num_params == sum(leaf.size for leaf in jax.tree.leaves(params["backbone"])) - 84 * 32


def test_the_published_8b_model_has_as_many_parameters_as_its_checkpoint():
    sizes = {
        "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
        "vocab_size": 126464, "embedding_size": 126464,
    }  # fmt: skip
    config = llada_config.from_hf(llada_model.config_json() | sizes)
    assert dream.num_params(config) == 8_015_581_184 and config.head_width == 128
