"""Moved to `softmask_jax.generate.notebook`; this name is removed in the next release."""
from softmask_jax.generate.notebook import *  # noqa: F403
