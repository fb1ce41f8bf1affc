"""Programs compiled for TPUs on a machine without one, to see whether they fit and how fast they would be."""
from softmask_jax.compile.topology import Topology, slice_of

__all__ = ["Topology", "slice_of"]
