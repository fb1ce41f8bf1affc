"""Padding and buckets: the recipe's pads by seed and example alone; batches by seed and step, whatever the hosts."""
import itertools

import numpy as np
import pytest

from softmask_jax.data.chat.buckets import (
    Buckets, bucket_batches, bucket_validation_batches, extra_pads, steps_per_epoch,
)
from softmask_jax.data.chat.sft import Examples
from softmask_jax.data.pipeline import micro_batch_of

PAD = 999


@pytest.fixture(scope="module")
def buckets():
    """61 examples of 20 to 560 tokens; example i consists of i, its prompt is 7 long."""
    lengths = 20 + 9 * np.arange(61)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    tokens = np.repeat(np.arange(61, dtype=np.uint16), lengths)
    return Buckets(Examples(tokens, np.stack([starts, lengths, np.full(61, 7)], axis=1)), PAD, seed=3)


def take(buckets, steps, **options):
    with bucket_batches(buckets, **{"global_batch_size": 4, "seed": 1} | options) as source:
        return list(itertools.islice(source, steps))


def test_extra_pads_are_0_to_49_alike_and_depend_on_seed_and_example_alone():
    pads = extra_pads(1231, np.arange(50_000))
    assert pads.min() == 0 and pads.max() == 49
    counts = np.bincount(pads)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)
    np.testing.assert_array_equal(extra_pads(1231, np.array([700, 3])), pads[[700, 3]])
    other = extra_pads(1232, np.arange(50_000))
    assert abs(np.mean(other == pads) - 1 / 50) < 0.005 and abs(np.mean(other[:-1] == pads[1:]) - 1 / 50) < 0.005


def test_a_row_ends_with_the_recipes_pads_and_then_with_those_of_its_bucket(buckets):
    own = buckets.examples.lengths
    assert (buckets.lengths % 8 == 0).all()
    assert ((buckets.lengths >= own) & (buckets.lengths < own + 49 + 8)).all()
    batch = buckets.gather(np.array([5, 60]), 640)
    for row, index in enumerate((5, 60)):
        real, padded = own[index], buckets.lengths[index]
        assert batch["tokens"][row].tolist() == [index] * real + [PAD] * (640 - real)
        assert batch["segment_ids"][row].tolist() == [1] * padded + [0] * (640 - padded)
    assert batch["prompt_lengths"].tolist() == [7, 7] and batch["index"].tolist() == [5, 60]
    assert batch["lengths"].tolist() == buckets.lengths[[5, 60]].tolist()
    assert batch["real_lengths"].tolist() == own[[5, 60]].tolist()
    assert {array.dtype.name for array in batch.values()} == {"int32"}


def test_a_batch_is_of_one_bucket_a_multiple_of_128_that_holds_its_rows(buckets):
    for batch in take(buckets, 40):
        size = batch["tokens"].shape[1]
        assert size % 128 == 0 and (batch["lengths"] <= size).all()
        assert batch["tokens"].shape == batch["segment_ids"].shape == (4, size)
    assert len({batch["tokens"].shape[1] for batch in take(buckets, 40)}) > 3


def test_an_epoch_has_every_example_once_but_for_fewer_than_a_batch_in_a_new_order(buckets):
    steps = steps_per_epoch(buckets, 4)
    assert steps == 15
    batches = take(buckets, 2 * steps)
    epochs = [[i for batch in part for i in batch["index"].tolist()] for part in (batches[:steps], batches[steps:])]
    assert all(len(set(epoch)) == 60 for epoch in epochs) and epochs[0] != epochs[1]
    sizes = [batch["tokens"].shape[1] for batch in batches[:steps]]
    assert sizes != sorted(sizes)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_number_of_hosts_has_the_same_examples_and_micro_batches(buckets, hosts):
    alone = take(buckets, 20, global_batch_size=8)
    for micro in (1, 2):
        shares = [take(buckets, 20, global_batch_size=8, micro_batches=micro, host_index=host, host_count=hosts)
                  for host in range(hosts)]
        for step in range(20):
            whole = {name: np.concatenate([share[step][name] for share in shares]) for name in alone[0]}
            order = np.argsort(whole["rows"])
            for name, expected in alone[step].items():
                np.testing.assert_array_equal(whole[name][order], expected)
            for share in shares:
                groups = micro_batch_of(share[step]["rows"], 8, micro)
                np.testing.assert_array_equal(groups, np.arange(8 // hosts) % micro)


def test_resuming_at_a_step_continues_the_run_also_in_a_later_epoch_and_with_other_hosts(buckets):
    alone = take(buckets, 40)
    for start in (7, 15, 31):
        shares = [take(buckets, 5, start_step=start, host_index=host, host_count=2) for host in range(2)]
        for step in range(5):
            index = np.stack([share[step]["index"] for share in shares], axis=1).ravel()
            np.testing.assert_array_equal(index, alone[start + step]["index"])


def test_another_seed_is_another_order(buckets):
    index = [[batch["index"].tolist() for batch in take(buckets, 15, seed=seed)] for seed in (1, 1, 2)]
    assert index[0] == index[1] != index[2]


@pytest.mark.parametrize(("size", "hosts"), [(8, 1), (4, 2), (64, 4)])
def test_validation_has_every_example_once_and_marks_what_fills_up(buckets, size, hosts):
    shares = [list(bucket_validation_batches(buckets, global_batch_size=size, host_index=host, host_count=hosts))
              for host in range(hosts)]
    assert len({tuple(batch["tokens"].shape for batch in share) for share in shares}) == 1
    seen = [i for share in shares for batch in share for i in batch["index"][batch["valid"]].tolist()]
    assert sorted(seen) == list(range(61))


def test_buckets_can_be_named_and_a_single_one_mixes_all_lengths(buckets):
    few = Buckets(buckets.examples, PAD, 3, (256, 640))
    assert set(few.bucket_of.tolist()) == {256, 640}
    one = Buckets(buckets.examples, PAD, 3, (640,))
    assert {batch["tokens"].shape for batch in take(one, 15)} == {(4, 640)}
    np.testing.assert_array_equal(one.lengths, buckets.lengths)
    for sizes, message in {(100,): "ascending multiples of 128", (256, 128): "ascending", (128,): "end below"}.items():
        with pytest.raises(ValueError, match=message):
            Buckets(buckets.examples, PAD, 3, sizes)


@pytest.mark.parametrize(("options", "message"), [
    ({"global_batch_size": 8, "host_count": 3}, "multiple of hosts x micro-batches"),
    ({"global_batch_size": 8, "host_count": 4, "micro_batches": 4}, "multiple of hosts x micro-batches"),
    ({"host_index": 1}, "host_index=1 must lie"), ({"start_step": -1}, "must not be negative"),
    ({"global_batch_size": 62}, "has 61 examples, fewer than train.global_batch_size=62"),
])  # fmt: skip
def test_a_batch_that_cannot_be_made_is_an_error(buckets, options, message):
    with pytest.raises(ValueError, match=message):
        bucket_batches(buckets, **{"global_batch_size": 4, "seed": 1} | options)
