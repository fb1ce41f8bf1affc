"""MAUVE (arXiv 2102.01454; JMLR 2023) from precomputed features, by `mauve-text`, with faiss and scikit-learn.

It normalises, reduces and clusters both sides' features together, and compares their histograms over the clusters."""
import contextlib
import dataclasses
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Mauve:
    """MAUVE and the library's other numbers."""

    value: float  # in (0, 1], higher is nearer
    star: float  # the same of smoothed histograms
    frontier_integral: float  # lower is nearer
    buckets: int  # clusters


def check_installed() -> None:
    """ImportError, one line, without the library."""
    missing = [name for name in ("mauve", "faiss", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"MAUVE needs mauve-text ({', '.join(missing)} missing): pip install 'softmask_jax[eval]', "
                          "or leave it out with config.generative.references=none.")


def mauve(references: np.ndarray, samples: np.ndarray, *, scaling: float = 5.0, seed: int = 25, buckets: int = 0) -> Mauve:
    """MAUVE of features [N D] and [M D]. scaling: c in exp(-c KL); seed: of the clustering; buckets: clusters, 0 for a
    tenth of the smaller side (at least 2). ValueError for more clusters than features."""
    check_installed()
    ours, theirs = len(samples), len(references)
    if buckets > theirs + ours:
        raise ValueError(f"config.generative.mauve_buckets is {buckets}, more than the {theirs} + {ours} texts.")
    with _quiet():
        import mauve as library

        # The clustering depends on the order: P are the references, as in the soft-masking and ReMDM references.
        out = library.compute_mauve(
            p_features=references, q_features=samples, num_buckets=buckets or "auto", mauve_scaling_factor=scaling,
            seed=seed, verbose=False,
        )  # fmt: skip
    return Mauve(float(out.mauve), float(out.mauve_star), float(out.frontier_integral), int(out.num_buckets))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the clustering's C++: it asks for 39 texts a cluster, the library's own choice is 20."""
    sys.stdout.flush(), sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere, warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
        saved = {number: os.dup(number) for number in (1, 2)}
        try:
            for number in saved:
                os.dup2(nowhere.fileno(), number)
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for number, copy in saved.items():
                os.dup2(copy, number)
                os.close(copy)
