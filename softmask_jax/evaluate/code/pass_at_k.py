"""pass@k, the chance that one of k programs is right, with its interval."""
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri

from softmask_jax.evaluate.task import Estimate

Z = float(ndtri(0.975))
PERCENT = {"unit": "%", "better": "higher"}


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate for one problem (arXiv 2107.03374, eq. 1). ValueError for more programs than samples."""
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} programs, {correct} of them right, is not defined.")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def wilson(mean: float, count: int) -> tuple[float, float]:
    """95 % interval of the mean of `count` values in [0, 1] (Wilson 1927); it has a width even at 0 and 1."""
    centre, scale = mean + Z * Z / (2 * count), 1 + Z * Z / count
    half = Z * math.sqrt(max(mean * (1 - mean), 0.0) / count + (Z / (2 * count)) ** 2)
    # Exact at 0 and 1.
    return 0.0 if mean == 0 else (centre - half) / scale, 1.0 if mean == 1 else (centre + half) / scale


def estimate(values: Sequence[float]) -> Estimate:
    """Mean pass@k of problems in percent, with the interval over problems of this kind."""
    mean = float(np.mean(values))
    low, high = wilson(mean, len(values))
    return Estimate(100 * mean, 100 * low, 100 * high, len(values), **PERCENT)


def difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Mean of `values` - `baseline`, pass@k of the same problems, in percent, with its paired interval, which adds half
    a problem to each way in which two verdicts can differ (Agresti and Min 2005)."""
    differences = np.asarray(values, np.float64) - np.asarray(baseline, np.float64)
    count = len(differences) + 2
    centre = float(differences.sum()) / count
    half = Z * math.sqrt(max(float((differences**2).sum() + 1) / count - centre**2, 0.0) / count)
    low, high = max(centre - half, -1.0), min(centre + half, 1.0)
    return Estimate(100 * float(differences.mean()), 100 * low, 100 * high, len(differences), **PERCENT)
