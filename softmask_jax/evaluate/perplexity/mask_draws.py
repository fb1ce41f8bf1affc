"""Which t and which masks every window gets, and what the model makes of them.

The estimate of a window is the mean over its M draws, whose t lie in M equal parts of [0, 1], one in each. The W windows
share each part out among them in W strata, in random order: all W x M values of t cover [0, 1] evenly, and every
single draw is uniform. The t within its stratum and the masks come from (seed, draw, number of the window) alone, the
stratum from (seed, windows, draws): batches, devices and models change none of it.
"""
import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from softmask_jax.config.jax_settings import root_key
from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.distributed import sharding
from softmask_jax.evaluate.perplexity.records import Piece
from softmask_jax.evaluate.perplexity.text_sets import Text
from softmask_jax.evaluate.task import Work


class Strata(NamedTuple):
    """of the t of windows [W] under draws [M]: its stratum [W M] int32 and how many strata there are, [W M] int32."""

    place: np.ndarray
    count: np.ndarray


def stratified(windows: int, draws: int, seed: int) -> Strata:
    """Jointly over windows and draws; see the module."""
    random = np.random.default_rng([seed, windows, draws])
    # A window's draws take the parts in a cycle from a random one on.
    part = (random.integers(draws, size=(windows, 1)) + np.arange(draws)) % draws
    within = np.stack([random.permutation(windows) for _ in range(draws)], 1)
    place = part * windows + np.take_along_axis(within, part, 1)
    return Strata(place.astype(np.int32), np.full_like(place, windows * draws, np.int32))


def of_the_reference(windows: int, batch_size: int) -> Strata:
    """One draw a window, stratified within each batch in the order of the text, as the reference validates: row i of n
    draws from the i-th of n strata, and the last batch has fewer."""
    number = np.arange(windows, dtype=np.int32)[:, None]
    last = windows % batch_size
    count = np.where(number < windows - last, batch_size, last).astype(np.int32)
    return Strata(number % batch_size, count)


def pieces(numbers: np.ndarray, draws: int, batch_size: int) -> Iterator[Piece]:
    """All windows `numbers` [W] under each draw."""
    for draw in range(draws):
        for start in range(0, len(numbers), batch_size):
            yield Piece(numbers[start : start + batch_size], draw)


def padded_to(batch_size: int, mesh: jax.sharding.Mesh) -> int:
    """The rows of a batch that the devices share evenly."""
    shards = sharding.row_shards(mesh)
    return -(-batch_size // shards) * shards


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """Scores pieces of a text under a model with an NELBO: called with a piece, returns its columns [n].

    numbers: of the windows that are measured, [W] ascending; strata: theirs.
    """

    work: Work
    text: Text
    objective: Nelbo
    numbers: np.ndarray
    strata: Strata
    rows: int

    def __call__(self, piece: Piece) -> dict[str, np.ndarray]:
        index = piece.filled(self.rows)
        place = np.searchsorted(self.numbers, index)
        batch = {
            "tokens": self.text.windows.gather(index), "index": index.astype(np.int32),
            "place": self.strata.place[place, piece.draw], "count": self.strata.count[place, piece.draw],
        }  # fmt: skip
        model, work = self.work.model, self.work
        key = root_key(work.settings.run.seed)
        found = _program(model.denoiser, self.objective, work.mesh)(
            model.params, sharding.global_batch(batch, work.mesh), np.int32(piece.draw), key
        )
        return {name: np.asarray(values)[: len(piece.index)] for name, values in found.items()}


@functools.lru_cache(maxsize=4)
def _program(denoiser, objective: Nelbo, mesh: jax.sharding.Mesh):
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
