"""Samplers: compiled loops over swappable parts, frozen dataclasses called with parameters and keys."""
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softmask_jax.diffusion.soft_mask import SoftMask
    from softmask_jax.samplers.blocks import BlockSampler
    from softmask_jax.samplers.constraints import Constraints
    from softmask_jax.samplers.draws import Draws
    from softmask_jax.samplers.dream import DreamSampler
    from softmask_jax.samplers.dream_generate import diffusion_generate, soft_mask_from
    from softmask_jax.samplers.filling import fill
    from softmask_jax.samplers.mdlm import MDLMSampler, recorded_gumbel
    from softmask_jax.samplers.options import Options
    from softmask_jax.samplers.result import Generated, Trace

__all__ = ["BlockSampler", "Constraints", "DreamSampler", "Draws", "Generated", "MDLMSampler", "Options", "SoftMask",
           "Trace", "diffusion_generate", "fill", "recorded_gumbel", "soft_mask_from"]

if not TYPE_CHECKING:
    # `Options` and `SoftMask` should not load JAX.
    _MODULES = {
        "BlockSampler": "blocks", "Constraints": "constraints", "DreamSampler": "dream", "Draws": "draws",
        "Generated": "result", "MDLMSampler": "mdlm", "Options": "options", "SoftMask": "options", "Trace": "result",
        "diffusion_generate": "dream_generate", "fill": "filling", "recorded_gumbel": "mdlm",
        "soft_mask_from": "dream_generate",
    }  # fmt: skip

    def __getattr__(name: str):
        if name in _MODULES:
            return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__]
