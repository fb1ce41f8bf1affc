"""Patterns in, answers out: rows of equal length in batches, so that few programs are compiled.

The answer to a row depends on the row, its number, the seed and the options; not on the rows beside it, or on how often
the work was interrupted. So the length that a row is padded to is its own affair, its key is made of its number alone,
and every program takes as many rows as a batch can have: in bfloat16 the number of rows decides how matrix products are
rounded, and with that an answer now and then. In float32 the size of the batch has made no difference so far.
"""
import bisect
import dataclasses
import math
import time
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.config.jax_settings import root_key
from softmask_jax.data.prompts import MASKS, Row
from softmask_jax.diffusion.noise import Stream, stream_key
from softmask_jax.io.answers import Key
from softmask_jax.report.patterns import Pattern

# Lengths are rounded up to it.
MULTIPLE = 64
FAILED = "the model's logits were NaN or infinite"


class Shape(NamedTuple):
    """What is compiled: length, where blocks begin (see `samplers.options.fill`), whether rows have padding."""

    length: int
    prompt_length: int
    padded: bool


@dataclasses.dataclass(frozen=True)
class Batch:
    """keys: (row, sample) of each of its rows; the compiled program takes `size` rows, the rest are repeats."""

    shape: Shape
    keys: tuple[Key, ...]
    size: int


def shape_of(pattern: Pattern, model, limit: int, *, counted: bool = False) -> Shape:
    """The shape that a pattern is computed in, of at most `limit` positions without padding on the left.

    counted: the sampler makes a step for each position from where blocks would begin.
    """
    length = len(pattern.tokens)
    if model.padding == "left" and pattern.answer:
        before = _rounded(pattern.answer)
        return Shape(before + length - pattern.answer, before, True)
    rounded = _rounded(length) if model.padding == "left" else min(_rounded(length), limit)
    # A power of two: about as many steps as masks, and few programs.
    masks = 1 << (int((pattern.tokens == model.mask_token_id).sum()) - 1).bit_length()
    begin = max(rounded - masks, 0) if counted else 0
    # On the left there always is a mask of attention, lest the rare row without padding be a program of its own.
    return Shape(rounded, begin, model.padding == "left" or rounded > length)


def _rounded(length: int) -> int:
    return math.ceil(length / MULTIPLE) * MULTIPLE


def plan(shapes: Sequence[Shape], *, samples: int, batch_size: int, done: Collection[Key] = ()) -> list[Batch]:
    """Batches of rows of one shape, the longest first: what does not fit into memory fails at the start.

    shapes: of each row. samples: answers to each. done: keys of answers that are there. Batches without a missing
    answer are left out; the others are the same whatever is done, so that an interruption changes no bit.
    """
    found = []
    for shape in sorted(set(shapes), reverse=True):
        keys = [(row, sample) for row, own in enumerate(shapes) if own == shape for sample in range(samples)]
        batches = [tuple(keys[start : start + batch_size]) for start in range(0, len(keys), batch_size)]
        found += [Batch(shape, batch, batch_size) for batch in batches if not all(key in done for key in batch)]
    return found


def lay_out(patterns: Sequence[Pattern], shape: Shape, padding: str, pad: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokens [B L] int32 and, if anything is padded, attention mask [B L] int32."""
    tokens = np.full((len(patterns), shape.length), pad, np.int32)
    attended = np.zeros_like(tokens)
    for row, pattern in enumerate(patterns):
        length = len(pattern.tokens)
        place = slice(0, length) if padding == "right" else slice(shape.length - length, shape.length)
        tokens[row, place], attended[row, place] = pattern.tokens, 1
    return tokens, attended if shape.padded else None


def cut(text: str, stops: Collection[str]) -> str:
    """`text` up to the first of `stops`."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def row_key(seed: int, key: Key) -> jax.Array:
    """The random key of an answer."""
    index, sample = key
    return jax.random.fold_in(stream_key(root_key(seed), Stream.SAMPLE, sample), index)


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """Answers rows with a model's `fill`. options: of the sampler. stops: texts that end an answer. ends: ids that do, in
    place of the model's own."""

    model: object
    options: object
    seed: int = 0
    stops: tuple[str, ...] = ()
    ends: tuple[int, ...] | None = None

    @property
    def pad(self) -> int:
        """What rows are padded with: not the mask, which would be filled; nothing attends to it."""
        ends = self.model.end_token_ids
        return ends[0] if ends else int(self.model.mask_token_id == 0)

    def fill(self, keys: Sequence[Key], patterns: Sequence[Pattern], shape: Shape, *, trace: bool = False):
        """`Generated` of patterns [B] of one shape."""
        tokens, attended = lay_out(patterns, shape, self.model.padding, self.pad)
        random = jnp.stack([row_key(self.seed, key) for key in keys])
        out = self.model.fill(
            tokens, attended, keys=random, options=self.options, prompt_length=shape.prompt_length, trace=trace
        )
        return jax.block_until_ready(out)

    def batch(self, batch: Batch, rows: Sequence[Row], patterns: Sequence[Pattern]) -> Iterator[dict]:
        """Rows of the answer file for one batch; see `answer`."""
        started = time.monotonic()
        keys = [batch.keys[i % len(batch.keys)] for i in range(batch.size)]
        out = self.fill(keys, [patterns[index] for index, _ in keys], batch.shape)
        tokens = np.asarray(out.tokens)
        cost = {
            "calls": np.asarray(out.row_calls), "filled": np.asarray(out.filled),
            "tokens_per_call": np.round(out.tokens_per_call, 4), "positions": np.asarray(out.positions),
        }  # fmt: skip
        finite, seconds = np.asarray(out.finite), (time.monotonic() - started) / len(batch.keys)
        for i, (index, sample) in enumerate(batch.keys):
            row, pattern = rows[index], patterns[index]
            length = len(pattern.tokens)
            first = 0 if self.model.padding == "right" else batch.shape.length - length
            found = {"index": index, "sample": sample}
            found |= {} if row.id is None else {"id": row.id}
            # The ids of a row of tokens are in the answer.
            found |= {row.kind: row.value} if row.kind not in (MASKS, "tokens") else {}
            if finite[i]:
                found |= self.answer(pattern, tokens[i, first : first + length])
            else:
                found |= {"error": FAILED, "text": "", "tokens": [], "new_tokens": 0, "ended": False, "empty": False}
            yield found | {name: values[i].item() for name, values in cost.items()} | {"seconds": round(seconds, 4)}

    def answer(self, pattern: Pattern, tokens: np.ndarray) -> dict:
        """What was written, of tokens [n] without padding.

        Returns:
          "text", "tokens", "new_tokens" (of the text), "ended" and "empty". Of a continued prompt text and tokens
          are what follows it, the text cut at the first end of text and at `stops`. Of a row that is a pattern they
          are the whole row, nothing is cut (but the text has no BOS in front), and "fills" are the texts of its holes;
          it is empty if nothing but ends was filled in.
        """
        if pattern.answer:
            tokens = tokens[pattern.answer :]
            ends = np.flatnonzero(np.isin(tokens, self.model.end_token_ids if self.ends is None else self.ends))
            count = int(ends[0]) if len(ends) else len(tokens)
            text = self.text(tokens[:count])
            whole, text = text, cut(text, self.stops)
            ended = bool(len(ends)) or text != whole
            if text != whole:
                count = bisect.bisect_left(range(count), len(text), key=lambda n: len(self.text(tokens[:n])))
            return {
                "text": text, "tokens": tokens.tolist(), "new_tokens": count, "ended": ended, "empty": not text.strip()
            }  # fmt: skip
        masked = pattern.tokens == self.model.mask_token_id
        # Training windows begin with a token that often is the end of text, too.
        ends = np.isin(tokens, self.model.end_token_ids) & (np.arange(len(tokens)) > 0)
        borders = np.flatnonzero(np.diff(masked.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        count = int((masked & ~ends).sum())
        tokenizer = self.model.tokenizer
        begins = int(tokenizer is not None and tokens[0] == tokenizer.bos_id)
        return {
            "text": self.text(tokens[begins:]), "fills": [self.text(tokens[start:end]) for start, end in borders],
            "tokens": tokens.tolist(), "new_tokens": count, "ended": bool((masked & ends).any()), "empty": not count,
        }  # fmt: skip

    def text(self, tokens: np.ndarray) -> str:
        """Text of ids [n]; those that the model has and the tokenizer does not are U+FFFD. "" without a tokenizer."""
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            return ""
        known = tokens < tokenizer.vocab_size
        if known.all():
            return tokenizer.decode(tokens)
        pieces = np.split(tokens, np.flatnonzero(np.diff(known)) + 1)
        return "".join(
            tokenizer.decode(piece) if piece[0] < tokenizer.vocab_size else "\ufffd" * len(piece) for piece in pieces
        )
