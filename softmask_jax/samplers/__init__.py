"""Samplers: compiled loops over swappable parts, frozen dataclasses called with parameters and keys."""
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.samplers.blocks import BlockSampler
from softmask_jax.samplers.constraints import Constraints
from softmask_jax.samplers.decoding import Draws
from softmask_jax.samplers.dream import DreamSampler
from softmask_jax.samplers.dream_generate import diffusion_generate, soft_mask_from
from softmask_jax.samplers.mdlm import MDLMSampler, recorded_gumbel
from softmask_jax.samplers.options import Options, fill
from softmask_jax.samplers.result import Generated, Trace

__all__ = ["BlockSampler", "Constraints", "DreamSampler", "Draws", "Generated", "MDLMSampler", "Options", "SoftMask",
           "Trace", "diffusion_generate", "fill", "recorded_gumbel", "soft_mask_from"]
