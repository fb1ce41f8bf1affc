"""Texts that a model writes from masks alone, in a resumable file of rows.

A row's tokens depend on the model, the sampler, the seed and the row's number, not on other rows or interruptions: every
program takes a full batch.
"""
import dataclasses
import functools
import logging
import time
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.convert.converted import Ids
from softmask_jax.evaluate.pieces import Piece, complete, pieces
from softmask_jax.evaluate.task import Work
from softmask_jax.generate.batches import row_key
from softmask_jax.samplers import Options
from softmask_jax.samplers.options import MDLM_STEPS, TRANSITIONS

log = logging.getLogger("softmask_jax")
# Algorithms whose number of steps depends on the predictions.
WITHOUT_STEPS = ("confidence_threshold", "confidence_factor")


@dataclasses.dataclass(frozen=True)
class Samples:
    """tokens [N L] int32 and their texts; of each row the network calls, the masks filled, and the seconds [N]."""

    tokens: np.ndarray
    texts: list[str]
    calls: np.ndarray
    filled: np.ndarray
    seconds: np.ndarray

    @property
    def entropies(self) -> np.ndarray:
        return entropies(self.tokens)


def entropies(tokens: np.ndarray) -> np.ndarray:
    """Entropy of the frequencies of ids in each row: [N L] -> [N] nats (MDLM's `sample_entropy`)."""
    shares = [np.unique(row, return_counts=True)[1] / len(row) for row in tokens]
    # An entropy of 0 as 0, not -0.
    return np.array([-(share * np.log(share)).sum() for share in shares]) + 0.0


def counts_steps(options: Options) -> bool:
    """Whether a sampler takes a fixed number of steps."""
    return options.tokens_per_step is None and options.alg not in WITHOUT_STEPS


def budgeted(options: Options, length: int, budget: Fraction, section: str = "sampler") -> Options:
    """The sampler with a share of its steps, at least one. ValueError if it has no fixed number; section: of its config."""
    if budget == 1:
        return options
    if not counts_steps(options):
        key = f"alg={options.alg}" if options.tokens_per_step is None else "tokens_per_step"
        raise ValueError(f"config.{section}.{key} decides how many steps there are; leave config.run.budgets at 1.")
    own = MDLM_STEPS if not options.alg or options.alg in TRANSITIONS else length
    return dataclasses.replace(options, steps=max(1, round((options.steps or own) * budget)))


def check_model(model) -> None:
    """ValueError for a model whose ids are no text."""
    if isinstance(model.tokenizer, Ids):
        raise ValueError(
            "generative: this model was converted without a tokenizer, so that what it writes is no text; convert it again "
            "with --tokenizer=NAME_OR_FOLDER."
        )


def write(work: Work) -> Samples:
    """Samples of a model from the work's folder, after the missing ones are written.

    Raises:
      ValueError: an impossible sampler or length, logits that are NaN or infinite, or rows of other settings in the
      folder. Stopped: after a signal.
    """
    model, given, seed = work.model, work.settings.samples, work.settings.run.seed
    length, size = given.length or model.max_length, given.batch_size
    if length > model.max_length:
        raise ValueError(f"config.samples.length is {length:,}; {work.name} takes {model.max_length:,} positions at most.")
    options = budgeted(work.settings.sampler, length, work.budget)
    decisive = {"length": length, "seed": seed, "batch_size": size, "step": model.step}
    decisive |= {f"sampler.{name}": value for name, value in dataclasses.asdict(options).items()}
    with work.records("samples", decisive, given.count) as file:
        masks = np.full((size, length), model.mask_token_id, np.int32)
        make = functools.partial(_batch, work, masks, options)
        complete(work, file, pieces(np.arange(given.count), 1, size), make)
        rows = [file.rows[number, 0] for number in range(given.count)]
    return Samples(
        np.array([row["tokens"] for row in rows], np.int32), [row["text"] for row in rows],
        *(np.array([row[name] for row in rows]) for name in ("calls", "filled", "seconds")),
    )  # fmt: skip


def _batch(work: Work, masks: np.ndarray, options: Options, piece: Piece) -> list[dict]:
    model, seed, started = work.model, work.settings.run.seed, time.monotonic()
    # A batch is always full: the rows too many are repeats.
    numbers = piece.filled(len(masks)).tolist()
    keys = jnp.stack([row_key(seed, (number, 0)) for number in numbers])
    out = jax.block_until_ready(model.fill(masks, None, keys=keys, options=options))
    tokens, calls, filled = (np.asarray(x) for x in (out.tokens, out.row_calls, out.filled))
    if not (finite := np.asarray(out.finite)).all():
        raise ValueError(
            f"{work.path}: the logits of sample {numbers[int(np.argmin(finite))]} are NaN or infinite at step {model.step}; "
            "the weights are damaged, or the training diverged: give another --config.models.step."
        )
    seconds = round((time.monotonic() - started) / len(piece.index), 4)
    log.info("%s: %s of %s samples written", work.name, f"{piece.keys[-1][0] + 1:,}", f"{work.settings.samples.count:,}")
    return [
        {"index": number, "sample": 0, "text": model.tokenizer.decode(tokens[i]), "tokens": tokens[i].tolist(),
         "calls": int(calls[i]), "filled": int(filled[i]), "seconds": seconds}
        for i, (number, _) in enumerate(piece.keys)
    ]  # fmt: skip
