"""Validation perplexity: the NELBO of held-out windows with one pass and with soft-masking's two, on the same masks.

The bound is an upper bound on -log p(x) (MDLM, arXiv 2406.07524, eq. 10); its exponential per token is what the
papers call perplexity.
"""
import dataclasses
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
    """Per-window NELBO sums of one estimate: `windows` [W] nats; L tokens each."""

    windows: np.ndarray
    tokens_per_window: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.windows.mean()) / self.tokens_per_window

    @property
    def standard_error(self) -> float:
        """Of the mean, over windows (0 where there is just one)."""
        count = len(self.windows)
        return float(self.windows.std(ddof=1)) / math.sqrt(count) / self.tokens_per_window if count > 1 else 0.0

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.mean, 700.0))

    def interval(self, other: "Nats | None" = None) -> tuple[float, float] | tuple[None, None]:
        """95 % interval of the mean, or of the paired difference to `other` on the same masks; nats per token. None for
        both ends of a single window."""
        paired = self if other is None else Nats(self.windows - other.windows, self.tokens_per_window)
        return student(paired.mean, paired.standard_error, len(paired.windows))


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """`evaluate(params, batches, n, seed) -> {"one_pass": Nats, "two_pass": Nats}`; compiled once per batch shape.

    A binary model (variant "none") has only "one_pass".
    """

    denoiser: object
    objective: Nelbo
    mesh: jax.sharding.Mesh

    def __post_init__(self):
        # Every host reads every row's result.
        everywhere = sharding.replicated(self.mesh)
        object.__setattr__(self, "_step", jax.jit(self._rows, static_argnums=2, out_shardings=everywhere))

    def _rows(self, params, batch, n, key):
        # Windows come in the order of their documents: without a permutation the last ones would always get a large t.
        strata = jax.random.permutation(jax.random.fold_in(key, n), n)[batch["index"]]
        noisy = self.objective.draw(
            batch["tokens"], batch["index"], n, key, 0, mask_token_id=self.denoiser.mask_token_id, strata=strata
        )
        scores, length = two_pass.row_scores(self.denoiser, self.objective.soft_mask, params, noisy), noisy.x0.shape[1]
        return {name: values * length for name, values in scores.loss.items()}, batch["valid"]

    @settled()
    def __call__(self, params: dict, batches: Iterable[dict], n: int, seed: int) -> dict[str, Nats]:
        """NELBO of every valid window.

        Args:
          batches: of {"tokens" [B L], "index" [B] the window's number, "valid" [B]}; noise is keyed by the number, so
            a window has the same masks in any batch and for any model.
          n: windows in all, over which t is stratified.
        """
        key, parts, length = root_key(seed), {}, 0
        for batch in batches:
            length = batch["tokens"].shape[1]
            wanted = {name: batch[name] for name in ("tokens", "index", "valid")}
            rows, valid = self._step(params, sharding.global_batch(wanted, self.mesh), n, key)
            for name, values in rows.items():
                parts.setdefault(name, []).append(np.asarray(values, np.float64)[np.asarray(valid)])
        if not parts:
            raise ValueError("The validation split holds no window: give it more documents (config.data.validation_*).")
        return {name: Nats(np.concatenate(values), length) for name, values in parts.items()}
