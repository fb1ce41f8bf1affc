"""Tables that map PyTorch tensors to our arrays, by family. Numpy only."""
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Entry(NamedTuple):
    """One tensor, or with {i} (block number) in the key one of every block, stacked on our axis 0."""

    path: str  # ours
    key: str  # PyTorch's
    change: str  # "none", "transpose" ([out, in] <-> [in, out]) or "vocabulary" (axis 0 padded to a multiple of 128)
    shape: tuple[str | int, ...]  # PyTorch's, as sizes or letters: "D", or "3D" for three times D
    dtype: str = "float"  # "float" is any floating-point type

    @property
    def stacked(self) -> bool:
        return "{i}" in self.key


class Keys(NamedTuple):
    """Key table of a family."""

    name: str  # for errors
    roots: tuple[str, ...]  # regular expressions of the top-level modules
    table: Callable[[Mapping], tuple[Entry, ...]]  # backbone, from config.json of a converted model
    sizes: Callable[[Mapping], dict[str, int]]  # of the letters, from the same


def linear(path: str, key: str, shape: tuple, change: str = "transpose", bias: bool = True) -> tuple[Entry, ...]:
    """Kernel and bias of a linear layer; shape: the kernel's in PyTorch, [out, in] where `change` transposes it."""
    kernel = Entry(f"{path}/kernel", f"{key}.weight", change, shape)
    out = shape[:1] if change == "transpose" else shape[1:]
    return (kernel, Entry(f"{path}/bias", f"{key}.bias", "none", out)) if bias else (kernel,)


# Soft-masking scalars, the same in every family.
SOFT_MASK = (
    Entry("raw_scale", "tran_head.raw_scale", "none", ()),
    Entry("raw_centre", "tran_head.raw_centre_neg", "none", ()),
    Entry("raw_steepness", "tran_head.raw_steep", "none", ()),
    Entry("raw_temperature", "tran_head.raw_temperature", "none", ()),
)
