"""Moved to `softmask_jax.evaluate`; this name is removed in the next release."""
