"""The mesh, and the rules that map logical axes of parameters to the mesh axes fsdp and tensor.
The axis sequence shards positions of activations, not parameters, for inputs too long for one device. dcn_data is data
parallelism over slices, which the slow data-centre network joins: all other axes stay within a slice."""
import collections
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("dcn_data", "data", "fsdp", "sequence", "tensor")
DATA_AXES = ("dcn_data", "data")  # every device has whole parameters, or its fsdp and tensor axes' part of them
BATCH_AXES = (*DATA_AXES, "fsdp")

RULES = {
    "vocab": "tensor",
    "embed": "fsdp",
    "vocab_rows": "fsdp",  # large frozen tables, see dream_denoiser
    "table_width": None,
    "mlp": "tensor",
    "qkv": "tensor",
    "kv": "tensor",
    "heads": "tensor",
    "mod": None,  # sharding a gate over tensor would shard the residual stream
    "cond": None,
    "freq": None,
    "layers": None,
    "rank": None,  # of an adapter, too small to shard
    None: None,  # replicated
}


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence | None = None, *, sequence: int = 1,
    dcn_data: int = -1,
) -> Mesh:
    """Mesh of all devices with the axes of `AXES`; dcn_data: see `split_slices`. Of the sizes within a slice one may be
    -1, for the devices left. ValueError for sizes that do not fit."""
    slices = split_slices(jax.devices() if devices is None else devices, dcn_data)
    count, sizes = len(slices[0]), [data, fsdp, sequence, tensor]
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES[1:], sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"config.mesh ({named}): sizes are positive, and at most one is -1 (all devices left).")
    fixed, each = math.prod(size for size in sizes if size != -1), f" of each of {len(slices)} slices"
    if count % fixed or (-1 not in sizes and fixed != count):
        raise ValueError(f"config.mesh ({named}) does not fit {count} device(s){each * (len(slices) > 1)}: the sizes "
                         f"must multiply to {count}; set one of them to -1 to take what is left.")
    sizes, types = tuple(count // fixed if size == -1 else size for size in sizes), (AxisType.Auto,) * len(AXES)
    meshes = [jax.make_mesh(sizes, AXES[1:], axis_types=types[1:], devices=own) for own in slices]
    return Mesh(np.stack([mesh.devices for mesh in meshes]), AXES, axis_types=types)


def split_slices(devices: Sequence, number: int) -> list[list]:
    """Devices by slice. number: of slices; -1 is as many as there are. ValueError if it is not, or for unequal slices.

    TPU devices know their slice. Others are one slice, or `number` of them in the devices' order, host by host."""
    slices = collections.defaultdict(list)
    for position, device in enumerate(devices):
        cut = position * max(number, 1) // len(devices)
        slices[getattr(device, "slice_index", 0) if device.platform == "tpu" else cut].append(device)
    sizes = [len(own) for own in slices.values()]
    if number not in (-1, len(slices)) or len(set(sizes)) > 1:
        raise ValueError(f"config.mesh.dcn_data={number} does not fit {len(devices)} device(s) in {len(slices)} "
                         f"slice(s) of {', '.join(map(str, sizes))}: slices must be equal, and dcn_data their number "
                         "or -1.")
    return [slices[index] for index in sorted(slices)]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes, everything else replicated."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh | None) -> int:
    """Number of shards of a batch; None is a single device."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def seen_from_here(mesh: Mesh, *axes: str) -> tuple[Mesh | AbstractMesh, tuple[str, ...]]:
    """The mesh and these of its axes as the calling code may name them: within a `jax.shard_map` the context's mesh,
    and the axes over which it does not split the arrays already."""
    context = jax.sharding.get_abstract_mesh()
    if not context.manual_axes:
        return mesh, axes
    return context, tuple(axis for axis in axes if axis not in context.manual_axes)


def rows_over(mesh: Mesh):
    """Constraint of activations x [B L D]: rows over batch axes, positions over sequence if it divides L."""

    def constrain(x):
        here, rows = seen_from_here(mesh, *BATCH_AXES)
        positions = "sequence" if x.shape[1] % mesh.shape["sequence"] == 0 else None
        return jax.lax.with_sharding_constraint(x, NamedSharding(here, PartitionSpec(rows, positions)))

    return constrain


def vocab_over(mesh: Mesh, axis: str):
    """Constraint of a table [Vpad D]: V over a mesh axis, D replicated."""

    def constrain(table):
        here, rows = seen_from_here(mesh, axis)
        return jax.lax.with_sharding_constraint(table, NamedSharding(here, PartitionSpec(rows, None)))

    return constrain


def layer_gather(mesh: Mesh, axes: dict):
    """Function that gathers one layer's frozen parameters over fsdp; axes: logical names of the stacked layers' tree.

    Left to itself, XLA passes pieces of a kernel around the ring and adds up a product's parts in HBM, which moves many
    times the kernel, and gathers int8 kernels after conversion."""

    def gather(layer: dict) -> dict:
        def whole(names, leaf):
            places = [None if RULES[name] == "fsdp" else RULES[name] for name in names[1:]]
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*places)))

        return jax.tree.map(whole, axes, layer, is_leaf=lambda x: isinstance(x, tuple))

    return gather


def check_batch(name: str, size: int, mesh: Mesh) -> None:
    """ValueError unless `size` rows divide evenly over the devices, and the mesh over the hosts."""
    check_hosts(mesh)
    if size % (shards := batch_shards(mesh)):
        raise ValueError(f"{name} is {size} rows, which {shards} device groups (mesh dcn_data x data x fsdp) cannot share "
                         f"evenly: make it a multiple of {shards}, for example {max(1, round(size / shards)) * shards}.")


def check_hosts(mesh: Mesh) -> None:
    """ValueError unless every host has an equal, exclusive share of a batch's rows.
    Hosts read different rows, so copies of a shard on two of them would differ unnoticed."""
    owners = [{device.process_index for device in shard} for shard in mesh.devices.reshape(batch_shards(mesh), -1)]
    shares = collections.Counter(host for hosts in owners for host in hosts)
    if max(map(len, owners)) > 1 or len(set(shares.values())) > 1:
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise ValueError(f"config.mesh ({sizes}) does not fit {len(shares)} hosts: data x fsdp must give each host the "
                         "same number of rows, and the sequence and tensor axes must stay within one host; choose "
                         "sizes whose product divides the number of devices of one host.")


def param_shardings(mesh: Mesh, axes, shapes):
    """NamedShardings from logical names `axes` and a tree `shapes` of the same keys.
    ValueError, naming both, for a logical axis without a rule or a dimension that its mesh axis does not divide."""

    def layout(path, names, leaf):
        where = "/".join(str(entry.key) for entry in path)
        if len(names) != len(leaf.shape):
            raise ValueError(f"{where}: {len(names)} logical axes {names} for shape {leaf.shape}.")
        if unknown := [name for name in names if name not in RULES]:
            raise ValueError(f"{where}: the logical axis '{unknown[0]}' has no rule in sharding.RULES; add one.")
        axes = [RULES[name] for name in names]
        for name, axis, size in zip(names, axes, leaf.shape):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(f"{where}: dimension '{name}' of size {size} cannot be cut into {mesh.shape[axis]} "
                                 f"equal parts; choose a config.mesh.{axis} that divides it.")
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(layout, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host-local rows to global arrays, sharded over the batch axes; meshes as in `check_hosts`."""
    layout, hosts = batch_sharding(mesh), len({device.process_index for device in mesh.devices.flat})
    return {
        name: jax.make_array_from_process_local_data(layout, rows, (len(rows) * hosts, *rows.shape[1:]))
        for name, rows in batch.items()
    }
