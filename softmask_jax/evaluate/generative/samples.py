"""Texts written from masks alone, in a resumable file; a row depends on model, sampler, seed and its number alone."""
import dataclasses
import logging
import time
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.convert.converted import Ids
from softmask_jax.evaluate.task import DIVERGED, Piece, Work, pieces
from softmask_jax.generate.batches import row_key
from softmask_jax.samplers import Options
from softmask_jax.samplers.algorithms import MDLM_STEPS, TRANSITIONS

log = logging.getLogger("softmask_jax")


@dataclasses.dataclass(frozen=True)
class Samples:
    """Texts of N rows, and their cost."""

    tokens: np.ndarray  # [N L] int32
    texts: list[str]
    calls: np.ndarray  # [N] network calls
    filled: np.ndarray  # [N] masks that became tokens
    seconds: np.ndarray  # [N]


def entropies(tokens: np.ndarray) -> np.ndarray:
    """Entropy of the frequencies of ids in each row: [N L] -> [N] nats (MDLM's `sample_entropy`)."""
    shares = [np.unique(row, return_counts=True)[1] / len(row) for row in tokens]
    # + 0.0 turns -0 into 0.
    return np.array([-(share * np.log(share)).sum() for share in shares]) + 0.0


def budgeted(options: Options, length: int, budget: Fraction, section: str = "sampler") -> Options:
    """The sampler with a share of its steps, at least 1. ValueError if it has no fixed number. section: its config."""
    if budget == 1:
        return options
    if not options.counts_steps():
        decisive = [name for name in ("tokens_per_step", "threshold", "factor") if getattr(options, name) is not None]
        key = f"alg={options.alg}" if options.alg.startswith("confidence_") else decisive[0]
        raise ValueError(f"config.{section}.{key} decides how many steps there are; leave config.run.budgets at 1.")
    own = MDLM_STEPS if not options.alg or options.alg in TRANSITIONS else length
    return dataclasses.replace(options, steps=max(1, round((options.steps or own) * budget)))


def check_model(model) -> None:
    """ValueError for a model whose ids are no text."""
    if isinstance(model.tokenizer, Ids):
        raise ValueError("generative: this model was converted without a tokenizer; convert it again with --tokenizer.")


def write(work: Work) -> Samples:
    """A model's samples, missing ones written first. ValueError for a wrong length, NaN or infinite logits, or rows of
    other settings; Stopped after a signal."""
    model, seed, settings = work.model, work.settings.run.seed, work.settings.samples
    count, size, length = settings.count, settings.batch_size, settings.length or model.max_length
    if length > model.max_length:
        raise ValueError(f"config.samples.length is {length:,}; {work.name} takes {model.max_length:,} positions.")
    options = budgeted(work.settings.sampler, length, work.budget)
    decisive = {"length": length, "seed": seed, "batch_size": size, "step": model.step}
    decisive |= {f"sampler.{name}": value for name, value in dataclasses.asdict(options).items()}
    masks = np.full((size, length), model.mask_token_id, np.int32)

    def batch(piece: Piece) -> list[dict]:
        started = time.monotonic()
        # Every program takes a full batch.
        numbers = piece.filled(size).tolist()
        keys = jnp.stack([row_key(seed, (number, 0)) for number in numbers])
        out = jax.block_until_ready(model.fill(masks, None, keys=keys, options=options))
        tokens, calls, filled, finite = (np.asarray(x) for x in (out.tokens, out.row_calls, out.filled, out.finite))
        if not finite.all():
            number = numbers[int(np.argmin(finite))]
            checkpoint = f"{work.path}, step {model.step}"
            raise ValueError(f"{checkpoint}: logits of sample {number} are NaN or infinite; {DIVERGED}.")
        seconds = round((time.monotonic() - started) / len(piece.index), 4)
        log.info("%s: %s of %s samples written", work.name, f"{piece.keys[-1][0] + 1:,}", f"{count:,}")
        return [
            {"index": number, "sample": 0, "text": model.tokenizer.decode(tokens[i]), "tokens": tokens[i].tolist(),
             "calls": int(calls[i]), "filled": int(filled[i]), "seconds": seconds}
            for i, (number, _) in enumerate(piece.keys)
        ]  # fmt: skip

    with work.records("samples", decisive, count) as file:
        work.complete(file, pieces(np.arange(count), 1, size), batch)
        rows = [file.rows[number, 0] for number in range(count)]
    return Samples(
        np.array([row["tokens"] for row in rows], np.int32), [row["text"] for row in rows],
        *(np.array([row[name] for row in rows]) for name in ("calls", "filled", "seconds")),
    )  # fmt: skip
