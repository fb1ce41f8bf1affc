"""Trees of arrays beside each other."""
import chex
import jax
import numpy as np


def assert_trees_close(ours, theirs, relative: float) -> None:
    """Equal within a fraction of each array's largest entry."""
    scales = jax.tree.map(lambda leaf: max(float(np.abs(leaf).max()), 1e-6), theirs)
    ours, theirs = (jax.tree.map(lambda x, s: np.asarray(x, np.float64) / s, tree, scales) for tree in (ours, theirs))
    chex.assert_trees_all_close(ours, theirs, rtol=0, atol=relative)
