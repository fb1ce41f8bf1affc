"""Texts that a model writes from masks alone, in a file of rows that goes on where it was stopped.

A row's tokens depend on the model, the sampler, the seed and the row's number: not on the rows beside it, nor on how
often the work was interrupted (every program takes a full batch, as in `generation`).
"""
import dataclasses
import logging
import time
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.convert.converted import Ids
from softmask_jax.evaluate.task import Work
from softmask_jax.generate.batches import row_key
from softmask_jax.samplers import Options
from softmask_jax.samplers.options import MDLM_STEPS, TRANSITIONS

log = logging.getLogger("softmask_jax")
# Their number of steps follows from what they find.
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
    """[N L] ids -> [N] nats: of the frequencies that ids have in their own row (MDLM's `sample_entropy`)."""
    found = []
    for row in tokens:
        _, counts = np.unique(row, return_counts=True)
        shares = counts / counts.sum()
        found.append(-(shares * np.log(shares)).sum())
    # An entropy of 0 as 0, not -0.
    return np.array(found) + 0.0


def counts_steps(options: Options) -> bool:
    """Whether a sampler makes the number of steps that it is told."""
    return options.tokens_per_step is None and options.alg not in WITHOUT_STEPS


def budgeted(options: Options, length: int, budget: Fraction, section: str = "sampler") -> Options:
    """The sampler with a share of its steps, at least one. ValueError if it does not count steps; section: of its config."""
    if budget == 1:
        return options
    if not counts_steps(options):
        said = f"alg={options.alg}" if options.tokens_per_step is None else "tokens_per_step"
        raise ValueError(f"config.{section}.{said} decides how many steps there are; leave config.run.budgets at 1.")
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
    """Samples of a model, those that are in the work's folder and the missing ones.

    Raises:
      ValueError: a sampler or length that the model cannot have, logits that are NaN or infinite, or rows of other
      settings in the folder. Stopped: after a signal.
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
        for start in range(0, given.count, size):
            numbers = range(start, min(start + size, given.count))
            if all((number, 0) in file.rows for number in numbers):
                continue
            work.check_stop()
            # A batch is always full: the rows too many are repeats.
            padded = [numbers[i % len(numbers)] for i in range(size)]
            rows = _batch(work, masks, padded, options)[: len(numbers)]
            file.add([row for row in rows if (row["index"], 0) not in file.rows])
            log.info("%s: %s of %s samples written", work.name, f"{len(file.rows):,}", f"{given.count:,}")
        rows = [file.rows[number, 0] for number in range(given.count)]
    return Samples(
        np.array([row["tokens"] for row in rows], np.int32), [row["text"] for row in rows],
        *(np.array([row[name] for row in rows]) for name in ("calls", "filled", "seconds")),
    )  # fmt: skip


def _batch(work: Work, masks: np.ndarray, numbers: list[int], options: Options) -> list[dict]:
    model, seed, started = work.model, work.settings.run.seed, time.monotonic()
    keys = jnp.stack([row_key(seed, (number, 0)) for number in numbers])
    out = jax.block_until_ready(model.fill(masks, None, keys=keys, options=options))
    tokens, calls, filled = (np.asarray(x) for x in (out.tokens, out.row_calls, out.filled))
    if not (finite := np.asarray(out.finite)).all():
        raise ValueError(
            f"{work.path}: the logits of sample {numbers[int(np.argmin(finite))]} are NaN or infinite at step {model.step}; "
            "the weights are damaged, or the training diverged: give another --config.models.step."
        )
    seconds = round((time.monotonic() - started) / len(set(numbers)), 4)
    return [
        {"index": number, "sample": 0, "text": model.tokenizer.decode(row), "tokens": row.tolist(),
         "calls": int(calls[i]), "filled": int(filled[i]), "seconds": seconds}
        for i, (number, row) in enumerate(zip(numbers, tokens, strict=True))
    ]  # fmt: skip
