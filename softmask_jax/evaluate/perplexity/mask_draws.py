"""Draws of t for every window.

The t of a window's M draws lie in M equal parts of [0, 1], one in each; the W windows share each part in W strata, in
random order. So all W x M values cover [0, 1] evenly, and every single one is uniform. t within its stratum and the
masks depend on (seed, draw, window's number), the stratum on (seed, windows, draws); not on batches, devices or models.
"""
import functools
from typing import NamedTuple

import jax
import numpy as np

from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.distributed import sharding


class Strata(NamedTuple):
    """Strata of t of W windows under M draws."""

    stratum: np.ndarray  # [W M] int32
    count: np.ndarray  # [W M] int32, of equal parts of [0, 1]


def stratified(windows: int, draws: int, seed: int) -> Strata:
    """Strata jointly over windows and draws; see the module."""
    random = np.random.default_rng([seed, windows, draws])
    # A window's draws cycle through the parts from a random one.
    part = (random.integers(draws, size=(windows, 1)) + np.arange(draws)) % draws
    within = np.stack([random.permutation(windows) for _ in range(draws)], 1)
    stratum = part * windows + np.take_along_axis(within, part, 1)
    return Strata(stratum.astype(np.int32), np.full_like(stratum, windows * draws, np.int32))


def of_the_reference(windows: int, batch_size: int) -> Strata:
    """One draw a window, stratified within each batch in the order of the text; the last batch has fewer strata."""
    number = np.arange(windows, dtype=np.int32)[:, None]
    last = windows % batch_size
    return Strata(number % batch_size, np.where(number < windows - last, batch_size, last).astype(np.int32))


@functools.lru_cache(maxsize=4)
def nelbo_program(denoiser, objective: Nelbo, mesh: jax.sharding.Mesh):
    """(params, batch, draw, key) -> columns [B]; compiled once for all texts of a model."""

    def score(params, batch, draw, key):
        noisy = objective.draw(
            batch["tokens"], batch["index"], batch["count"], key, draw, mask_token_id=denoiser.mask_token_id,
            strata=batch["stratum"],
        )  # fmt: skip
        scores = two_pass.row_scores(denoiser, objective.soft_mask, params, noisy)
        nats = {name: values * batch["tokens"].shape[1] for name, values in scores.loss.items()}
        unweighted = {f"{name}_cross_entropy": sums for name, sums in scores.cross_entropy.items()}
        return {"t": noisy.t, "masked": scores.masked} | nats | unweighted

    # Replicated: every host reads all results.
    return jax.jit(score, out_shardings=sharding.replicated(mesh))
