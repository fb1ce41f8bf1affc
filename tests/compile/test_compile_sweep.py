"""Sweeps over slices with the TPU compiler: few compiled programs say what many would."""
import dataclasses

import pytest

from softmask_jax import config as schema
from softmask_jax.compile import programs, reading, sweep
from softmask_jax.compile.topology import Topology

pytestmark = pytest.mark.full

V = 258
# Large enough that arrays live in HBM and gradients are worth sending.
WIDE = ["model.hidden_size=128", "data.seq_len=64"]


@pytest.mark.parametrize("name", ["v4:2x2x1", "v4:1x1x1", "v5e:16x16", "v5p:2x2x4", "v6e:1x1"])
def test_a_slice_of_any_kind_has_one_device_a_chip(name):
    topology = Topology(name)
    assert len(topology.devices()) == topology.chips


def compiled(config, topology: str, cache, **mesh) -> reading.Reading:
    """The program of exactly this slice."""
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))
    slice_ = Topology(topology)
    program = programs.training(config, slice_.devices(), vocab_size=V)
    return reading.read(program, slice_, config.model, cache=cache)


@pytest.mark.parametrize("chips, topology, rows", [(16, "v5e:4x4", 32), (1, "v5e:1x1", 2)])
def test_a_wider_or_narrower_data_axis_is_predicted_from_four_chips(chips, topology, rows, tmp_path):
    config = schema.load("configs/stdlib.py:smoke", [*WIDE, f"train.global_batch_size={rows}"])
    (found,) = sweep.sweep(config, ["v5e"], [chips], [rows], vocab_size=V, cache=tmp_path)
    direct = compiled(config, topology, tmp_path)
    assert (found.topology, found.rows, found.mesh) == (direct.topology, direct.rows, direct.mesh)
    # What does not grow with the rows weighs at this size.
    assert found.flops == pytest.approx(direct.flops, rel=0.03)
    assert found.peak == pytest.approx(direct.peak, rel=0.1)
    assert found.sent == pytest.approx(direct.sent, rel=0.05)
    if chips > 1:  # a single chip's compiler has no sums over chips to place
        assert found.hbm == pytest.approx(direct.hbm, rel=0.1)


def test_more_micro_batches_are_predicted_from_three(tmp_path):
    config = schema.load("configs/stdlib.py:smoke", [*WIDE, "train.global_batch_size=40", "train.micro_batches=5"])
    unit = sweep.Unit("v5e", 1, 1, 2, True)
    units = sweep.Units(config, length=0, vocab_size=V, cache=tmp_path)
    found, direct = units.read(unit, 5), compiled(config, "v5e:2x2", tmp_path)
    assert found.rows == direct.rows == 40 and found.micro == direct.micro == 5
    assert found.sent == pytest.approx(direct.sent, rel=0.02) and found.hbm == pytest.approx(direct.hbm, rel=0.05)
    assert found.flops == pytest.approx(direct.flops, rel=0.02) and found.peak == pytest.approx(direct.peak, rel=0.05)


def test_groups_that_cut_the_state_are_predicted_from_one_group(tmp_path):
    config = schema.load("configs/stdlib.py:smoke", [*WIDE, "train.global_batch_size=16", "mesh.fsdp=4"])
    unit = sweep.Unit("v5e", 4, 1, 1, False)
    units = sweep.Units(config, length=0, vocab_size=V, cache=tmp_path)
    found = sweep.spread(units.read(unit, 1), unit, 16)
    direct = compiled(config, "v5e:4x4", tmp_path, data=4, fsdp=4)
    assert found.mesh == direct.mesh and found.peak == pytest.approx(direct.peak, rel=0.1)
    assert found.flops == pytest.approx(direct.flops, rel=0.02) and found.sent == pytest.approx(direct.sent, rel=0.25)


def test_a_model_that_is_too_large_for_a_chip_is_not_compiled_for_it(tmp_path):
    config = schema.load("configs/stdlib.py:smoke", ["model.hidden_size=8192", "model.num_heads=64", "model.num_blocks=12",
                                                     "train.global_batch_size=4"])
    (found,) = sweep.sweep(config, ["v5e"], [1], [4], vocab_size=V, cache=tmp_path)
    assert not found.fits and found.needed > 16 * 2**30 and not list(tmp_path.iterdir())
