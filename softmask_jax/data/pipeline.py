"""Windows to batches, by index: the batch of a step depends on the seed and the step, and on nothing else.

Grain shuffles all windows anew in each epoch; epochs follow each other without a seam. Item s * B + r of that endless
order is row r of step s, and host i of n reads rows i, i + n, ...; so any number of hosts can take up a run at any
step, and the whole cursor is one integer.

Of a mixture each corpus has such an order of its own, and a fixed pattern takes from them as the weights say.

The micro-batches of gradient accumulation consist of the same rows on any number of hosts, too (`micro_batch_of`).
"""
import warnings
from collections.abc import Iterator

import numpy as np

from softmask_jax.data.windows import Mixture, Windows


MOST_PARTS = 64


class Batches:
    """An endless iterator over {"tokens": int32 [B/hosts L], "rows": int32 [B/hosts]}, read ahead by threads.

    `rows` are the rows' numbers in the global batch; `step` is the step of the batch that comes next. `close` (or
    leaving a `with` block) ends the threads. Made by `batches`.
    """

    def __init__(self, iterator, step: int):
        self._iterator = iterator
        self.step = step

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self.step += 1
        return batch

    def close(self) -> None:
        self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def batches(
    windows: Windows | Mixture,
    *,
    global_batch_size: int,
    seed: int,
    start_step: int = 0,
    host_index: int = 0,
    host_count: int = 1,
    micro_batches: int = 1,
    prefetch: int = 2,
) -> Batches:
    """This host's share of the training batches from `start_step` on; `prefetch` batches are read ahead (0: none).

    With A `micro_batches` position p of the share holds a row of micro-batch p % A, so that any A neighbouring
    positions, and every device, hold one row of each.

    Raises ValueError when a micro-batch does not divide by the hosts. Warns when one batch holds a window more than
    once.
    """
    # Grain imports JAX, which users of sources and tokenizers should not have to load.
    import grain

    per_host = _rows_per_host(global_batch_size, host_index, host_count)
    if micro_batches < 1 or per_host % micro_batches:
        raise ValueError(
            f"global_batch_size={global_batch_size} must be a multiple of hosts x micro-batches "
            f"({host_count} x {micro_batches})"
        )
    if start_step < 0 or prefetch < 0:
        raise ValueError(f"start_step={start_step} and data.prefetch={prefetch} must not be negative")
    if len(windows) < global_batch_size:
        warnings.warn(
            f"the {windows.name} split has {len(windows)} windows, fewer than train.global_batch_size="
            f"{global_batch_size}: every batch repeats some",
            stacklevel=2,
        )

    def place(item: int, window: int) -> np.ndarray:
        return np.array([window, item % global_batch_size], np.int64)

    groups = micro_batch_of(np.arange(host_index, global_batch_size, host_count), global_batch_size, micro_batches)
    positions = np.argsort(groups, kind="stable").reshape(micro_batches, -1).T.ravel()

    def read(placed: np.ndarray) -> dict[str, np.ndarray]:
        placed = placed[positions]
        return {"tokens": windows.gather(placed[:, 0]), "rows": placed[:, 1].astype(np.int32)}

    dataset = (
        _endless(windows, global_batch_size, seed)
        .map_with_index(place)[host_index::host_count]
        .batch(per_host, drop_remainder=True)
        .map(read)[start_step:]
    )
    # One thread: reading is a gather from mapped memory, and a second one only contends for the interpreter.
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return Batches(iter(dataset.to_iter_dataset(options)), start_step)


def _endless(windows: Windows | Mixture, global_batch_size: int, seed: int):
    """Grain's endless order of window numbers."""
    import grain

    # Grain's epoch e uses seed + e: neighbouring seeds would replay each other's epochs, so the seed is hashed first.
    seed, *part_seeds = (int(state) for state in np.random.SeedSequence(seed).generate_state(1 + MOST_PARTS))
    if not isinstance(windows, Mixture):
        return grain.MapDataset.range(len(windows)).shuffle(seed).repeat()
    if len(windows.parts) > MOST_PARTS:
        raise ValueError(f"a mixture has at most {MOST_PARTS} corpora, not {len(windows.parts)}")
    orders = [
        grain.MapDataset.range(int(start), int(end)).shuffle(part_seed).repeat()
        for start, end, part_seed in zip(windows.starts, windows.starts[1:], part_seeds, strict=False)
    ]
    # The mix is a fixed pattern; shuffled within each batch, no corpus always gets the rows of small t.
    mix = grain.MapDataset.mix(orders, windows.weights)
    return grain.experimental.WindowShuffleMapDataset(mix, window_size=global_batch_size, seed=seed)


def micro_batch_of(rows: np.ndarray, global_batch_size: int, micro_batches: int) -> np.ndarray:
    """The micro-batch of each row, by its number in the global batch: 0..micro_batches - 1, each equally often.

    Of the rows r, r + M, r + 2 M, ... (M rows to a micro-batch) each goes to another micro-batch. The rows of a host,
    i, i + n, ..., are made of such sets for every n that divides M: so each host holds M / n rows of every micro-batch.
    Neighbours go to different micro-batches, too: t is stratified by row number, and each shall see all of its range.
    """
    size = global_batch_size // micro_batches
    return (rows // size + rows % size) % micro_batches


def validation_batches(
    windows: Windows | Mixture,
    *,
    global_batch_size: int,
    host_index: int = 0,
    host_count: int = 1,
    max_windows: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Every window once, in a fixed order, as this host's share of ceil(n / B) batches.

    Yields tokens int32 [B/hosts L]; rows int32 [B/hosts], the row in the global batch; index int32 [B/hosts], the
    window's number, the same for every batch size; valid bool [B/hosts], False on the rows that fill up the last batch
    (they repeat the first windows). `max_windows` takes that many, evenly spaced (0: all). Raises ValueError when the
    batch does not divide by the hosts.
    """
    _rows_per_host(global_batch_size, host_index, host_count)
    if max_windows < 0:
        raise ValueError(f"max_windows={max_windows} must not be negative (0 means all)")
    total = len(windows)
    count = min(max_windows, total) if max_windows else total
    chosen = np.arange(count) * total // count

    def generate() -> Iterator[dict[str, np.ndarray]]:
        rows = np.arange(host_index, global_batch_size, host_count)
        for start in range(0, count, global_batch_size):
            positions = start + rows
            index = chosen[positions % count]
            yield {
                "tokens": windows.gather(index),
                "rows": rows.astype(np.int32),
                "index": index.astype(np.int32),
                "valid": positions < count,
            }

    return generate()


def _rows_per_host(global_batch_size: int, host_index: int, host_count: int) -> int:
    if not 0 <= host_index < host_count:
        raise ValueError(f"host_index={host_index} must lie in 0..{host_count - 1}")
    if global_batch_size < 1 or global_batch_size % host_count:
        raise ValueError(
            f"global_batch_size={global_batch_size} must be a positive multiple of the number of hosts ({host_count})"
        )
    return global_batch_size // host_count
