"""Batches of patterns and their answers: rows of equal padded length together, so that few programs are compiled.

An answer depends on its row, the row's number, the seed and the options, not on other rows or interruptions: the padded
length follows from the row, the key from its number, and every program takes a full batch (in bfloat16 the number of
rows changes the rounding of matrix products)."""
import bisect
import dataclasses
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.config.jax_settings import root_key
from softmask_jax.data.chat.buckets import round_up
from softmask_jax.data.prompts import MASKS, Row
from softmask_jax.diffusion.noise import Stream, stream_key
from softmask_jax.io.answers import Hosts, Key
from softmask_jax.report import viewer
from softmask_jax.report.patterns import Pattern
from softmask_jax.samplers import Options
from softmask_jax.samplers.algorithms import DREAM

MULTIPLE = 64  # of padded lengths
FAILED = "the model's logits were NaN or infinite"


class Shape(NamedTuple):
    """Shape of a program."""

    length: int
    prompt_length: int  # where blocks begin, see `samplers.filling.fill`
    padded: bool  # whether rows have padding


@dataclasses.dataclass(frozen=True)
class Batch:
    """Answers to generate together."""

    shape: Shape
    keys: tuple[Key, ...]  # (row, sample) of each answer
    size: int  # rows of the compiled program; those beyond the keys are repeats

    @property
    def filled(self) -> list[Key]:
        """`size` keys, the first ones repeated."""
        return [self.keys[i % len(self.keys)] for i in range(self.size)]


def shape_of(pattern: Pattern, model, limit: int, *, counted: bool = False) -> Shape:
    """Padded shape of a pattern, at most `limit` positions unless padded on the left. counted: the sampler makes a step
    for each position after the beginning of blocks."""
    length, left = len(pattern.tokens), model.padding == "left"
    if left and pattern.answer:
        before = round_up(pattern.answer, MULTIPLE)
        return Shape(before + length - pattern.answer, before, True)
    rounded = round_up(length, MULTIPLE) if left else min(round_up(length, MULTIPLE), limit)
    # A power of two: few programs, with about as many steps as masks.
    masks = 1 << (int((pattern.tokens == model.mask_token_id).sum()) - 1).bit_length()
    # On the left always pass a mask: an unpadded row would otherwise recompile.
    return Shape(rounded, max(rounded - masks, 0) if counted else 0, padded=left or rounded > length)


def counts_masks(options: Options) -> bool:
    """Whether their sampler makes a step for each position after the beginning of blocks, see `shape_of`."""
    return options.alg in DREAM and options.block_length is None and options.steps is None


def plan(shapes: Sequence[Shape], *, samples: int, batch_size: int, done: Collection[Key] = (),
         hosts: Hosts = Hosts()) -> list[Batch]:
    """This host's batches of rows of one shape, the longest first, so that a lack of memory shows at the start;
    `samples` answers to each row. Batches whose keys are all `done` are left out; others stay whole, so that resuming
    changes no bit."""
    batches = []
    for shape in sorted(set(shapes), reverse=True):
        keys = [(row, sample) for row, own in enumerate(shapes) if own == shape for sample in range(samples)]
        parts = [tuple(keys[start : start + batch_size]) for start in range(0, len(keys), batch_size)]
        batches += [Batch(shape, part, batch_size) for part in parts]
    return [batch for batch in hosts.share(batches) if not all(key in done for key in batch.keys)]


def span(pattern: Pattern, length: int, padding: str) -> slice:
    """Position of a pattern in a row of `length` tokens."""
    size = len(pattern.tokens)
    return slice(0, size) if padding == "right" else slice(length - size, length)


def lay_out(patterns: Sequence[Pattern], shape: Shape, padding: str, pad: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokens [B L] int32 and, if anything is padded, attention mask [B L] int32."""
    tokens = np.full((len(patterns), shape.length), pad, np.int32)
    attended = np.zeros_like(tokens)
    for row, pattern in enumerate(patterns):
        own = span(pattern, shape.length, padding)
        tokens[row, own], attended[row, own] = pattern.tokens, 1
    return tokens, attended if shape.padded else None


def cut(text: str, stops: Collection[str]) -> str:
    """`text` up to the first of `stops`."""
    return text[: min((index for stop in stops if (index := text.find(stop)) >= 0), default=len(text))]


def row_key(seed: int, key: Key) -> jax.Array:
    index, sample = key
    return jax.random.fold_in(stream_key(root_key(seed), Stream.SAMPLE, sample), index)


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """Answers rows with a model's `fill`."""

    model: object
    options: object  # of the sampler
    seed: int = 0
    stops: tuple[str, ...] = ()  # texts that end an answer
    ends: tuple[int, ...] | None = None  # ids that end an answer, by default the model's

    def _laid_out(self, patterns: Sequence[Pattern], shape: Shape) -> tuple[np.ndarray, np.ndarray | None]:
        # Padding must not be the mask, which would be filled.
        pad = next(iter(self.model.end_token_ids), int(self.model.mask_token_id == 0))
        return lay_out(patterns, shape, self.model.padding, pad)

    def fill(self, keys: Sequence[Key], patterns: Sequence[Pattern], shape: Shape, *, trace: bool = False):
        """`Generated` of patterns [B] of one shape."""
        settings = {"options": self.options, "prompt_length": shape.prompt_length, "trace": trace}
        row_keys = jnp.stack([row_key(self.seed, key) for key in keys])
        return jax.block_until_ready(self.model.fill(*self._laid_out(patterns, shape), keys=row_keys, **settings))

    def padding(self, patterns: Sequence[Pattern], shape: Shape) -> np.ndarray | None:
        """Attention mask [B L] of patterns of one shape; None without padding."""
        return self._laid_out(patterns, shape)[1]

    def unpadded(self, pattern: Pattern, row) -> np.ndarray:
        """Tokens [n] of a pattern's filled row [L]."""
        return np.asarray(row)[span(pattern, len(row), self.model.padding)]

    def batch(self, batch: Batch, rows: Sequence[Row], patterns: Sequence[Pattern]) -> Iterator[dict]:
        """Rows of the answer file for one batch; see `answer`."""
        started, keys = time.monotonic(), batch.filled
        out = self.fill(keys, [patterns[index] for index, _ in keys], batch.shape)
        tokens, finite = np.asarray(out.tokens), np.asarray(out.finite)
        cost = {
            "calls": np.asarray(out.row_calls), "filled": np.asarray(out.filled),
            "tokens_per_call": np.round(out.tokens_per_call, 4), "positions": np.asarray(out.positions),
        }  # fmt: skip
        seconds = round((time.monotonic() - started) / len(batch.keys), 4)
        for i, (index, sample) in enumerate(batch.keys):
            row = rows[index]
            answer = {"index": index, "sample": sample} | ({} if row.id is None else {"id": row.id})
            # The ids of a row of tokens are in the answer.
            answer |= {} if row.kind in (MASKS, "tokens") else {row.kind: row.value}
            if finite[i]:
                answer |= self.answer(patterns[index], self.unpadded(patterns[index], tokens[i]))
            else:
                answer |= {"error": FAILED, "text": "", "tokens": [], "new_tokens": 0, "ended": False, "empty": False}
            yield answer | {name: values[i].item() for name, values in cost.items()} | {"seconds": seconds}

    def answer(self, pattern: Pattern, tokens: np.ndarray) -> dict:
        """Entries of an answer's row, from its unpadded tokens [n]: "text", "tokens", "new_tokens", "ended", "empty".

        For a prompt: its continuation, the text cut at the first end of text and at `stops`. For a pattern: the full
        row, uncut (no BOS in the text), and "fills", the texts of its holes; empty if only end tokens were filled in.
        """
        return (self._continuation if pattern.answer else self._filled)(pattern, tokens)

    def _continuation(self, pattern: Pattern, tokens: np.ndarray) -> dict:
        tokens = tokens[pattern.answer :]
        ends = np.flatnonzero(np.isin(tokens, self.model.end_token_ids if self.ends is None else self.ends))
        count = int(ends[0]) if len(ends) else len(tokens)
        uncut = self.text(tokens[:count])
        text = cut(uncut, self.stops)
        if text != uncut:
            count = bisect.bisect_left(range(count), len(text), key=lambda n: len(self.text(tokens[:n])))
        ended, empty = bool(len(ends)) or text != uncut, not text.strip()
        return {"text": text, "tokens": tokens.tolist(), "new_tokens": count, "ended": ended, "empty": empty}

    def _filled(self, pattern: Pattern, tokens: np.ndarray) -> dict:
        tokenizer, masked = self.model.tokenizer, pattern.tokens == self.model.mask_token_id
        # The first token, BOS, often is an end of text, too.
        ends = np.isin(tokens, self.model.end_token_ids) & (np.arange(len(tokens)) > 0)
        borders = np.flatnonzero(np.diff(masked.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        count, begins = int((masked & ~ends).sum()), int(tokenizer is not None and tokens[0] == tokenizer.bos_id)
        texts = {"text": self.text(tokens[begins:]), "fills": [self.text(tokens[start:end]) for start, end in borders]}
        ended = bool((masked & ends).any())
        return texts | {"tokens": tokens.tolist(), "new_tokens": count, "ended": ended, "empty": not count}

    def text(self, tokens: np.ndarray) -> str:
        """Text of ids [n]; U+FFFD for ids that the tokenizer lacks, "" without a tokenizer."""
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            return ""
        size = tokenizer.vocab_size
        pieces = np.split(tokens, np.flatnonzero(np.diff(tokens < size)) + 1)
        return "".join(tokenizer.decode(ids) if (ids < size).all() else "\ufffd" * len(ids) for ids in pieces)

    def trajectory(self, pattern: Pattern, shape: Shape, facts: Mapping = {}, answer: Mapping | None = None) -> str:
        """HTML page of the denoising of the first answer (see `viewer`), generated again, alone. facts: more entries of
        its table. answer: row of the answer file; the page notes a difference to it."""
        out = self.fill([(0, 0)], [pattern], shape, trace=True)
        tokens, note = self.unpadded(pattern, out.tokens[0]), ""
        if answer and "error" not in answer and self.answer(pattern, tokens)["tokens"] != answer["tokens"]:
            note = ("Rounding differs with the number of rows: computed by itself, as here, this text is not quite the "
                    "answer given.")  # fmt: skip
        facts = {
            **facts, "sampler": f"{self.options.alg or self.model.default_alg}, {int(out.steps):,} steps",
            "network calls": int(np.asarray(out.row_calls)[0]), "tokens a call": f"{out.tokens_per_call[0]:.2f}",
        }  # fmt: skip
        shown = {"facts": facts, "note": note, "attention_mask": self.padding([pattern], shape)}
        return viewer.trajectory_page(out, self.model.tokenizer, mask_token_id=self.model.mask_token_id, **shown)
