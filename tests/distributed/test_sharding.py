"""The mesh, the rules, and their errors; what several hosts do together is tested in test_hosts.py with whole runs."""
import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from softmask_jax.distributed import sharding
from tests.helpers import golden_model


def test_one_axis_may_take_the_devices_that_are_left():
    mesh = sharding.make_mesh(-1, 2, 2)
    assert dict(mesh.shape) == {"dcn_data": 1, "data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    assert sharding.batch_shards(mesh) == 4
    assert sharding.batch_shards(sharding.make_mesh(-1, sequence=4)) == 2


def chips(*slices: int) -> list:
    """Devices as a TPU describes them: the slice of each."""
    return [types.SimpleNamespace(platform="tpu", slice_index=index) for index in slices]


def test_a_slices_devices_stay_together():
    devices = chips(1, 0, 1, 0)
    wanted = [[devices[1], devices[3]], [devices[0], devices[2]]]
    assert sharding.split_slices(devices, -1) == sharding.split_slices(devices, 2) == wanted
    ids = np.vectorize(lambda device: device.id)(sharding.make_mesh(-1, 2, dcn_data=2).devices)
    np.testing.assert_array_equal(ids.reshape(2, 4), np.arange(8).reshape(2, 4))


def test_devices_that_know_no_slices_are_one_unless_they_are_to_be_cut():
    mesh = sharding.make_mesh(-1, 2, dcn_data=4)
    assert dict(mesh.shape) == {"dcn_data": 4, "data": 1, "fsdp": 2, "sequence": 1, "tensor": 1}
    assert sharding.batch_shards(mesh) == 8 and sharding.make_mesh().shape["dcn_data"] == 1


@pytest.mark.parametrize("devices, number, sizes", [
    (chips(0, 0, 1, 1), 4, "4 device.s. in 2 slice.s. of 2, 2"), (chips(0, 0, 0, 0), 2, "4 device.s. in 1 slice.s. of 4"),
    (chips(0, 0, 1), -1, "3 device.s. in 2 slice.s. of 2, 1"), (jax.devices(), 3, "in 3 slice.s. of 3, 3, 2"),
    (jax.devices(), 16, "8 device.s. in 8"), (jax.devices(), 0, "8 device.s. in 1 slice.s. of 8"),
])  # fmt: skip
def test_a_number_of_slices_that_does_not_fit_the_devices_is_refused(devices, number, sizes):
    with pytest.raises(ValueError, match=f"config.mesh.dcn_data={number} does not fit .*{sizes}.* their number or -1"):
        sharding.split_slices(devices, number)


def test_sizes_that_do_not_fit_a_slice_are_refused_with_the_number_that_does():
    with pytest.raises(ValueError, match=r"does not fit 4 device\(s\) of each of 2 slices: .* multiply to 4; set one"):
        sharding.make_mesh(1, 8, dcn_data=2)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (-1, -1, 1), (0, 1, 8), (-2, 1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(ValueError, match="config.mesh"):
        sharding.make_mesh(*sizes)


def test_a_batch_that_devices_cannot_share_names_the_nearest_that_they_can():
    with pytest.raises(ValueError, match="multiple of 8, for example 16"):
        sharding.check_batch("config.train.global_batch_size", 13, sharding.make_mesh())


def test_every_parameter_of_the_model_has_a_layout():
    mesh = sharding.make_mesh(2, 2, 2)
    params = golden_model.params()
    layout = sharding.param_shardings(mesh, golden_model.model().axes, params)
    assert layout["backbone"]["head"]["weight"].spec == PartitionSpec("tensor", "fsdp")
    assert layout["backbone"]["blocks"]["qkv"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    placed = jax.device_put(params, layout)
    assert placed["backbone"]["head"]["weight"].addressable_shards[0].data.shape == (64, 32)


@pytest.mark.parametrize(
    "axes, shape, said",
    [
        (("colour",), (4,), "the logical axis 'colour' has no rule"),
        (("vocab",), (4, 4), "1 logical axes"),
        (("vocab",), (5,), "size 5 cannot be cut into 2"),
    ],
)
def test_a_parameter_without_a_fitting_rule_is_named(axes, shape, said):
    with pytest.raises(ValueError, match=f"a/b: .*{said}"):
        sharding.param_shardings(sharding.make_mesh(2, 2, 2), {"a": {"b": axes}}, {"a": {"b": np.zeros(shape)}})


def test_rows_of_a_batch_lie_over_data_and_fsdp():
    mesh = sharding.make_mesh(2, 2, 2)
    batch = sharding.global_batch({"tokens": np.arange(16).reshape(8, 2)}, mesh)
    assert batch["tokens"].addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(batch["tokens"], np.arange(16).reshape(8, 2))


@dataclasses.dataclass(frozen=True)
class Device:
    process_index: int


class Hosts:
    """As much of a mesh over several hosts as `check_hosts` looks at: the host of every device, in the mesh's shape."""

    def __init__(self, hosts):
        self.devices = np.vectorize(Device, otypes=[object])(np.array([hosts]))
        self.shape = dict(zip(sharding.AXES, self.devices.shape))


@pytest.mark.parametrize("hosts", [[[[0, 0]], [[1, 1]]], [[[0], [1]], [[1], [0]]], [[[0], [0], [1], [1]]]])
def test_hosts_with_equal_shares_of_a_batch_are_accepted(hosts):
    sharding.check_hosts(Hosts(hosts))


@pytest.mark.parametrize("hosts", [[[[0, 1]]], [[[0, 0]], [[0, 1]], [[1, 1]]], [[[0], [0], [1]]]])
def test_hosts_that_would_hold_copies_of_the_same_rows_or_unequal_shares_are_refused(hosts):
    with pytest.raises(ValueError, match="does not fit 2 hosts: .* whose product divides the number of devices of one host"):
        sharding.check_batch("config.eval.batch_size", 24, Hosts(hosts))
