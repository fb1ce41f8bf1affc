"""Quick compiles, where little is computed and much compiled."""
import contextlib

import jax

QUICK_COMPILES = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_disable_most_optimizations": True}


@contextlib.contextmanager
def quick_compiles():
    """Leave out LLVM's expensive passes: a third of the time of a test, and no more than rounding changes."""
    before = {name: jax.config.values[name] for name in QUICK_COMPILES}
    try:
        for name, value in QUICK_COMPILES.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
