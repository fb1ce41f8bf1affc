"""Settings that `tune` may choose for a training step on a slice."""
import dataclasses
import itertools
from collections.abc import Iterator

from softmask_jax.compile.sweep import MOST, WIDEST_FSDP
from softmask_jax.compile.topology import Topology
from softmask_jax.config.kinds import KINDS
from softmask_jax.distributed import sharding
from softmask_jax.models.nn.scan import REMAT

SIZES = ("fsdp", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Settings of one program."""

    chips: int
    batch: int  # rows of an update, on all chips
    fsdp: int
    sequence: int
    tensor: int
    remat: str
    rows: int  # of a micro-batch, on a group of sequence x tensor chips
    base_dtype: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of the mesh, without the data axis."""
        return self.fsdp, self.sequence, self.tensor

    @property
    def group(self) -> int:
        """Chips that share rows."""
        return self.sequence * self.tensor

    @property
    def each(self) -> int:
        """Rows of an update on a group."""
        return self.batch * self.group // self.chips

    @property
    def micro(self) -> int:
        """Micro-batches of an update."""
        return self.each // self.rows


class Space:
    """Choices for a config on a slice. batch: rows of an update. ValueError if no mesh divides them."""

    def __init__(self, config, topology: Topology, batch: int):
        self.config, self.chips, self.batch = config, topology.chips, batch
        self.base_dtypes = [config.model.base_dtype]
        if KINDS[config.model.kind].from_base and config.model.adapter != "none":
            self.base_dtypes = ["float", "int8"]
        devices = topology.devices()
        sizes = [n for n in range(1, WIDEST_FSDP + 1) if self.chips % n == 0]
        self.meshes = [
            mesh for mesh in ((f, s, t) for f in sizes for s in sizes for t in sizes)
            if self._possible(*mesh, devices)
        ]  # fmt: skip
        if not self.meshes:
            raise ValueError(f"No mesh of {self.chips} chips shares {batch} rows evenly; give --batches={self.chips}.")

    def _possible(self, fsdp: int, sequence: int, tensor: int, devices) -> bool:
        group = fsdp * sequence * tensor
        if group > WIDEST_FSDP or self.chips % group or self.batch % (self.chips // (sequence * tensor)):
            return False
        try:
            sharding.check_hosts(sharding.make_mesh(-1, fsdp, tensor, devices, sequence=sequence))
        except ValueError:
            return False
        return True

    def starts(self) -> list[Choice]:
        """Settings that need little memory, least first."""
        meshes = sorted(self.meshes, key=lambda sizes: (sizes[1] * sizes[2], -sizes[0]))
        return [Choice(self.chips, self.batch, *sizes, "full", 1, self.config.model.base_dtype) for sizes in meshes]

    def rows(self, choice: Choice) -> list[int]:
        """Sizes of micro-batches, the same on every group."""
        most = min(choice.each, MOST * choice.group)
        return [n for n in range(1, most + 1) if choice.each % n == 0]

    def every(self, choice: Choice) -> Iterator[Choice]:
        """All combinations."""
        for mesh, remat, dtype in itertools.product(self.meshes, REMAT, self.base_dtypes):
            other = dataclasses.replace(choice, **dict(zip(SIZES, mesh)), remat=remat, base_dtype=dtype)
            yield from (dataclasses.replace(other, rows=rows) for rows in self.rows(other))

    def lines(self, start: Choice) -> list[list[Choice]]:
        """Other choices by coordinate, those of less memory first: fsdp, sequence, tensor, remat, rows, base."""
        meshes = [[self._moved(start, mesh) for mesh in self._meshes_along(start, axis)] for axis in range(3)]
        lines = [
            meshes[0][::-1], *meshes[1:], [dataclasses.replace(start, remat=name) for name in reversed(REMAT)],
            [dataclasses.replace(start, rows=rows) for rows in self.rows(start)],
            [dataclasses.replace(start, base_dtype=dtype) for dtype in self.base_dtypes],
        ]  # fmt: skip
        return [[choice for choice in line if choice not in (start, None)] for line in lines]

    def _meshes_along(self, choice: Choice, axis: int) -> list[tuple[int, ...]]:
        """Meshes with any size of one axis; fsdp gives way to the other two."""
        own, line = choice.sizes, {}
        for mesh in sorted(self.meshes):
            if all(mesh[n] == own[n] for n in (1, 2) if n != axis) and (axis == 0 or mesh[0] <= own[0]):
                line[mesh[axis]] = mesh
        return [line[size] for size in sorted(line)]

    def _moved(self, choice: Choice, mesh: tuple[int, ...]) -> Choice | None:
        """On another mesh, with as many rows a chip; None if they do not divide the batch."""
        moved = dataclasses.replace(choice, **dict(zip(SIZES, mesh)))
        moved = dataclasses.replace(moved, rows=choice.rows * moved.group // choice.group)
        return moved if moved.rows in self.rows(moved) else None


def batches(config, topology: Topology) -> list[int]:
    """Rows of an update to try: the config's and, if there are more chips, one a chip."""
    return sorted({config.train.global_batch_size, max(config.train.global_batch_size, topology.chips)})
