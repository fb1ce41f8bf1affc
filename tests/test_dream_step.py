"""Dream's train step: what it draws in each epoch, whoever reads the data."""
import functools
import itertools

import jax
import numpy as np
import pytest

from softmask_jax.data.buckets import Buckets, bucket_batches, steps_per_epoch
from softmask_jax.data.sft import Examples
from softmask_jax.dream_objective import DreamLoss
from softmask_jax.dream_step import DreamStep
from tests import golden_model

KEY, EXAMPLES = jax.random.key(1231), 400


@functools.cache
def buckets() -> Buckets:
    """Short examples, which all have one bucket."""
    lengths = np.full(EXAMPLES, 40)
    return Buckets(Examples(np.zeros(lengths.sum(), np.uint16), np.stack([40 * np.arange(EXAMPLES), lengths, lengths // 4], 1)), 5, 3)


@functools.cache
def program(spec: DreamLoss):
    return jax.jit(DreamStep(golden_model.model(), None, spec, 0.5, 1, 0.0).draw)


def drawn(spec=DreamLoss(), *, epochs=3, first=0, **options) -> dict[tuple[int, int], tuple]:
    """{(epoch, example): (t, x_t, coin)} of all steps of the epochs, from epoch `first` on."""
    found, size = {}, options.setdefault("global_batch_size", 8)
    steps = steps_per_epoch(buckets(), size)
    with bucket_batches(buckets(), seed=1, start_step=first * steps, **options) as batches:
        for number, batch in enumerate(itertools.islice(batches, (epochs - first) * steps)):
            noisy, coins = jax.device_get(program(spec)(batch, KEY))
            for row, example in enumerate(batch["index"].tolist()):
                found[first + number // steps, example] = noisy.t[row], noisy.noisy[row].tobytes(), coins[row]
    return found


@functools.cache
def plain() -> dict:
    return drawn()


def test_over_three_epochs_an_eighth_of_the_examples_has_no_two_passes_at_half_a_chance():
    never = [not any(plain()[epoch, i][2] for epoch in range(3)) for i in range(EXAMPLES)]
    assert abs(np.mean(never) - 0.125) < 4 * np.sqrt(0.125 * 0.875 / EXAMPLES)


def test_every_epoch_draws_other_times_and_masks_for_every_example():
    for part in (0, 1):
        assert all(len({plain()[epoch, i][part] for epoch in range(3)}) == 3 for i in range(EXAMPLES))


def test_noise_that_is_not_fresh_is_the_first_epochs_in_all():
    fixed = drawn(DreamLoss(fresh_noise=False))
    assert fixed == {(epoch, i): plain()[0, i] for epoch in range(3) for i in range(EXAMPLES)}


@pytest.mark.parametrize("options", [
    {"global_batch_size": 16}, {"micro_batches": 4}, {"host_count": 2, "host_index": 1}, {"first": 1},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_the_draws_of_an_epoch_do_not_depend_on_batch_micro_batches_hosts_or_where_a_run_continues(options):
    found = drawn(**options)
    assert len(found) == EXAMPLES * (3 - options.get("first", 0)) / options.get("host_count", 1)
    assert found == {which: plain()[which] for which in found}
