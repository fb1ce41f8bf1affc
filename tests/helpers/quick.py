"""Quick compiles, where little is computed and much compiled."""
import contextlib

import jax

QUICK_COMPILES = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_disable_most_optimizations": True}


@contextlib.contextmanager
def jax_settings(values: dict):
    """Settings of `jax.config` until the end of a block."""
    before = {name: jax.config.values[name] for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def quick_compiles():
    """Leave out LLVM's expensive passes: a third of the time of a test, and no more than rounding changes."""
    return jax_settings(QUICK_COMPILES)


def optimised():
    """Undo it, where the older emitters of `xla_flags` are wrong without optimisation."""
    return jax_settings({"jax_disable_most_optimizations": False})
