"""Samplers: compiled loops over swappable parts, frozen dataclasses called with parameters and keys."""
from softmask_jax.samplers.mdlm import Ancestral, Samples, ancestral_step, recorded_gumbel

__all__ = ["Ancestral", "Samples", "ancestral_step", "recorded_gumbel"]
