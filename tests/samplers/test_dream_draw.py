"""One look at the vocabulary: filters, draws and confidences against recorded and dense answers."""
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.diffusion.vocab.head import Draw, Head, VocabSharding
from softmask_jax.samplers import dream_draw
from softmask_jax.samplers.dream_draw import Filters, filtered, predict
from tests.golden import load

FUNCTIONS = "dream_generate/sampling_fns.npz"
CONFIDENCE = {"probability": "sample_plain", "margin": "sample_margin", "entropy": "sample_entropy"}
SIZES = {"D": 16, "V": 1400, "L": 7}


def identity_head(size: int, **options) -> Head:
    """With it the hidden states are the logits."""
    return Head(jnp.eye(size), None, size, size - 2, False, **options)


def see(logits, **options) -> dream_draw.Predicted:
    logits = jnp.asarray(logits)[None]
    out = predict(logits, identity_head(logits.shape[-1]), jnp.ones(logits.shape[:2], bool), Filters(**options))
    return jax.tree.map(lambda x: x[0], out)


def sorted_filter(y: np.ndarray, top_p: float | None, top_k: int | None) -> np.ndarray:
    """The reference's filters by sorting, in float64."""
    y = y.astype(np.float64).copy()
    if top_p is not None:
        order = np.argsort(-y, -1, kind="stable")
        p = softmax(np.take_along_axis(y, order, -1))
        drop = np.cumsum(p, -1) > top_p
        drop[..., 1:], drop[..., 0] = drop[..., :-1].copy(), False
        np.put_along_axis(y, order, np.where(drop, -np.inf, np.take_along_axis(y, order, -1)), -1)
    if top_k is not None:
        y[y < np.sort(y, -1)[..., [-top_k]]] = -np.inf
    return y


def softmax(y: np.ndarray) -> np.ndarray:
    p = np.exp(y - y.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("kind, value", [
    ("top_p", 0.9), ("top_p", 0.5), ("top_p", 0.05), ("top_k", 1), ("top_k", 5), ("top_k", 50),
])  # fmt: skip
def test_filters_match_the_recorded_ones(kind, value):
    z = load(FUNCTIONS)
    top_p, top_k = (value, None) if kind == "top_p" else (None, value)
    out = np.asarray(filtered(jnp.asarray(z["logits"]), top_p, top_k))
    expected = z[f"{kind}_{value}"]
    kept = expected > np.finfo(np.float32).min
    np.testing.assert_array_equal(out > -np.inf, kept)
    np.testing.assert_array_equal(out[kept], expected[kept])


@pytest.mark.parametrize("confidence", CONFIDENCE)
def test_arg_max_and_confidences_match_the_recorded_ones(confidence):
    z, name = load(FUNCTIONS), CONFIDENCE[confidence]
    out = see(z["logits"], confidence=confidence)
    np.testing.assert_array_equal(out.drawn, z[f"{name}/x0"])
    np.testing.assert_allclose(out.confidence, z[f"{name}/confidence"], atol=2e-6)


@pytest.mark.parametrize("name, options", [
    ("sample_top_p", {"top_p": 0.9, "confidence": "probability"}),
    ("sample_top_p_k", {"top_p": 0.9, "top_k": 5, "confidence": "entropy"}),
])  # fmt: skip
def test_confidences_of_filtered_distributions_match_the_recorded_ones(name, options):
    z = load(FUNCTIONS)
    out = see(z["logits"], **options)
    np.testing.assert_array_equal(out.drawn, z[f"{name}/x0"])
    np.testing.assert_allclose(out.confidence, z[f"{name}/confidence"], atol=2e-6)


@pytest.mark.parametrize("temperature", (0.2, 1.0))
def test_the_temperature_comes_before_the_filters(temperature):
    z = load(FUNCTIONS)
    out = filtered(jnp.asarray(z["logits"]) / temperature, 0.9, None)
    np.testing.assert_allclose(jax.nn.softmax(out, -1), z[f"probs_temp{temperature}_top_p0.9"], atol=3e-6)


def test_the_nucleus_keeps_the_token_that_crosses_p_and_the_lower_id_between_equals():
    y = jnp.log(jnp.asarray([[0.125, 0.5, 0.125, 0.25], [0.25, 0.25, 0.25, 0.25], [0.0, 0.9, 0.1, 0.0]]))
    kept = lambda top_p: (np.asarray(filtered(y, top_p, None)) > -np.inf).tolist()  # noqa: E731
    # At exactly p the next token stays as well: it is dropped only above p.
    assert kept(0.5) == [[False, True, False, True], [True, True, True, False], [False, True, False, False]]
    assert kept(0.76) == [[True, True, False, True], [True, True, True, True], [False, True, False, False]]
    assert kept(0.01) == [[False, True, False, False], [True, False, False, False], [False, True, False, False]]


@pytest.mark.parametrize("spread", (0.01, 1.0, 8.0))
def test_the_nucleus_is_what_sorting_keeps(spread):
    y = spread * np.random.default_rng(0).normal(size=(8, 3000)).astype(np.float32)
    for top_p in (1e-6, 0.3, 0.9, 0.999):
        out = np.asarray(jax.jit(filtered, static_argnums=(1, 2))(jnp.asarray(y), top_p, 700))
        expected = sorted_filter(y, top_p, 700)
        # float32 sums may decide otherwise only where a token stands right at p
        assert ((out > -np.inf) != (expected > -np.inf)).sum() <= 1


def random_case(batch: int = 4):
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(batch, SIZES["L"], SIZES["D"])), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(1536, SIZES["D"])), jnp.float32)
    wanted = jnp.asarray(rng.random((batch, SIZES["L"])) < 0.7)
    return hidden, weight, wanted, jax.random.split(jax.random.key(3), batch)


def dense_logits(hidden, weight) -> np.ndarray:
    return np.einsum("bld,vd->blv", np.asarray(hidden, np.float64), np.asarray(weight[: SIZES["V"]], np.float64))


def make(**head_options):
    hidden, weight, wanted, keys = random_case()
    head = Head(weight, None, SIZES["V"], 5, False, **head_options)
    filters = Filters(temperature=0.7, top_p=0.8, top_k=300, confidence="probability")
    return jax.jit(lambda *a: predict(a[0], head, a[1], filters, k=3, draw=Draw(keys=a[2])))(hidden, wanted, keys)


whole = functools.cache(make)


def same_where_wanted(one, other):
    wanted = np.asarray(random_case()[2])
    one, other = (jax.tree.map(lambda x: np.asarray(x)[wanted], out) for out in (one, other))
    chex.assert_trees_all_close(one, other, rtol=2e-5, atol=2e-5)


def test_feedback_is_of_the_plain_logits_and_confidence_of_the_filtered_ones():
    hidden, weight, wanted, _ = random_case()
    z, wanted, out = dense_logits(hidden, weight), np.asarray(wanted), whole()
    p = softmax(z)
    np.testing.assert_array_equal(np.asarray(out.token_ids)[wanted], np.argsort(-z, -1)[..., :3][wanted])
    np.testing.assert_allclose(np.asarray(out.top_logits)[wanted], -np.sort(-z, -1)[..., :3][wanted], atol=2e-5)
    np.testing.assert_allclose(np.asarray(out.neg_entropy)[wanted], (p * np.log(p)).sum(-1)[wanted], atol=2e-5)
    q = softmax(sorted_filter(z / 0.7, 0.8, 300))
    of_drawn = np.take_along_axis(q, np.asarray(out.drawn)[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.asarray(out.confidence)[wanted], of_drawn[wanted], rtol=1e-4)


@pytest.mark.parametrize("block, tile", [(3, 1), (6, 2), (7, 2)])
def test_the_sizes_of_a_block_and_its_tiles_change_nothing(monkeypatch, block, tile):
    expected = whole()
    for name, size in (("DENSE_BLOCK", block * 1536), ("TILE", 1), ("LEAST_TILE", tile)):
        monkeypatch.setattr(dream_draw, name, size)
    assert dream_draw.block_size(14, SIZES["D"], 1536) == block // tile * tile
    same_where_wanted(expected, make())


def test_a_nucleus_of_all_but_a_rounding_error_keeps_all():
    y = jax.random.normal(jax.random.key(0), (64, 1000)) / 2
    top_p = float(np.nextafter(np.float32(1), np.float32(0)))
    assert (jax.nn.softmax(y, -1).sum(-1) <= top_p).any()  # the masses of some rows add up to less than 1
    assert (jax.jit(lambda y: filtered(y, top_p, None))(y) > -jnp.inf).all()


@pytest.mark.parametrize("shape", [pytest.param((1, 4), marks=pytest.mark.full), (2, 2)])
def test_rows_and_vocabulary_over_devices_change_nothing(shape):
    devices = np.array(jax.devices()[:4]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("data", "tensor"))
    same_where_wanted(whole(), make(sharding=VocabSharding(mesh, ("data",), "tensor")))


def test_draws_follow_the_filtered_distribution():
    n, logits = 40_000, np.random.default_rng(2).normal(size=300).astype(np.float32)
    keys, hidden = jax.random.split(jax.random.key(0), 1), jnp.broadcast_to(jnp.asarray(logits), (1, n, 300))
    filters = Filters(temperature=0.8, top_p=0.7, top_k=60)
    out = jax.jit(lambda: predict(hidden, identity_head(300), jnp.ones((1, n), bool), filters, draw=Draw(keys)))()
    p = softmax(sorted_filter(logits / 0.8, 0.7, 60))
    seen = np.bincount(np.asarray(out.drawn)[0], minlength=300)
    assert not seen[p == 0].any()
    chi_square = ((seen - n * p) ** 2 / np.where(p > 0, n * p, 1))[p > 0].sum()
    freedom = (p > 0).sum() - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_a_suppressed_mask_is_not_drawn_but_still_fed_back():
    logits = jnp.zeros((1, 1, 200)).at[..., 198].set(9.0).at[..., 7].set(3.0)
    wanted = jnp.ones((1, 1), bool)
    plain, without = (
        predict(logits, identity_head(200), wanted, Filters(confidence="probability"), k=1, suppress_mask=suppress)
        for suppress in (False, True)
    )
    assert int(plain.drawn[0, 0]) == 198 and int(without.drawn[0, 0]) == 7
    assert int(without.token_ids[0, 0, 0]) == 198
    np.testing.assert_allclose(without.confidence, np.exp(3) / (np.exp(3) + 198), rtol=1e-5)


def test_nan_and_infinite_logits_are_reported_where_they_are_wanted():
    logits = jnp.zeros((4, 2, 200)).at[0, 0, 3].set(jnp.nan).at[1, 1, 3].set(jnp.inf).at[2, 1, 3].set(jnp.nan)
    wanted = jnp.ones((4, 2), bool).at[2, 1].set(False)
    head = Head(jnp.ones((200, 1)), None, 200, 198, False)
    filters = Filters(top_p=0.9, confidence="entropy")
    out = jax.jit(lambda hidden: predict(hidden, head, wanted, filters, k=2))(logits.sum(-1, keepdims=True))
    np.testing.assert_array_equal(out.finite, [[False, True], [True, False], [True, True], [True, True]])


@pytest.mark.parametrize("options, says", [
    ({"temperature": -0.1}, "temperature must be 0"), ({"temperature": float("nan")}, "temperature must be 0"),
    ({"top_p": 0.0}, "top_p must be in"), ({"top_p": 1.1}, "top_p must be in"), ({"top_k": 0}, "top_k must be"),
    ({"top_k": 2.5}, "top_k must be"), ({"confidence": "sure"}, "choose one of none, probability"),
])  # fmt: skip
def test_filters_out_of_range_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Filters(**options)


def test_noise_that_does_not_fit_is_refused():
    logits, wanted, head = jnp.zeros((1, 2, 200)), jnp.ones((1, 2), bool), identity_head(200)
    with pytest.raises(ValueError, match="either keys"):
        predict(logits, head, wanted, Filters(temperature=1.0))
    with pytest.raises(ValueError, match=r"\[B L V\]"):
        predict(logits, head, wanted, Filters(temperature=1.0), draw=Draw(gumbel=jnp.zeros((1, 2, 199))))
    with pytest.raises(ValueError, match="k must be"):
        predict(logits, head, wanted, Filters(), k=201)


def test_blocks_of_positions_grow_with_the_head_so_that_reading_it_again_is_a_small_part():
    assert dream_draw.block_size(10_000, 3584, 152_064) == 3584 // 8  # logits of 260 MiB, a head of 1 GiB
    assert dream_draw.block_size(10_000, 896, 50_304) == 328  # a small head: logits of 64 MiB
    assert dream_draw.block_size(32, 3584, 152_064) == 32
