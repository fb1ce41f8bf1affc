"""Soft-masked diffusion language models in JAX (arXiv 2510.17206)."""


def __getattr__(name: str):
    # `import softmask_jax.data` and the like should not load JAX.
    if name in ("load", "Model"):
        from softmask_jax.generate import load as loading

        return getattr(loading, name)
    raise AttributeError(f"module 'softmask_jax' has no attribute '{name}'")
