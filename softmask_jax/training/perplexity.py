"""Validation perplexity: exp of the NELBO per token, an upper bound on -log p(x) (MDLM, arXiv 2406.07524, eq. 10)."""
import dataclasses
import itertools
import math
from collections.abc import Iterable

import jax
import numpy as np

from softmask_jax.config.jax_settings import root_key, settled
from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.distributed import sharding
from softmask_jax.training.intervals import student


@dataclasses.dataclass(frozen=True)
class Nats:
    """NELBO of windows."""

    windows: np.ndarray  # [W] sums over a window's tokens, nats
    tokens_per_window: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.windows.mean()) / self.tokens_per_window

    @property
    def standard_error(self) -> float:
        """Of the mean over windows; 0 for a single one."""
        count = len(self.windows)
        return float(self.windows.std(ddof=1)) / math.sqrt(count) / self.tokens_per_window if count > 1 else 0.0

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.mean, 700.0))

    def interval(self, other: "Nats | None" = None) -> tuple[float, float] | tuple[None, None]:
        """95 % interval of the mean, or of the paired difference to `other`; none for one window. Nats per token."""
        paired = self if other is None else Nats(self.windows - other.windows, self.tokens_per_window)
        return student(paired.mean, paired.standard_error, len(paired.windows))


class Perplexity:
    """`perplexity(params, batches, n, seed) -> {"one_pass": Nats, "two_pass": Nats}` on the same masks; a binary model
    (variant "none") has only "one_pass"."""

    def __init__(self, denoiser, objective: Nelbo, mesh: jax.sharding.Mesh):
        self.denoiser, self.objective, self.mesh = denoiser, objective, mesh
        # Replicated: every host reads all results.
        self._step = jax.jit(self._rows, static_argnums=2, out_shardings=sharding.replicated(mesh))

    def _rows(self, params, batch, n, key):
        # Windows are ordered by document: without a permutation the last ones would always get a large t.
        index, mask_token_id = batch["index"], self.denoiser.mask_token_id
        strata = jax.random.permutation(jax.random.fold_in(key, n), n)[index]
        noisy = self.objective.draw(batch["tokens"], index, n, key, 0, mask_token_id=mask_token_id, strata=strata)
        scores, length = two_pass.row_scores(self.denoiser, self.objective.soft_mask, params, noisy), noisy.x0.shape[1]
        return {name: values * length for name, values in scores.loss.items()}, batch["valid"]

    @settled()
    def __call__(self, params: dict, batches: Iterable[dict], n: int, seed: int) -> dict[str, Nats]:
        """NELBO of every valid window; t is stratified over all `n`.

        batches: {"tokens" [B L], "index" [B], "valid" [B]}; noise is keyed by the window's index, so a window has the
        same masks in any batch and for any model."""
        key, batches = root_key(seed), iter(batches)
        if (first := next(batches, None)) is None:
            raise ValueError("The validation split holds no window: give it more documents (config.data.validation_*).")
        fields = ("tokens", "index", "valid")
        inputs = ({name: batch[name] for name in fields} for batch in itertools.chain([first], batches))
        sums = collect(self._step(params, sharding.global_batch(batch, self.mesh), n, key) for batch in inputs)
        return {name: Nats(values, first["tokens"].shape[1]) for name, values in sums.items()}


def collect(batches: Iterable[tuple[dict, jax.Array]]) -> dict[str, np.ndarray]:
    """Values [W] float64 of the valid rows by name, from ({name: values [B]}, valid [B]) of each batch."""
    parts = {}
    for rows, valid in batches:
        for name, values in rows.items():
            parts.setdefault(name, []).append(np.asarray(values, np.float64)[np.asarray(valid)])
    return {name: np.concatenate(values) for name, values in parts.items()}
