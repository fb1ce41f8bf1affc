"""Samplers: compiled loops over swappable parts, frozen dataclasses called with parameters and keys."""
from softmask_jax.samplers.dream import DreamSampler, Draws, Generated, SoftMasking
from softmask_jax.samplers.dream_generate import diffusion_generate, soft_mask_from
from softmask_jax.samplers.mdlm import Ancestral, Samples, ancestral_step, recorded_gumbel

__all__ = ["Ancestral", "DreamSampler", "Draws", "Generated", "Samples", "SoftMasking", "ancestral_step",
           "diffusion_generate", "recorded_gumbel", "soft_mask_from"]
