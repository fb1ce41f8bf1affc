"""Settings of JAX and XLA that decide numbers: held at one value, refused, or recorded; random keys."""
import contextlib
import numbers
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

# With it keyed draws depend on the key alone; rbg's depend on the batch.
KEY_IMPL = "threefry2x32"
# Context managers of `jax`, and the values that hold here, whatever the process has set.
HELD = {
    "enable_x64": False,
    "default_prng_impl": KEY_IMPL,
    "threefry_partitionable": True,
    "numpy_dtype_promotion": "standard",
    "numpy_rank_promotion": "allow",
    "softmax_custom_jvp": False,
    "legacy_prng_key": "allow",
    "debug_key_reuse": False,  # its checker takes a key that is folded twice for one that is used twice
}
# Flags of `jax.config` without a context manager; at other values JAX's vectorised draws fail.
NEEDED = {f"jax_error_checking_behavior_{what}": "ignore" for what in ("nan", "divide", "oob")}
# Flags of XLA that assume no NaN or infinity: a diverged run would be saved.
FAST_MATH = tuple(f"{name}{value}" for name in ("fast_math", "fast_min_max") for value in ("", "=true", "=1"))
# The user's choice between speed and rounding: flags of `jax.config` with their defaults, and variables.
RECORDED = {
    "jax_default_matmul_precision": None,
    "jax_accurate_erf_inv": False,
    "jax_allow_f16_reductions": True,
    "jax_disable_jit": False,
    "jax_disable_most_optimizations": False,
    "jax_optimization_level": "UNKNOWN",
    "jax_use_direct_linearize": True,
    "jax_use_hlo_logistic_lowering": None,
    "jax_use_shardy_partitioner": True,
}
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
# Parts of the names of compiler flags that may differ between the hosts of a run.
_INDIFFERENT = ("dump", "cache", "profile", "host_platform_device_count")


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Hold `HELD` in this thread; decorates public entry points. ValueError for settings that cannot be held."""
    for name, value in NEEDED.items():
        if (now := _flag(name, value)) != value:
            raise ValueError(f"{name.upper()} is '{now}'; only '{value}' works here.")
    for name in VARIABLES[:2]:
        for flag in os.environ.get(name, "").split():
            if flag.lower().endswith(FAST_MATH):
                raise ValueError(f"{name} has {flag}, with which NaN and infinity go unnoticed; remove it.")
    with contextlib.ExitStack() as stack:
        for name, value in HELD.items():
            stack.enter_context(getattr(jax, name)(value))
        yield


def chosen() -> str:
    """Settings of `RECORDED` and `VARIABLES` that differ from the default, as "name=value; ..."."""
    values = {name: _flag(name, default) for name, default in RECORDED.items()}
    changed = [f"{name}={value}" for name, value in values.items() if value != RECORDED[name]]
    for name in VARIABLES:
        flags = [flag for flag in os.environ.get(name, "").split() if not any(part in flag for part in _INDIFFERENT)]
        changed += [f"{name}={' '.join(sorted(flags))}"] if flags else []
    return "; ".join(changed)


def _flag(name: str, default):
    """A flag of `jax.config` in this thread, `default` where this JAX has no such flag."""
    # Some flags are per process only, not attributes.
    return getattr(jax.config, name, jax.config.values.get(name, default))


def root_key(seed: int) -> jax.Array:
    """jax.random.key(seed) whatever implementation, offset or integer size the process has set."""
    return jax.random.wrap_key_data(np.array([0, seed & 0xFFFFFFFF], np.uint32), impl=KEY_IMPL)


def checked_seed(seed: int) -> int:
    """The seed. ValueError unless it is an integer of 32 bits."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**32:
        shown = seed if isinstance(seed, numbers.Real) else type(seed).__name__
        raise ValueError(f"seed must be an integer in 0 .. 2**32 - 1, not {shown}.")
    return int(seed)


def checked_key(key: jax.Array) -> jax.Array:
    """Typed keys of `KEY_IMPL` [...], from such or from raw ones [... 2]. ValueError for anything else."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if (impl := str(jax.random.key_impl(key))) == KEY_IMPL:
            return key
        kind = f"is of {impl}, whose draws depend on the batch"
    elif dtype == np.uint32 and key.shape[-1:] == (2,):
        return jax.random.wrap_key_data(key, impl=KEY_IMPL)
    else:
        kind = f"is {type(key).__name__} {'' if dtype is None else f'{dtype} {key.shape}'}".rstrip()
    raise ValueError(f"The key {kind}; pass jax.random.key(seed, impl='{KEY_IMPL}').")
