"""What the log tells of lambda and of the device; the rest is seen in whole runs (test_train)."""
import types

import pytest

from softmask_jax.tracking import Openness, peak_flops


def said(means, every=100):
    """(step, the line) where there is one."""
    openness = Openness()
    lines = [(step * every, openness.line(step * every, mean, 0.5)) for step, mean in enumerate(means)]
    return [(step, line) for step, line in lines if line]


def test_every_opening_and_closing_of_soft_masking_is_said():
    lines = said([0.3, 0.2, 0.001, 0.002, 0.2, 0.3, 0.001])
    assert [step for step, _ in lines] == [0, 200, 400, 600]
    for (_, line), part in zip(lines, ("is open", "has closed", "is open", "has closed"), strict=True):
        assert part in line and ("Warning" in line) == ("closed" in part)


def test_a_warning_comes_back_after_1000_steps_of_closed_soft_masking():
    lines = said([0.001] * 25)
    assert [step for step, _ in lines] == [0, 1000, 2000] and all("still closed" in line for _, line in lines)


def test_a_scale_near_zero_is_named_as_the_reason():
    assert "config.soft_mask.init_scale starts it higher" in Openness().line(5, 1e-7, 1e-6)


@pytest.mark.parametrize("kind, peak", [("TPU v2", 22.5e12), ("TPU v3", 61.5e12), ("TPU v4", 275e12)])
def test_the_peak_is_that_of_a_jax_device_not_of_a_chip(kind, peak):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == peak
