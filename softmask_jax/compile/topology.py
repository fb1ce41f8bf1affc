"""TPU slices: public chip specifications, and devices of absent slices to compile for.
Source: cloud.google.com/tpu/docs, "System architecture", one page per kind; the data-centre network's share of a chip is
that of the pod through its chips (v5e: 6.4 Tbit/s for 256; v6e: 25.6) or a chip's own (v5p: 50 Gbit/s)."""
import dataclasses
import math
import os
import re
from collections.abc import Sequence

from softmask_jax.io.files import one_line


@dataclasses.dataclass(frozen=True)
class Chip:
    """Specification of one chip."""

    hbm_gib: int
    flops: float  # peak bfloat16, 1/s
    hbm: float  # bandwidth, bytes/s
    ici: float  # all links to other chips in one direction, bytes/s
    dcn: float | None  # data-centre network, bytes/s; None: not published
    torus: int  # dimensions of the network
    accelerator: str  # name of a slice


CHIPS = {
    "v4": Chip(32, 275e12, 1228e9, 300e9, None, 3, "v4-{cores}"),
    "v5e": Chip(16, 197e12, 819e9, 200e9, 3.125e9, 2, "v5litepod-{chips}"),
    "v5p": Chip(95, 459e12, 2765e9, 600e9, 6.25e9, 3, "v5p-{cores}"),
    "v6e": Chip(32, 918e12, 1640e9, 448e9, 12.5e9, 2, "v6e-{chips}"),
}
# torus dimensions -> number of chips -> shape of a slice
SHAPES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"},
}
# Read by libtpu when loaded; without them it looks for a real TPU.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice such as `v5e:4x4`, or several of them. ValueError for another name or number."""

    name: str
    slices: int = 1

    def __post_init__(self):
        if not re.fullmatch(rf"({'|'.join(CHIPS)}):\d+x\d+(x\d+)?", self.name) or not self.chips_of_slice:
            kinds = ", ".join(CHIPS)
            raise ValueError(f"--topology={self.name} is no TPU slice; write one of {kinds} and its shape: v5e:4x4")
        if self.slices < 1:
            raise ValueError(f"--slices={self.slices} is no number of slices; it must be 1 or more")

    @property
    def kind(self) -> str:
        return self.name.split(":")[0]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * self.chips_of_slice

    @property
    def chips_of_slice(self) -> int:
        return math.prod(int(size) for size in self.name.split(":")[1].split("x"))

    @property
    def memory(self) -> int:
        """Bytes per chip."""
        return self.chip.hbm_gib * 2**30

    def __str__(self) -> str:
        return f"{self.slices} x {self.name}" if self.slices > 1 else self.name

    def devices(self) -> Sequence:
        """Descriptions of the devices, for compilation only. RuntimeError without libtpu."""
        accelerator = self.chip.accelerator.format(chips=self.chips_of_slice, cores=2 * self.chips_of_slice)
        for name, value in (ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": accelerator}).items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        # A single chip is less than a host.
        shape = {"chips_per_host_bounds": (1, 1, 1)} if self.chips_of_slice == 1 else {}
        if self.slices > 1:
            shape["num_slices"] = self.slices
        if self.kind == "v4":
            shape["chip_config_name"] = "megacore"  # a chip's two cores as one device, the default of newer kinds
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=self.name, **shape).devices
        except Exception as error:  # libtpu raises errors of many classes
            raise RuntimeError(f"The TPU compiler does not take {self} ({one_line(error)}); it needs libtpu: "
                               "pip install 'softmask_jax[aot]'") from error


def slice_of(kind: str, chips: int) -> Topology:
    """The slice with this many chips. ValueError for an unknown kind or number."""
    if kind not in CHIPS:
        raise ValueError(f"'{kind}' is no kind of TPU; choose one of {', '.join(CHIPS)}")
    shapes = SHAPES[CHIPS[kind].torus]
    if chips not in shapes:
        raise ValueError(f"a slice of {chips} chips is none of {', '.join(map(str, shapes))}")
    return Topology(f"{kind}:{shapes[chips]}")
