"""Samplers: compiled loops over swappable parts, frozen dataclasses called with parameters and keys."""
from softmask_jax.samplers.mdlm import Ancestral, Samples, recorded_gumbel

__all__ = ["Ancestral", "Samples", "recorded_gumbel"]
