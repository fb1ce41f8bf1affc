"""Numbers depend on keys and parameters, not on what a process or its environment has set for JAX."""
import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax import config, samplers
from softmask_jax.config import jax_settings
from softmask_jax.config.jax_settings import KEY_IMPL, checked_key, root_key
from softmask_jax.data import make_tokenizer
from softmask_jax.distributed import hosts
from softmask_jax.generate.model import Model
from softmask_jax.io import run_folder
from softmask_jax.models import denoiser
from softmask_jax.training import loop
from tests.helpers import tiny_run

# Every setting that is held, at another value than the held one.
OTHER = {
    "enable_x64": True, "default_prng_impl": "unsafe_rbg", "threefry_partitionable": False,
    "numpy_dtype_promotion": "strict", "numpy_rank_promotion": "raise", "softmax_custom_jvp": True,
    "legacy_prng_key": "error", "debug_key_reuse": True,
}  # fmt: skip
SEEDS = (0, 1, 2**31 + 5, 2**32 - 1, -1, 2**40 + 7)


@contextlib.contextmanager
def elsewhere(settings=OTHER, offset: int = 5):
    """A process that has set all this."""
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(getattr(jax, name)(value))
        stack.callback(jax.config.update, "jax_random_seed_offset", 0)
        jax.config.update("jax_random_seed_offset", offset)
        yield


def test_every_held_setting_is_tried_at_another_value():
    assert OTHER.keys() == jax_settings.HELD.keys() and all(OTHER[name] != jax_settings.HELD[name] for name in OTHER)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_makes_the_key_that_jax_makes_without_any_setting(seed):
    expected = jax.random.key_data(jax.random.key(seed))
    with elsewhere():
        np.testing.assert_array_equal(jax.random.key_data(root_key(seed)), expected)


def test_a_key_of_another_implementation_is_refused_and_a_raw_one_is_read():
    raw = jax.random.PRNGKey(3)
    assert (jax.random.key_data(checked_key(raw)) == raw).all() and checked_key(root_key(3)).dtype == root_key(0).dtype
    assert checked_key(jnp.stack([raw, raw])).shape == (2,)
    for key, what in (
        (jax.random.key(0, impl="rbg"), "is of rbg, whose draws depend on the batch"),
        (jax.random.PRNGKey(0, impl="rbg"), r"is ArrayImpl uint32 \(4,\)"), (0, "is int"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"The key {what}; pass jax.random.key\(seed, impl='{KEY_IMPL}'\)"):
            checked_key(key)


@pytest.fixture(scope="module")
def model():
    settings = config.from_dict(tiny_run.settings(Path("unused")))
    tokenizer = make_tokenizer(settings.data, [], Path("unused"))
    sizes = {"vocab_size": tokenizer.vocab_size, "mask_token_id": tokenizer.mask_token_id}
    built = denoiser.build(settings.model, settings.soft_mask, **sizes)
    return Model(settings, tokenizer, built, jax.jit(built.init)(root_key(0)), 0)


# int64, as numpy has them.
TOKENS = np.arange(32).reshape(2, 16)
CALLS = {
    "logits": lambda model: model.logits(TOKENS),
    "nelbo": lambda model: model.nelbo(TOKENS, root_key(2)),
    "generate": lambda model: model.generate(
        np.where(TOKENS % 2, TOKENS, model.mask_token_id), key=root_key(7), steps=2, temperature=0.9).tokens,
    "fill": lambda model: model.fill(
        np.where(TOKENS % 2, TOKENS, model.mask_token_id), keys=jnp.stack([root_key(1), root_key(2)]),
        options=samplers.Options(alg="origin", steps=2, top_k=5)).tokens,
}  # fmt: skip


@pytest.mark.parametrize("call", ["logits", *(pytest.param(name, marks=pytest.mark.full) for name in CALLS if name != "logits")])
def test_a_model_answers_the_same_in_a_process_with_other_settings(model, call):
    expected = np.asarray(CALLS[call](model))
    with elsewhere():
        found = np.asarray(CALLS[call](model))
    assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


def test_a_model_refuses_keys_of_the_default_implementation_where_that_is_another(model):
    with jax.default_prng_impl("rbg"):
        for call in (lambda key: model.generate(count=1, steps=1, key=key), lambda key: model.nelbo(np.zeros((1, 16), int), key)):
            with pytest.raises(ValueError, match="The key is of rbg"):
                call(jax.random.key(0))


@pytest.mark.parametrize("flag", ["--xla_cpu_enable_fast_math=true", "--xla_gpu_enable_fast_min_max=1", "--xla_cpu_enable_fast_math"])
def test_fast_math_of_the_compiler_is_refused_before_anything_is_written(monkeypatch, tmp_path, flag):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/x {flag}")
    with pytest.raises(ValueError, match=f"XLA_FLAGS has {flag}, with which NaN and infinity go unnoticed; remove it"):
        loop.train(config.from_dict({}), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_setting_that_can_neither_work_nor_be_held_is_refused(model):
    jax.config.update("jax_error_checking_behavior_oob", "raise")
    try:
        with pytest.raises(ValueError, match="JAX_ERROR_CHECKING_BEHAVIOR_OOB is 'raise'; only 'ignore' works here"):
            model.logits(TOKENS)
    finally:
        jax.config.update("jax_error_checking_behavior_oob", "ignore")


def test_what_the_user_chose_is_recorded_and_must_be_the_same_on_all_hosts(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_dump_to=/x")
    monkeypatch.setattr(jax_settings, "RECORDED", {"jax_default_matmul_precision": None})
    assert jax_settings.chosen() == ""
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/y --xla_b=1 --xla_a=2")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with jax.default_matmul_precision("highest"):
        expected = "jax_default_matmul_precision=highest; XLA_FLAGS=--xla_a=2 --xla_b=1; NVIDIA_TF32_OVERRIDE=0"
        assert run_folder.versions()["settings"] == hosts.prints({})["the settings of JAX and XLA"] == expected


@pytest.mark.full
def test_a_run_is_the_same_to_the_last_bit_in_a_process_with_other_settings(tmp_path):
    home = tiny_run.Home(tmp_path)
    changed = dict(train__steps=4, eval__every=0, model__dropout=0.1)
    ours, _ = home.run("ours", **changed)
    with elsewhere():
        theirs, _ = home.run("theirs", **changed)
    assert tiny_run.summary(ours) == tiny_run.summary(theirs) and tiny_run.rows(ours) == tiny_run.rows(theirs)
    tiny_run.assert_identical(ours, theirs, 4)


def test_a_flag_that_is_no_attribute_of_jax_config_is_recorded_too():
    assert "jax_disable_most_optimizations=True" in jax_settings.chosen()  # of all tests
