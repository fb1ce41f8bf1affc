"""Key tables of the families: which PyTorch tensor is which of our arrays. Numpy only."""
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Entry(NamedTuple):
    """One tensor: our path and PyTorch's key; with {i}, a block's number, blocks are stacked on our axis 0.

    change: "none", "transpose" ([out, in] <-> [in, out]) or "vocabulary" (axis 0 zero-padded to a multiple of 128).
    shape: PyTorch's, as sizes or letters ("D", or "3D" for three times D). dtype: "float" is any floating-point type.
    """

    path: str
    key: str
    change: str
    shape: tuple[str | int, ...]
    dtype: str = "float"

    @property
    def stacked(self) -> bool:
        return "{i}" in self.key


class Keys(NamedTuple):
    """Key table of a family.

    name: in errors. roots: regular expressions of the modules at the network's root. table, sizes: entries of the
    backbone and sizes of their letters, from config.json of a converted model.
    """

    name: str
    roots: tuple[str, ...]
    table: Callable[[Mapping], tuple[Entry, ...]]
    sizes: Callable[[Mapping], dict[str, int]]


def linear(path: str, key: str, shape: tuple, change: str = "transpose", bias: bool = True) -> tuple[Entry, ...]:
    """Kernel and bias of a linear layer; shape: the kernel's in PyTorch, [out, in] where `change` transposes it."""
    kernel = Entry(f"{path}/kernel", f"{key}.weight", change, shape)
    out = shape[:1] if change == "transpose" else shape[1:]
    return (kernel, Entry(f"{path}/bias", f"{key}.bias", "none", out)) if bias else (kernel,)


# Soft-masking's scalars, of every family.
SOFT_MASK = (
    Entry("raw_scale", "tran_head.raw_scale", "none", ()),
    Entry("raw_centre", "tran_head.raw_centre_neg", "none", ()),
    Entry("raw_steepness", "tran_head.raw_steep", "none", ()),
    Entry("raw_temperature", "tran_head.raw_temperature", "none", ()),
)
