"""Tables that map PyTorch tensors to our arrays, by family. Numpy only."""
import re
from collections.abc import Callable, Iterable, Mapping
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


class Products(NamedTuple):
    """The linear layers of every block, which int8 kernels and PEFT's adapters are for. R: an adapter's rank."""

    block: str  # beginning of a block's keys in PyTorch
    linear: Mapping[str, tuple[str, tuple[str, str]]]  # our name: PyTorch's below `block`, and its shape [out, in]
    namesakes: Mapping[str, str] = {}  # our name: a module outside of the blocks whose last name is the same

    @property
    def targets(self) -> dict[str, str]:
        """Our name by PEFT's, the last one of a module's path."""
        return {theirs.split(".")[-1]: ours for ours, (theirs, _) in self.linear.items()}

    def module(self, ours: str) -> str:
        """Path of a product in PyTorch, with {i}."""
        return self.block + self.linear[ours][0]

    def kernel(self, names: Iterable[str] | None = None) -> re.Pattern:
        """Pattern of the kernels' keys, group 1 the module; names: ours, all by default."""
        block = re.escape(self.block).replace(r"\{i\}", r"\d+")
        theirs = (re.escape(self.linear[ours][0]) for ours in (self.linear if names is None else names))
        return re.compile(rf"({block}(?:{'|'.join(theirs)}))\.weight")

    def kernels(self, int8: bool = False) -> tuple[Entry, ...]:
        """Entries of the kernels; int8 ones have a scale per output."""
        dtype, entries = "int8" if int8 else "float", []
        for ours, (_, shape) in self.linear.items():
            entries.append(Entry(f"layers/{ours}/kernel", f"{self.module(ours)}.weight", "transpose", shape, dtype))
            if int8:
                scale = Entry(f"layers/{ours}/kernel_scale", f"{self.module(ours)}.weight_scale", "none", shape[:1])
                entries.append(scale)
        return tuple(entries)

    def adapter(self, targets: Iterable[str], use_dora: bool) -> tuple[Entry, ...]:
        """Entries of the low-rank factors, and of DoRA's magnitudes, for `targets` by our names."""
        entries = []
        for ours in targets:
            (out, width), key = self.linear[ours][1], f"base_model.model.{self.module(ours)}"
            entries += [
                Entry(f"layers/{ours}/a", f"{key}.lora_A.weight", "transpose", ("R", width)),
                Entry(f"layers/{ours}/b", f"{key}.lora_B.weight", "transpose", (out, "R")),
            ]
            if use_dora:
                entries.append(Entry(f"layers/{ours}/magnitude", f"{key}.lora_magnitude_vector", "none", (out,)))
        return tuple(entries)


class Keys(NamedTuple):
    """Key table of a family."""

    name: str  # for errors
    roots: tuple[str, ...]  # regular expressions of the top-level modules
    table: Callable[[Mapping], tuple[Entry, ...]]  # backbone, from config.json of a converted model
    sizes: Callable[[Mapping], dict[str, int]]  # of the letters, from the same; V is the vocabulary
    products: Products | None = None  # None: neither int8 kernels nor adapters


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
