"""Draws of t and masks for every window, and their scores by a model.

The estimate of a window is the mean over its M draws, whose t lie in M equal parts of [0, 1], one in each. The W windows
share each part in W strata, in random order: all W x M values of t cover [0, 1] evenly, and every single draw is uniform.
t within its stratum and the masks depend on (seed, draw, number of the window), the stratum on (seed, windows, draws),
and neither on batches, devices or models.
"""
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from softmask_jax.config.jax_settings import root_key
from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.distributed import sharding
from softmask_jax.evaluate.pieces import Piece
from softmask_jax.evaluate.task import Work


class Strata(NamedTuple):
    """Strata of t of windows under draws: their numbers [W M] int32, and how many there are, [W M] int32."""

    place: np.ndarray
    count: np.ndarray


def stratified(windows: int, draws: int, seed: int) -> Strata:
    """Strata jointly over windows and draws; see the module."""
    random = np.random.default_rng([seed, windows, draws])
    # A window's draws take the parts in a cycle from a random one on.
    part = (random.integers(draws, size=(windows, 1)) + np.arange(draws)) % draws
    within = np.stack([random.permutation(windows) for _ in range(draws)], 1)
    place = part * windows + np.take_along_axis(within, part, 1)
    return Strata(place.astype(np.int32), np.full_like(place, windows * draws, np.int32))


def of_the_reference(windows: int, batch_size: int) -> Strata:
    """The reference's validation: one draw a window, stratified within each batch in the order of the text. Row i of n
    draws from the i-th of n strata; the last batch has fewer."""
    number = np.arange(windows, dtype=np.int32)[:, None]
    last = windows % batch_size
    count = np.where(number < windows - last, batch_size, last).astype(np.int32)
    return Strata(number % batch_size, count)


def padded_to(batch_size: int, mesh: jax.sharding.Mesh) -> int:
    """The least number of rows, `batch_size` or more, that the devices share evenly."""
    shards = sharding.row_shards(mesh)
    return -(-batch_size // shards) * shards


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """Called with a piece, returns its columns [n].

    Attributes:
      gather: batch of (window numbers, piece).
      program: (params, batch, draw, key, *extra) -> columns [B].
      numbers: of the measured windows [W], ascending; strata: theirs, or None where the program draws t alone.
      rows: of a batch.
    """

    work: Work
    gather: Callable[[np.ndarray, Piece], Mapping]
    program: Callable
    numbers: np.ndarray
    strata: Strata | None
    rows: int
    seed: int
    extra: tuple = ()

    def __call__(self, piece: Piece) -> dict[str, np.ndarray]:
        index = piece.filled(self.rows)
        batch = dict(self.gather(index, piece))
        if self.strata is not None:
            window = np.searchsorted(self.numbers, index)
            batch |= {"place": self.strata.place[window, piece.draw], "count": self.strata.count[window, piece.draw]}
        batch = sharding.global_batch(batch, self.work.mesh)
        params, draw, key = self.work.model.params, np.int32(piece.draw), root_key(self.seed)
        columns = self.program(params, batch, draw, key, *self.extra)
        return {name: np.asarray(values)[: len(piece.index)] for name, values in columns.items()}


@functools.lru_cache(maxsize=4)
def nelbo_program(denoiser, objective: Nelbo, mesh: jax.sharding.Mesh):
    """(params, batch, draw, key) -> columns [B]; compiled once for all texts of a model."""

    def score(params, batch, draw, key):
        noisy = objective.draw(
            batch["tokens"], batch["index"], batch["count"], key, draw, mask_token_id=denoiser.mask_token_id,
            strata=batch["place"],
        )  # fmt: skip
        scores = two_pass.row_scores(denoiser, objective.soft_mask, params, noisy)
        nats = {name: values * batch["tokens"].shape[1] for name, values in scores.loss.items()}
        unweighted = {f"{name}_cross_entropy": sums for name, sums in scores.cross_entropy.items()}
        return {"t": noisy.t, "masked": scores.masked} | nats | unweighted

    # Every host reads every row's result.
    return jax.jit(score, out_shardings=sharding.replicated(mesh))
