"""Will it fit, and how fast would it be? Programs compiled for TPUs on a machine without one: `python -m softmask_jax.compile`."""
from softmask_jax.compile.topology import CHIPS, Topology, slice_of

__all__ = ["CHIPS", "Topology", "slice_of"]
