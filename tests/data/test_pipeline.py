"""Batches: a function of seed and step only, whoever reads them; every window once an epoch."""
import subprocess
import sys
import threading
import warnings
from itertools import islice

import numpy as np
import pytest

from softmask_jax.data import Windows, batches, validation_batches
from softmask_jax.data.pipeline import micro_batch_of

COUNT = 40


@pytest.fixture(scope="module")
def windows():
    # Window i holds the ids 3 i, 3 i + 1, 3 i + 2: windows can be told apart by their second id.
    return Windows(np.arange(3 * COUNT, dtype=np.uint16), 5, 998, 999, "train")


def window_ids(batch):
    return (batch["tokens"][:, 1] // 3).tolist()


def take(windows, steps, **options):
    options = {"global_batch_size": 8, "seed": 1} | options
    with batches(windows, **options) as iterator:
        return list(islice(iterator, steps))


def joined(shares):
    """The global batch from the hosts' shares, put in place by their rows."""
    rows = np.concatenate([share["rows"] for share in shares])
    tokens = np.concatenate([share["tokens"] for share in shares])
    assert sorted(rows.tolist()) == list(range(len(rows)))
    return tokens[np.argsort(rows)]


def test_a_batch_holds_whole_windows_and_its_row_numbers(windows):
    (batch,) = take(windows, 1)
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "tokens": ("int32", (8, 5)), "rows": ("int32", (8,)),
    }
    assert batch["rows"].tolist() == list(range(8))
    for row, window in zip(batch["tokens"], window_ids(batch), strict=True):
        np.testing.assert_array_equal(row, windows.gather([window])[0])


@pytest.mark.parametrize("hosts, micro_batches", [(1, 1), (1, 2), (2, 1)])
def test_a_balanced_batch_has_the_same_rows_and_neighbours_with_the_same_sum(windows, hosts, micro_batches):
    options = {"micro_batches": micro_batches, "host_count": hosts}
    for host in range(hosts):
        ((plain,), (balanced,)) = (take(windows, 1, host_index=host, balanced=b, **options) for b in (False, True))
        for micro in range(micro_batches):
            own, other = (batch["rows"][micro::micro_batches] for batch in (balanced, plain))
            assert sorted(own) == sorted(other) and len(set(own.reshape(-1, 2).sum(1))) == 1
        order = np.argsort(plain["rows"])[np.argsort(np.argsort(balanced["rows"]))]
        np.testing.assert_array_equal(balanced["tokens"], plain["tokens"][order])


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_reads_the_same_global_batches(windows, hosts):
    alone = take(windows, 12)
    shares = [take(windows, 12, host_index=host, host_count=hosts) for host in range(hosts)]
    for host, share in enumerate(shares):
        assert share[0]["rows"].tolist() == list(range(host, 8, hosts))
    for step in range(12):
        np.testing.assert_array_equal(joined([share[step] for share in shares]), alone[step]["tokens"])


def test_resuming_at_a_step_continues_the_run_even_with_other_hosts(windows):
    alone = take(windows, 15)
    shares = [take(windows, 8, start_step=7, host_index=host, host_count=2) for host in range(2)]
    for step in range(8):
        np.testing.assert_array_equal(joined([share[step] for share in shares]), alone[7 + step]["tokens"])


def test_each_epoch_has_every_window_once_in_a_new_order(windows):
    for size in (8, 16):  # 16 does not divide 40: batches run across the seam
        order = [window for batch in take(windows, 120 // size + 1, global_batch_size=size)
                 for window in window_ids(batch)]
        epochs = [order[start : start + COUNT] for start in (0, COUNT, 2 * COUNT)]
        assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != list(range(COUNT)) != epochs[0]


def test_seeds_give_different_orders_and_neighbours_do_not_share_epochs(windows):
    orders = {seed: [window for batch in take(windows, 10, seed=seed) for window in window_ids(batch)]
              for seed in (0, 1, 2, 2**40)}
    epochs = [tuple(order[start : start + COUNT]) for order in orders.values() for start in (0, COUNT)]
    assert len(set(epochs)) == 8


@pytest.mark.parametrize("prefetch", [1, 2, 16])
def test_reading_ahead_changes_nothing(windows, prefetch):
    for ahead, direct in zip(take(windows, 60, prefetch=prefetch), take(windows, 60, prefetch=0), strict=True):
        np.testing.assert_array_equal(ahead["tokens"], direct["tokens"])
        np.testing.assert_array_equal(ahead["rows"], direct["rows"])


def test_closing_ends_the_threads_of_the_iterator(windows):
    before = threading.active_count()
    iterator = batches(windows, global_batch_size=8, seed=1, start_step=5, prefetch=4)
    next(iterator)
    iterator.close()
    iterator.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(timeout=30)
    assert threading.active_count() == before


def test_a_process_that_never_closes_its_iterator_still_ends():
    code = (
        "import numpy as np; from softmask_jax.data import Windows, batches;"
        "kept = batches(Windows(np.arange(90, dtype=np.uint16), 5, 0, 0), global_batch_size=4, seed=0, prefetch=8);"
        "print(next(kept)['tokens'].shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "(4, 5)"


def test_fewer_windows_than_the_batch_repeat_with_one_warning(windows):
    with pytest.warns(UserWarning, match="40 windows, fewer than train.global_batch_size=64") as caught:
        (batch,) = take(windows, 1, global_batch_size=64)
    assert len(caught) == 1
    assert sorted(set(window_ids(batch))) == list(range(COUNT))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(windows, 1, global_batch_size=40)


@pytest.mark.parametrize(("options", "message"), [
    ({"global_batch_size": 8, "host_count": 3}, "positive multiple of hosts x micro-batches .3 x 1."),
    ({"global_batch_size": 0}, "positive multiple"),
    ({"global_batch_size": 8, "host_count": 2, "host_index": 2}, "host_index=2 must lie in 0..1"),
])
def test_a_batch_that_does_not_divide_by_hosts_is_an_error(windows, options, message):
    with pytest.raises(ValueError, match=message):
        batches(windows, seed=1, **options)
    with pytest.raises(ValueError, match=message):
        validation_batches(windows, **options)


def test_a_negative_step_or_read_ahead_is_an_error(windows):
    for options in ({"start_step": -1}, {"prefetch": -1}):
        with pytest.raises(ValueError, match="must not be negative"):
            batches(windows, global_batch_size=8, seed=1, **options)


@pytest.mark.parametrize(("size", "hosts"), [(8, 1), (16, 1), (16, 4), (64, 2), (64, 1)])
def test_validation_has_every_window_once_in_order_and_marks_the_padding(windows, size, hosts):
    shares = [list(validation_batches(windows, global_batch_size=size, host_index=host, host_count=hosts))
              for host in range(hosts)]
    steps = -(-COUNT // size)
    assert [len(share) for share in shares] == [steps] * hosts
    seen = []
    for step in range(steps):
        batch = {name: np.concatenate([share[step][name] for share in shares]) for name in shares[0][step]}
        batch = {name: array[np.argsort(batch["rows"])] for name, array in batch.items()}
        assert batch["rows"].tolist() == list(range(size)) and batch["valid"].dtype == bool
        np.testing.assert_array_equal(batch["tokens"], windows.gather(batch["index"]))
        seen += batch["index"][batch["valid"]].tolist()
    assert seen == list(range(COUNT))


def test_a_part_of_validation_is_spread_over_the_whole(windows):
    part = list(validation_batches(windows, global_batch_size=4, max_windows=10))
    index = np.concatenate([batch["index"][batch["valid"]] for batch in part])
    assert index.tolist() == list(range(0, 40, 4))
    everything = validation_batches(windows, global_batch_size=4, max_windows=400)
    assert sum(int(batch["valid"].sum()) for batch in everything) == COUNT


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_a_micro_batch_has_the_same_rows_on_any_number_of_hosts(windows, hosts, micro_batches):
    size, found = 16, [set() for _ in range(micro_batches)]
    for host in range(hosts):
        with batches(
            windows, global_batch_size=size, seed=0, host_index=host, host_count=hosts, micro_batches=micro_batches
        ) as source:
            rows = next(source)["rows"]
        assert set(rows) == set(range(host, size, hosts))
        for position, row in enumerate(rows):
            found[position % micro_batches].add(int(row))
    expected = [set() for _ in range(micro_batches)]
    for row, group in enumerate(micro_batch_of(np.arange(size), size, micro_batches)):
        expected[group].add(row)
    assert found == expected and {len(rows) for rows in found} == {size // micro_batches}
