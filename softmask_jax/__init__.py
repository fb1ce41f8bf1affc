"""Soft-masked diffusion language models in JAX (arXiv 2510.17206).

`load("runs/stdlib")` opens a trained model, a `Model`; `python -m softmask_jax` lists the commands."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softmask_jax.generate.load import load
    from softmask_jax.generate.model import Model

__version__ = "0.1.0"
__all__ = ["Model", "load"]


if not TYPE_CHECKING:  # type checkers would take any name for one that is there

    def __getattr__(name: str):
        # `import softmask_jax.data` and the like should not load JAX.
        if name in __all__:
            from softmask_jax.generate import load as loading

            return getattr(loading, name)
        raise AttributeError(f"module 'softmask_jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
