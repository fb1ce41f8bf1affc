"""The vocabulary over a mesh: the same values, gradients and draws as on one device."""
import re
from collections import Counter
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from softmask_jax.diffusion.vocab.head import Draw, Head, VocabSharding, cross_entropy, mixture, sweep

B, L, D, V, VPAD, MASK = 4, 3, 5, 500, 512, 499
# Shards of an odd number of columns, so that blocks of noise straddle them.
ODD = 502


@cache
def mesh(data, fsdp, tensor, sequence=1, dcn_data=1):
    axes = ("dcn_data", "data", "fsdp", "tensor", "sequence")
    return jax.make_mesh((dcn_data, data, fsdp, tensor, sequence), axes, axis_types=(AxisType.Auto,) * 5)


def arrays(vpad, batch=B):
    rng = np.random.default_rng(0)
    return dict(hidden=rng.normal(size=(batch, L, D)), weight=rng.normal(size=(vpad, D)), bias=rng.normal(size=vpad),
                temperature=np.float64(1.3), embedding=rng.normal(size=(vpad, 4)))


def everything(x, sharding, chunk, nucleus_p=0.9):
    """Values, gradients and draws of every function for a batch."""
    rng = np.random.default_rng(1)
    batch = x["hidden"].shape[0]
    targets = rng.integers(0, V - 1, (batch, L))
    cotangents = rng.normal(size=(batch, L)), rng.normal(size=(batch, L)), rng.normal(size=(batch, L, 4))
    head = partial(Head, vocab_size=V, mask_token_id=MASK, suppress_mask=True, sharding=sharding, chunk=chunk)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(4)))(jnp.arange(batch))
    gumbel = jnp.asarray(np.random.default_rng(2).gumbel(size=(batch, L, V)))

    some = jnp.asarray(np.random.default_rng(3).random((batch, L)) < 0.5)

    def loss(x, where=None):
        model = head(x["weight"], x["bias"])
        values = (cross_entropy(x["hidden"], model, targets, where=where),
                  *mixture(x["hidden"], model, x["temperature"], x["embedding"], where=where))
        return sum(jnp.vdot(a, b) for a, b in zip(values, cotangents)), values

    @jax.jit
    def run(x):
        model = head(x["weight"], x["bias"])
        frozen = jax.grad(lambda h: cross_entropy(h, model, targets, train_head=False).sum())(x["hidden"])
        draws = [Draw(keys=keys), Draw(gumbel=gumbel), Draw(keys=keys, nucleus_p=nucleus_p),
                 Draw(gumbel=gumbel, nucleus_p=nucleus_p)]
        found = [sweep(x["hidden"], model, k=4, temperature=1.3, draw=draw) for draw in draws]
        tilted = Draw(keys=keys, bias=jnp.linspace(-2, 2, len(x["bias"])))
        wanted = sweep(x["hidden"], model, k=4, draw=tilted, where=some)
        found.append(jax.tree.map(lambda x: jnp.where(some.reshape(some.shape + (1,) * (x.ndim - 2)), x, 0), wanted))
        graded = jax.value_and_grad(loss, has_aux=True)
        return graded(x), graded(x, some), frozen, found
    return run(x)


@cache
def on_one_device(vpad, batch=B):
    with jax.enable_x64(True):
        return everything(arrays(vpad, batch), None, None)


assert_same = partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape, vpad, chunk", [
    ((1, 2, 2, 1, 2), VPAD, 128), pytest.param((2, 2, 2), ODD, 128, marks=pytest.mark.full), ((4, 1, 1), VPAD, None),
])  # fmt: skip
def test_a_mesh_gives_the_values_gradients_and_draws_of_one_device(shape, vpad, chunk):
    with jax.enable_x64(True):
        assert_same(everything(arrays(vpad), VocabSharding(mesh(*shape)), chunk), on_one_device(vpad))


@pytest.mark.full
@pytest.mark.parametrize("shape", [(1, 2, 1, 3), (2, 1, 1, 2)])
def test_positions_over_a_mesh_change_nothing(shape):
    """Three positions over three devices; two devices cannot share them and compute all."""
    with jax.enable_x64(True):
        spread = VocabSharding(mesh(*shape), sequence_axis="sequence")
        assert_same(everything(arrays(VPAD), spread, 128), on_one_device(VPAD))


@pytest.mark.full
def test_rows_that_do_not_divide_over_the_mesh_are_computed_all_the_same():
    with jax.enable_x64(True):
        assert_same(everything(arrays(VPAD, 3), VocabSharding(mesh(1, 2, 4)), None), on_one_device(VPAD, 3))


def test_equal_logits_on_different_shards_give_the_lowest_ids():
    head = Head(jnp.zeros((VPAD, D)), None, V, 1, True, VocabSharding(mesh(2, 2, 2)))
    found = jax.jit(partial(sweep, k=3, draw=Draw(gumbel=jnp.zeros((B, L, V)))))(jnp.zeros((B, L, D)), head)
    assert np.all(found.token_ids == np.array([0, 2, 3])) and np.all(found.top_logits == 0) and np.all(found.drawn == 0)


def collectives(function, *args) -> dict[str, int]:
    """How many collective operations of each kind the optimised program has."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return dict(Counter(re.findall(r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text)))


def test_the_collectives_are_those_that_the_docstring_counts():
    x, keys = arrays(VPAD), jax.random.split(jax.random.key(0), B)
    targets = jnp.zeros((B, L), jnp.int32)

    def head(weight, bias):
        return Head(weight, bias, V, MASK, True, VocabSharding(mesh(2, 2, 2)), chunk=128)

    def nll(hidden, weight, bias, train_head=True, where=None):
        return cross_entropy(hidden, head(weight, bias), targets, where=where, train_head=train_head)

    def gradient(argnums, **options):
        return jax.grad(lambda *args: nll(*args, **options).sum(), argnums)

    args = [jnp.asarray(x[name], jnp.float32) for name in ("hidden", "weight", "bias")]
    assert collectives(lambda h, w, b: sweep(h, head(w, b), k=3), *args) == {"all-reduce": 2, "all-gather": 2}
    drawn = collectives(lambda h, w, b: sweep(h, head(w, b), k=3, draw=Draw(keys=keys)), *args)
    assert drawn == {"all-reduce": 3, "all-gather": 2}
    assert collectives(nll, *args) == {"all-reduce": 2}
    assert collectives(partial(nll, where=targets == 0), *args) == {"all-reduce": 2}
    # Forward, d hidden over the vocabulary, the head's gradient over the rows.
    assert collectives(gradient((0, 1, 2)), *args) == {"all-reduce": 2 + 1 + 1}
    assert collectives(gradient(0, train_head=False), *args) == {"all-reduce": 2 + 1}


def test_a_vocabulary_that_does_not_divide_is_one_clear_error():
    head = Head(jnp.zeros((501, D)), None, V, MASK, True, VocabSharding(mesh(2, 2, 2)))
    with pytest.raises(ValueError, match="pad the vocabulary to a multiple of 256"):
        sweep(jnp.zeros((B, L, D)), head, k=1)
