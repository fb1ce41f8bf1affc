"""Windows to batches by index. A batch depends on seed and step alone: any number of hosts can resume at any step.

Grain shuffles the windows anew each epoch; item s * B + r of that endless order is row r of step s, and host i of n
reads rows i, i + n, ... In a mixture each corpus has its own order, and a fixed pattern takes from them by weight."""
import contextlib
import warnings
from collections.abc import Iterator

import numpy as np

from softmask_jax.data.windows import Mixture, Windows

MOST_PARTS = 64


class Batches(Iterator, contextlib.AbstractContextManager):
    """Endless {"tokens": int32 [B/hosts L], "rows": int32 [B/hosts], in the global batch}; `close` ends its threads."""

    def __init__(self, iterator):
        self._iterator = iterator

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def close(self) -> None:
        self._iterator.close()

    def __exit__(self, *exception) -> None:
        self.close()


def batches(
    windows: Windows | Mixture, *, global_batch_size: int, seed: int, start_step: int = 0, host_index: int = 0,
    host_count: int = 1, micro_batches: int = 1, prefetch: int = 2, balanced: bool = False,
) -> Batches:  # fmt: skip
    """This host's share of the training batches from `start_step` on, `prefetch` of them read ahead (0: none).
    balanced: the host's devices, each with neighbouring positions, get equally many masks, see `low_and_high`.
    Raises ValueError as `rows_of_host`; warns of repeats within a batch."""
    # Grain imports JAX, which users of sources and tokenizers need not load.
    import grain

    rows = rows_of_host(global_batch_size, host_index, host_count, micro_batches).astype(np.int32)
    rows = low_and_high(rows, micro_batches) if balanced else rows
    if start_step < 0 or prefetch < 0:
        raise ValueError(f"start_step={start_step} and data.prefetch={prefetch} must not be negative")
    if len(windows) < global_batch_size:
        count = f"{len(windows)} windows, fewer than train.global_batch_size={global_batch_size}"
        warnings.warn(f"the {windows.name} split has {count}: every batch repeats some", stacklevel=2)
    positions = (rows - host_index) // host_count

    def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
        return {"tokens": windows.gather(numbers[positions]), "rows": rows}

    own = _endless(windows, global_batch_size, seed)[host_index::host_count]
    dataset = own.batch(len(rows), drop_remainder=True).map(read)[start_step:]
    # One thread: reading is a gather from mapped memory, and a second one only contends for the interpreter.
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return Batches(iter(dataset.to_iter_dataset(options)))


def _endless(windows: Windows | Mixture, global_batch_size: int, seed: int):
    """Grain's endless order of window numbers."""
    import grain

    # Grain's epoch e uses seed + e; hashed, neighbouring seeds do not replay each other's epochs.
    seed, *part_seeds = (int(state) for state in np.random.SeedSequence(seed).generate_state(1 + MOST_PARTS))
    if not isinstance(windows, Mixture):
        return grain.MapDataset.range(len(windows)).shuffle(seed).repeat()
    if len(windows.parts) > MOST_PARTS:
        raise ValueError(f"a mixture has at most {MOST_PARTS} corpora, not {len(windows.parts)}")
    orders = [
        grain.MapDataset.range(int(start), int(end)).shuffle(part_seed).repeat()
        for start, end, part_seed in zip(windows.starts, windows.starts[1:], part_seeds, strict=False)
    ]
    # Shuffled within each batch: in the fixed pattern some corpus would always get the rows of small t.
    mix = grain.MapDataset.mix(orders, windows.weights)
    return grain.experimental.WindowShuffleMapDataset(mix, window_size=global_batch_size, seed=seed)


def micro_batch_of(rows: np.ndarray, global_batch_size: int, micro_batches: int) -> np.ndarray:
    """Micro-batch of each row, by its number in the global batch. With M rows each, rows r and r + M differ, so that a
    host holds equally many of all; so do neighbours: t is stratified by row, and each needs its full range."""
    size = global_batch_size // micro_batches
    return (rows // size + rows % size) % micro_batches


def rows_of_host(global_batch_size: int, host_index: int, host_count: int, micro_batches: int = 1) -> np.ndarray:
    """int64 [B/hosts] numbers of a host's rows i, i + n, ... in the global batch; position p holds a row of micro-batch
    p % micro_batches. Raises ValueError unless the batch divides by hosts x micro-batches."""
    if not 0 <= host_index < host_count:
        raise ValueError(f"host_index={host_index} must lie in 0..{host_count - 1}")
    if global_batch_size < 1 or micro_batches < 1 or global_batch_size % (host_count * micro_batches):
        factors = f"hosts x micro-batches ({host_count} x {micro_batches})"
        raise ValueError(f"global_batch_size={global_batch_size} must be a positive multiple of {factors}")
    rows = np.arange(host_index, global_batch_size, host_count)
    groups = micro_batch_of(rows, global_batch_size, micro_batches)
    return rows[np.argsort(groups, kind="stable").reshape(micro_batches, -1).T.ravel()]


def low_and_high(rows: np.ndarray, micro_batches: int) -> np.ndarray:
    """Rows of `rows_of_host`, the lowest and the highest of each micro-batch in turn: t rises with the row, and so does
    the number of masks, which is the work of the output layer."""
    groups = rows.reshape(-1, micro_batches)
    count = len(groups)
    in_turn = np.stack([np.arange(count), np.arange(count)[::-1]], 1).ravel()[:count]
    return groups[in_turn].ravel()


def validation_batches(
    windows: Windows | Mixture, *, global_batch_size: int, host_index: int = 0, host_count: int = 1,
    max_windows: int = 0,
) -> Iterator[dict[str, np.ndarray]]:  # fmt: skip
    """This host's share of every window once, or of `max_windows` evenly spaced ones, in a fixed order.

    Yields int32 tokens [B/hosts L], rows (in the global batch) and index (the window's number) [B/hosts]; valid bool
    [B/hosts], False on rows that fill up the last batch with the first windows again."""
    rows = rows_of_host(global_batch_size, host_index, host_count)
    if max_windows < 0:
        raise ValueError(f"max_windows={max_windows} must not be negative (0 means all)")
    count = min(max_windows or len(windows), len(windows))
    chosen = np.arange(count) * len(windows) // count

    def generate() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, count, global_batch_size):
            index = chosen[(start + rows) % count]
            batch = {"tokens": windows.gather(index), "valid": start + rows < count}
            yield batch | {"rows": rows.astype(np.int32), "index": index.astype(np.int32)}

    return generate()
