"""The chunked vocabulary against the plain formulas in float64, and its compiled programs."""
import re
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.diffusion.vocab import positions
from softmask_jax.diffusion.vocab.head import Draw, Head, VocabSharding, cross_entropy, mixture, sweep
from softmask_jax.diffusion.vocab.online_softmax import top_k

B, L, D, V, VPAD, MASK, K = 2, 3, 5, 300, 340, 7, 3
HOT = 1.7


def arrays(dtype=np.float64, seed=0):
    """hidden, weight, bias, embedding, temperature, targets, and weights of a scalar loss for nll, entropy, mix."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(dtype)  # noqa: E731
    targets = rng.integers(8, V, (B, L))
    return dict(hidden=normal(B, L, D), weight=normal(VPAD, D), bias=normal(VPAD), embedding=normal(VPAD, 4),
                temperature=dtype(HOT)), targets, (normal(B, L), normal(B, L), normal(B, L, 4))


def results(inputs, targets, cotangents, head, train_head=True, where=None):
    """Every function's values, and the gradients of a weighted sum of cross-entropy, entropy and mixture."""
    def loss(x):
        model = head(x["weight"], x.get("bias"))
        nll = cross_entropy(x["hidden"], model, targets, where=where, train_head=train_head)
        neg_entropy, mix = mixture(x["hidden"], model, x["temperature"], x["embedding"], where=where)
        total = sum(jnp.vdot(a, b) for a, b in zip((nll, neg_entropy, mix), cotangents))
        return total, (nll, neg_entropy, mix)
    (_, values), grads = jax.value_and_grad(loss, has_aux=True)(inputs)
    found = sweep(inputs["hidden"], head(inputs["weight"], inputs.get("bias")), k=K, temperature=HOT)
    return values, grads, found._asdict()


def plain(inputs, targets, cotangents, suppress, train_head=True):
    """The same from the dense formulas, on the columns that exist, by automatic differentiation."""
    ids = np.array([v for v in range(V) if not (suppress and v == MASK)])
    stop = jax.lax.stop_gradient

    def logits(hidden, weight, bias):
        z = jnp.einsum("bld,vd->blv", hidden, weight)
        return (z if bias is None else z + bias)[..., ids]

    def loss(x):
        head = x["weight"], x.get("bias")
        z = logits(x["hidden"], *(head if train_head else stop(head)))
        at = np.searchsorted(ids, targets)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(z), at[..., None], -1)[..., 0]
        logp = jax.nn.log_softmax(stop(logits(x["hidden"], *head)) / x["temperature"])
        neg_entropy, mix = (jnp.exp(logp) * logp).sum(-1), jnp.exp(logp) @ x["embedding"][ids]
        total = sum(jnp.vdot(a, b) for a, b in zip((nll, neg_entropy, mix), cotangents))
        return total, (nll, neg_entropy, mix)

    (_, values), grads = jax.value_and_grad(loss, has_aux=True)(inputs)
    z = logits(inputs["hidden"], inputs["weight"], inputs.get("bias"))
    top, at = jax.lax.top_k(z, K)
    return values, grads, dict(token_ids=jnp.asarray(ids)[at], top_logits=top, neg_entropy=values[1],
                               logsumexp=jax.nn.logsumexp(z / HOT, -1), drawn=None, drawn_score=None, drawn_log_p=None)


def assert_close(got, want, tolerance):
    chex.assert_trees_all_close(got, want, rtol=tolerance, atol=tolerance)


@cache
def plain_program(suppress, train_head):
    _, targets, _ = arrays()
    return jax.jit(lambda x, cotangents: plain(x, targets, cotangents, suppress, train_head))


@cache
def expected(suppress, bias, train_head=True):
    """`plain` in float64, compiled once."""
    inputs, _, cotangents = arrays()
    if not bias:
        del inputs["bias"]
    with jax.enable_x64(True):
        return plain_program(suppress, train_head)(inputs, cotangents)


@pytest.mark.parametrize("suppress, bias", [(True, True), (False, False)], ids=["mask suppressed, bias", "neither"])
@pytest.mark.parametrize("chunk", [None, 128, VPAD], ids=["dense", "three windows", "one window"])
def test_every_value_and_gradient_equals_the_dense_formula_in_float64(chunk, suppress, bias):
    inputs, targets, cotangents = arrays()
    if not bias:
        del inputs["bias"]
    want = expected(suppress, bias)
    with jax.enable_x64(True):
        head = partial(Head, vocab_size=V, mask_token_id=MASK, suppress_mask=suppress, chunk=chunk)
        got = jax.jit(lambda x: results(x, targets, cotangents, head))(inputs)
        assert got[0][0].dtype == jnp.float64 and got[2]["token_ids"].dtype == jnp.int32
        assert_close(got, want, 1e-12)
    assert not np.any(got[1]["weight"][V:]) and not np.any(got[1]["embedding"][V:])
    assert bool(np.any(got[1]["embedding"][MASK])) != suppress


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("chunk", [None, 128], ids=["dense", "chunked"])
def test_wanted_positions_alone_have_values_and_gradients(chunk, share, monkeypatch):
    # Four positions a block: the second of the two blocks of 6 positions has two past the end.
    monkeypatch.setattr(positions, "MIN_BLOCK", 4)
    inputs, targets, cotangents = arrays()
    where = np.random.default_rng(2).permutation(B * L).reshape(B, L) < share * B * L
    cut = lambda x: np.where(where.reshape(where.shape + (1,) * (np.ndim(x) - 2)), x, 0.0)  # noqa: E731
    # At positions that nobody wants targets may not exist and the prediction may overflow.
    targets = np.where(where, targets, VPAD)
    with jax.enable_x64(True):
        head = partial(Head, vocab_size=V, mask_token_id=MASK, suppress_mask=True, chunk=chunk)
        run = jax.jit(lambda x, where: results(x, targets, cotangents, head, where=where))
        want = plain_program(True, True)(inputs, [cut(c) for c in cotangents])
        got = run(inputs, jnp.asarray(where))
        assert_close(got[:2], (tuple(map(cut, want[0])), want[1]), 1e-12)
        overflowing = inputs | {"hidden": np.where(where[..., None], inputs["hidden"], 1e200)}
        assert_close(run(overflowing, jnp.asarray(where))[:2], got[:2], 1e-12)


@pytest.mark.parametrize("chunk", [None, 128], ids=["dense", "chunked"])
def test_a_frozen_head_gets_no_gradient_and_hidden_states_the_same(chunk):
    inputs, targets, cotangents = arrays()
    with jax.enable_x64(True):
        head = partial(Head, vocab_size=V, mask_token_id=MASK, suppress_mask=True, chunk=chunk)
        got = jax.jit(lambda x: results(x, targets, cotangents, head, train_head=False))(inputs)
        assert_close(got, expected(True, True, train_head=False), 1e-12)
    assert not np.any(got[1]["weight"]) and not np.any(got[1]["bias"]) and np.any(got[1]["hidden"])


def test_the_mixture_and_the_sweep_cut_the_gradient_of_hidden_states_and_head():
    inputs, _, _ = arrays(np.float32)

    def loss(hidden, weight, chunk):
        head = Head(weight, None, V, MASK, True, chunk=chunk)
        found = sweep(hidden, head, k=2)
        return sum(x.sum() for x in (*mixture(hidden, head, 1.0, inputs["embedding"]), *found[1:4]))
    for chunk in (None, 128):
        grads = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(inputs["hidden"], inputs["weight"], chunk)
        assert not any(np.any(g) for g in grads)


@pytest.mark.parametrize("chunk", [None, 128], ids=["dense", "chunked"])
def test_bfloat16_hidden_states_give_float32_results_near_the_float32_ones(chunk):
    inputs, targets, cotangents = arrays(np.float32)
    exact = {k: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for k, x in inputs.items()}
    head = partial(Head, vocab_size=V, mask_token_id=MASK, suppress_mask=True, chunk=chunk)
    run = jax.jit(lambda x: results(x, targets, cotangents, head))
    values, grads, found = run({**exact, "hidden": exact["hidden"].astype(jnp.bfloat16)})
    want = run(exact)
    assert grads["hidden"].dtype == jnp.bfloat16 and grads["weight"].dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in (*values, found["top_logits"]))
    assert_close(found, want[2], 1e-5)
    assert_close(values[:2], want[0][:2], 1e-5)
    for name, grad in grads.items():
        scale = np.abs(want[1][name]).max()
        np.testing.assert_allclose(grad.astype(jnp.float32) / scale, want[1][name] / scale, atol=0.02)


def test_equal_logits_give_equal_values_and_the_lowest_ids():
    hidden = jnp.zeros((1, 2, D))
    for chunk in (None, 128):
        head = Head(jnp.ones((VPAD, D)), None, V, 1, True, chunk=chunk)
        found = jax.jit(partial(sweep, k=K))(hidden, head)
        assert np.all(found.top_logits == 0.0) and np.all(found.token_ids == np.array([0, 2, 3]))
        np.testing.assert_allclose(found.neg_entropy, -np.log(V - 1), rtol=1e-6)
        np.testing.assert_allclose(cross_entropy(hidden, head, jnp.full((1, 2), 9)), np.log(V - 1), rtol=1e-6)


def test_top_k_by_blocks_is_top_k_lowest_position_first():
    values = np.random.default_rng(0).integers(0, 40, (4, 3, 2000)).astype(np.float32)
    values[0] = 5
    for k in (1, 3, 5):
        got, want = jax.jit(top_k, static_argnums=1)(values, k), jax.lax.top_k(values, k)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


def test_extreme_logits_stay_finite_and_padding_never_leaks():
    inputs, targets, _ = arrays(np.float32)
    weight = inputs["weight"] * 1e4
    weight[V:] = weight[MASK] = np.inf
    for chunk in (None, 128):
        head = Head(weight, None, V, MASK, True, chunk=chunk)
        draw = Draw(keys=jax.random.split(jax.random.key(0), B))
        found = jax.jit(partial(sweep, k=K))(inputs["hidden"], head, draw=draw)
        values = (*found, jax.jit(cross_entropy)(inputs["hidden"], head, targets))
        chex.assert_tree_all_finite(values)
        np.testing.assert_allclose(found.neg_entropy, 0.0, atol=1e-6)
        assert np.all(found.drawn == found.token_ids[..., 0])


def test_a_target_that_does_not_exist_has_infinite_loss_and_no_gradient():
    inputs, targets, _ = arrays(np.float32)
    targets = targets.copy()
    targets[0] = MASK, V, -100
    for chunk in (None, 128):
        head = partial(Head, vocab_size=V, mask_token_id=MASK, suppress_mask=True, chunk=chunk)

        @jax.jit
        def run(hidden, weight):
            nll, back = jax.vjp(lambda h, w: cross_entropy(h, head(w, None), targets), hidden, weight)
            return nll, *back(jnp.ones_like(nll))
        nll, d_hidden, d_weight = run(inputs["hidden"], inputs["weight"])
        assert np.all(np.isinf(nll[0])) and np.all(np.isfinite(nll[1]))
        assert not np.any(d_hidden[0]) and np.all(np.isfinite(d_weight)) and np.any(d_hidden[1])


# --- compiled programs ---

BIG = dict(B=2, L=64, V=8192, D=16)
LIMIT = BIG["B"] * BIG["L"] * BIG["V"] // 4


def large_buffers(function, *args):
    """Shapes with LIMIT elements or more in the optimised program."""
    text = jax.jit(function).lower(*args).compile().as_text()
    shapes = {m for m in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)}
    return [s for s in shapes if np.prod([int(n) for n in s.split(",")], dtype=np.int64) >= LIMIT]


def big_inputs():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    return shape(BIG["B"], BIG["L"], BIG["D"]), shape(BIG["V"], BIG["D"]), shape(BIG["V"])


def big_head(weight, bias):
    return Head(weight, bias, BIG["V"] - 5, 3, True)


def test_no_compiled_cross_entropy_holds_a_quarter_of_the_logits_forward_or_backward():
    targets = jnp.zeros((BIG["B"], BIG["L"]), jnp.int32)

    def loss(hidden, weight, bias):
        return cross_entropy(hidden, big_head(weight, bias), targets).sum()

    def dense(hidden, weight, bias):
        return -jax.nn.log_softmax(jnp.einsum("bld,vd->blv", hidden, weight) + bias)[..., 0].sum()
    assert large_buffers(jax.value_and_grad(loss, (0, 1, 2)), *big_inputs()) == []
    assert large_buffers(jax.value_and_grad(dense, (0, 1, 2)), *big_inputs()) != []


def test_no_compiled_sweep_or_mixture_holds_a_quarter_of_the_logits():
    keys = jax.random.split(jax.random.key(0), BIG["B"])

    def sweeps(hidden, weight, bias):
        head = big_head(weight, bias)
        return [sweep(hidden, head, k=3, draw=Draw(keys=keys, nucleus_p=p)) for p in (1.0, 0.9)]

    def mix(hidden, weight, temperature):
        neg_entropy, mixed = mixture(hidden, big_head(weight, None), temperature, weight)
        return (neg_entropy + mixed.sum(-1)).sum()

    def dense(hidden, weight, bias):
        p = jax.nn.softmax(jnp.einsum("bld,vd->blv", hidden, weight) + bias)
        return (p * jnp.log(p)).sum(-1), jax.lax.top_k(p, 3)
    hidden, weight, bias = big_inputs()
    assert large_buffers(sweeps, hidden, weight, bias) == []
    assert large_buffers(jax.value_and_grad(mix, (1, 2)), hidden, weight, jax.ShapeDtypeStruct((), jnp.float32)) == []
    assert large_buffers(dense, hidden, weight, bias) != []


def test_bad_input_is_one_clear_error():
    hidden, head = jnp.zeros((2, 3, D)), Head(jnp.zeros((VPAD, D)), None, V, MASK, True)
    keys = jax.random.split(jax.random.key(0), 2)
    bad = [
        ("same D", lambda: sweep(jnp.zeros((2, 3, D + 1)), head, k=1)),
        ("vocab_size must be", lambda: sweep(hidden, Head(jnp.zeros((9, D)), None, 10, 3, True), k=1)),
        ("k must be between 1 and the 299", lambda: sweep(hidden, head, k=300)),
        ("exactly one", lambda: sweep(hidden, head, k=1, draw=Draw())),
        ("nucleus_p", lambda: sweep(hidden, head, k=1, draw=Draw(keys=keys, nucleus_p=0.0))),
        ("typed keys", lambda: sweep(hidden, head, k=1, draw=Draw(keys=keys[:1]))),
        ("B L V", lambda: sweep(hidden, head, k=1, draw=Draw(gumbel=jnp.zeros((2, 3, VPAD))))),
        ("where must be bool", lambda: cross_entropy(hidden, head, jnp.zeros((2, 3), int), where=jnp.ones((2, 3)))),
        ("targets must be integers", lambda: cross_entropy(hidden, head, jnp.zeros((2, 3)))),
        ("embedding must be", lambda: mixture(hidden, head, 1.0, jnp.zeros((V, D)))),
        ("Head.chunk", lambda: sweep(hidden, Head(head.weight, None, V, MASK, True, chunk=0), k=1)),
        ("VocabSharding names", lambda: sweep(hidden, Head(head.weight, None, V, MASK, True, VocabSharding(
            jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)))), k=1)),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            call()
