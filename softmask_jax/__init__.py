"""Soft-masked diffusion language models in JAX."""
