"""What trains is float32 whatever it comes as; non-finite values are found wherever a checkpoint holds them."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax import config
from softmask_jax.diffusion.soft_masking import init_scalars
from softmask_jax.distributed import sharding
from softmask_jax.models import denoiser, dream_denoiser
from softmask_jax.training import optimizer, train_state, train_step
from tests.helpers import dream_model


@pytest.fixture(scope="module")
def trees():
    """As they are saved: float arrays, and the optimiser's integer counters."""
    params = {"backbone": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "soft_mask": init_scalars(scale=0.5)}
    state = train_state.fresh(params, optimizer.make(config.Optimizer(), 10))
    return {"params": state.params, "ema": state.ema, "optimizer": state.opt_state}


def test_finite_trees_are_finite(trees):
    assert bool(train_state.all_finite(trees))


@pytest.mark.parametrize("tree", ["params", "ema", "optimizer"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_value_in_any_array_is_found(trees, tree, value):
    leaves, structure = jax.tree.flatten(trees[tree])
    floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(floating) == {"params": 6, "ema": 2, "optimizer": 12}[tree]
    for i in floating:
        bad = leaves[i].at[(-1,) * leaves[i].ndim].set(value)
        changed = jax.tree.unflatten(structure, [*leaves[:i], bad, *leaves[i + 1 :]])
        assert not bool(train_state.all_finite(trees | {tree: changed}))


def dtypes(tree) -> set[str]:
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.number)}


@pytest.mark.parametrize(("options", "frozen"), [
    ({"kind": "dit", "hidden_size": 32, "num_heads": 2, "num_blocks": 2}, set()),
    ({"kind": "dream", "param_dtype": "bfloat16"}, set()),
    ({"kind": "dream", "param_dtype": "bfloat16", "adapter": "lora"}, {"bfloat16"}),
    ({"kind": "dream", "param_dtype": "bfloat16", "adapter": "dora"}, {"bfloat16"}),
    ({"kind": "dream", "param_dtype": "bfloat16", "adapter": "dora", "base_dtype": "int8"}, {"bfloat16", "int8", "float32"}),
], ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "")  # fmt: skip
def test_what_trains_its_moments_and_its_average_are_float32_and_a_frozen_base_is_what_it_was(options, frozen):
    if options["kind"] == "dit":
        model = denoiser.build(config.Model(**options), config.SoftMask(), vocab_size=97, mask_token_id=96)
    else:
        model = dream_denoiser.build(config.Model(base="-", **options), config.SoftMask(), dream_model.config_json())
    tx = optimizer.make(config.Optimizer(), 10)
    state = train_state.abstract(model, tx, sharding.make_mesh(devices=jax.devices()[:1]))
    assert dtypes(state.params) == dtypes(state.ema) == {"float32"} and dtypes(state.frozen) == frozen
    assert dtypes(state.opt_state) == {"float32", "int32"}


def test_of_1400_updates_with_a_constant_gradient_every_weight_moves_by_the_sum_of_their_rates():
    """In bfloat16 an update of 1e-5 is lost beside any weight above 0.005."""
    recipe = config.load("configs/dream7b.py").optimizer
    tx, steps = optimizer.make(recipe, 33_500), 1400
    weights = 0.02 * jax.random.normal(jax.random.key(0), (64, 64))
    start = train_state.fresh({"backbone": {"w": weights.astype(jnp.bfloat16)}, "soft_mask": init_scalars()}, tx)
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 1e-4, x.dtype), start.params)
    names = ("masked", "xent_sum", "xent_count", "lambda_sum", "lambda_hist", "top_k_hits", "fed_back")
    sums, coins = dict.fromkeys(names, jnp.zeros(())), jnp.ones(1, bool)

    @jax.jit
    def run(state):
        one = lambda state, _: (train_step.update(tx, 0.0, state, grads, jnp.zeros(()), coins, sums)[0], None)  # noqa: E731
        return jax.lax.scan(one, state, length=steps)[0]

    end, rate = run(start), optimizer.learning_rate(recipe.learning_rate, recipe, 33_500)
    moved = np.asarray(start.params["backbone"]["w"] - end.params["backbone"]["w"])
    assert (moved != 0).all()
    np.testing.assert_allclose(moved, sum(float(rate(n)) for n in range(steps)), rtol=2e-3)
