"""Arrays that tests share within a process."""
import functools

import jax


def made_once(make):
    """`functools.cache` for functions that return arrays: a first call inside a traced function keeps no tracer."""

    @functools.cache
    def once(*args, **kwargs):
        with jax.ensure_compile_time_eval():
            return make(*args, **kwargs)

    return functools.wraps(make)(once)
