"""Padded batches of prompts and responses, in buckets of length.

The recipe's pads follow every response (arXiv 2510.17206: a random 0..49, then up to a multiple of 8). Attended to,
corrupted and supervised, they teach the model to stop. Bucket pads, up to a multiple of 128, are a segment of their own
without loss. A batch depends on seed and step alone: any number of hosts can resume a run at any step."""
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from softmask_jax.data.chat.sft import Examples
from softmask_jax.data.pipeline import Batches, rows_of_host

MOST_EXTRA_PADS = 50
ROW_MULTIPLE, BUCKET_MULTIPLE = 8, 128
# Segments within a row: nothing attends from one to another.
BUCKET_PAD, EXAMPLE = 0, 1


def extra_pads(seed: int, index: np.ndarray) -> np.ndarray:
    """int64 [n] in 0..49, from the seed and the examples' numbers [n] alone."""
    # SplitMix64's mixing: one generator for each example would take seconds.
    x = (np.asarray(index).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x ^= np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(MOST_EXTRA_PADS)).astype(np.int64)


def round_up(lengths: np.ndarray | int, multiple: int) -> np.ndarray | int:
    return -(-lengths // multiple) * multiple


@dataclasses.dataclass(frozen=True, eq=False)
class Buckets:
    """Examples with their padding, sorted into buckets. Raises ValueError for sizes that do not hold every example."""

    examples: Examples
    pad_id: int  # of both kinds of pads
    seed: int  # of the recipe's pads
    sizes: tuple[int, ...] = ()  # ascending multiples of 128; (): every one that is needed
    whole_rows: bool = False  # the recipe's pads fill the rows (LLaDA, arXiv 2502.09992); no bucket pads

    def __post_init__(self):
        if any(size < 1 or size % BUCKET_MULTIPLE for size in self.sizes) or list(self.sizes) != sorted({*self.sizes}):
            raise ValueError(f"data.buckets={self.sizes} must be ascending multiples of {BUCKET_MULTIPLE}")
        longest = self.lengths.max()
        if self.sizes and self.sizes[-1] < longest:
            reason = f"end below the longest row with its pads, {longest} tokens"
            raise ValueError(f"data.buckets={self.sizes} {reason}; add a larger one or lower data.max_tokens")

    def __len__(self) -> int:
        return len(self.examples)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [N] tokens of each example with the recipe's pads, at least."""
        if self.whole_rows:
            return self.examples.lengths
        return round_up(self.examples.lengths + extra_pads(self.seed, np.arange(len(self))), ROW_MULTIPLE)

    @functools.cached_property
    def bucket_of(self) -> np.ndarray:
        """int64 [N] the length of the bucket of each example."""
        if not self.sizes:
            return round_up(self.lengths, BUCKET_MULTIPLE)
        sizes = np.array(self.sizes)
        return sizes[np.searchsorted(sizes, self.lengths)]

    def gather(self, index: np.ndarray, size: int) -> dict[str, np.ndarray]:
        """The examples `index` [B] as rows of length `size`, all int32: tokens, segment_ids [B L]; prompt_lengths,
        real_lengths, lengths (with the recipe's pads), index [B]."""
        tokens = np.full((len(index), size), self.pad_id, np.int32)
        prompt_lengths, real_lengths = np.empty((2, len(index)), np.int32)
        for row, number in enumerate(index.tolist()):
            ids, prompt_lengths[row] = self.examples[number]
            tokens[row, : len(ids)], real_lengths[row] = ids, len(ids)
        lengths = (np.full(len(index), size) if self.whole_rows else self.lengths[index]).astype(np.int32)
        segment_ids = np.where(np.arange(size) < lengths[:, None], EXAMPLE, BUCKET_PAD).astype(np.int32)
        sizes = {"prompt_lengths": prompt_lengths, "real_lengths": real_lengths, "lengths": lengths}
        return {"tokens": tokens, "segment_ids": segment_ids, "index": index.astype(np.int32)} | sizes

    def plan(self, epoch: int, batch_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """One epoch in random order: example numbers [steps B] and the bucket [steps] of each step.
        Examples that fill no batch go to the next larger bucket: at most B - 1, others each epoch, are left out."""
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(len(self))
        buckets = self.bucket_of[order]
        batches, sizes, left = [], [], order[:0]
        for size in np.unique(buckets).tolist():
            members = np.concatenate([left, order[buckets == size]])
            full = len(members) // batch_size
            batches.append(members[: full * batch_size].reshape(-1, batch_size))
            sizes += [size] * full
            left = members[full * batch_size :]
        shuffled = random.permutation(len(sizes))
        return np.concatenate(batches)[shuffled], np.array(sizes, np.int64)[shuffled]


def steps_per_epoch(buckets: Buckets, global_batch_size: int) -> int:
    """Updates of one epoch, about 33,500 for the recipe's 268,000 examples in batches of 8. ValueError for fewer
    examples than a batch."""
    if len(buckets) < global_batch_size:
        count = f"{len(buckets)} examples, fewer than train.global_batch_size={global_batch_size}"
        raise ValueError(f"the {buckets.examples.name} split has {count}: add conversations or lower it")
    return len(buckets) // global_batch_size


def bucket_batches(
    buckets: Buckets, *, global_batch_size: int, seed: int, start_step: int = 0, host_index: int = 0,
    host_count: int = 1, micro_batches: int = 1,
) -> Batches:  # fmt: skip
    """This host's share of the endless training batches from `start_step` on: `Buckets.gather` with int32 [B/hosts]
    rows (see `rows_of_host`) and epoch (from 0). Raises ValueError, also for fewer examples than a batch."""
    rows = rows_of_host(global_batch_size, host_index, host_count, micro_batches).astype(np.int32)
    if start_step < 0:
        raise ValueError(f"start_step={start_step} must not be negative")
    steps = steps_per_epoch(buckets, global_batch_size)

    def generate() -> Iterator[dict[str, np.ndarray]]:
        epoch, first = divmod(start_step, steps)
        while True:
            batches, sizes = buckets.plan(epoch, global_batch_size, seed)
            position = {"rows": rows, "epoch": np.full_like(rows, epoch)}
            for step in range(first, steps):
                yield buckets.gather(batches[step, rows], int(sizes[step])) | position
            epoch, first = epoch + 1, 0

    return Batches(generate())


def bucket_validation_batches(
    buckets: Buckets, *, global_batch_size: int, host_index: int = 0, host_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """This host's share of every example once, in a fixed order by bucket: `Buckets.gather` with rows, and
    valid bool [B/hosts], False on repeated examples that fill up a batch."""
    rows = rows_of_host(global_batch_size, host_index, host_count)

    def generate() -> Iterator[dict[str, np.ndarray]]:
        for size in np.unique(buckets.bucket_of).tolist():
            members = np.flatnonzero(buckets.bucket_of == size)
            for start in range(0, len(members), global_batch_size):
                positions = start + rows
                batch = buckets.gather(members[positions % len(members)], size)
                yield batch | {"rows": rows.astype(np.int32), "valid": positions < len(members)}

    return generate()
