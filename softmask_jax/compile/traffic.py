"""HBM and inter-chip traffic of one run of an optimised program, in bytes per chip, loops multiplied.

Outside fusions every instruction reads its operands and writes its results once; slices and in-place updates count only
the affected part, also of views within fusions, on-chip memory nothing. Not counted: repeated reads of kernels, layout
padding. Conditionals count the branch that moves most."""
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable

from softmask_jax.compile.hlo import Array, Computation, Instruction, Module, first

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all",
    "opt-barrier", "domain",
}  # fmt: skip
# Custom calls of the TPU compiler that move no bytes.
FREE_CALLS = re.compile('target="(AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound|AsyncCollective)')
SLICES = ("dynamic-slice", "slice", "gather")
# In-place updates -> index of the operand with the change
UPDATES = {"dynamic-update-slice": 1, "scatter": -1}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Traffic of a chip; dicts are by kind of collective."""

    hbm: float = 0.0  # bytes
    payload: dict[str, float] = dataclasses.field(default_factory=dict)  # bytes of the arrays
    wire: dict[str, float] = dataclasses.field(default_factory=dict)  # bytes sent by a chip in a ring
    count: dict[str, float] = dataclasses.field(default_factory=dict)
    dcn: float = 0.0  # bytes sent by a chip to other slices, beside all that

    def plus(self, other: "Traffic", times: float = 1.0) -> "Traffic":
        sums = {}
        for name in ("payload", "wire", "count"):
            own, more = getattr(self, name), getattr(other, name)
            sums[name] = own | {kind: own.get(kind, 0.0) + times * value for kind, value in more.items()}
        hbm, dcn = (getattr(self, name) + times * getattr(other, name) for name in ("hbm", "dcn"))
        return Traffic(hbm, **sums, dcn=dcn)

    @property
    def sent(self) -> float:
        """Bytes sent by a chip within its slice, all kinds together."""
        return sum(self.wire.values())


# (loop, known trip count or None, number of loops of unknown length around it) -> trip count
Trips = Callable[[Instruction, int | None, int], float]


def measure(module: Module, trips: Trips = lambda loop, known, depth: 1 if known is None else known) -> Traffic:
    """Traffic of the whole program; by default loops of unknown length count once."""
    return _Walk(module, trips).computation(module.computations[module.entry], 0)


def group_size(attributes: str) -> int:
    """Number of chips in a collective, or of slices in a transfer, from its attributes; 0 is all."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        return math.prod(sizes.get(name, 1) for name in re.findall(r"'([^']+)'", match[2]))
    if size := first(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(size)
    members = first(r'(?:replica_groups=|megascale_target="?)\{+([\d,]+)\}', attributes)
    return 0 if members is None else members.count(",") + 1


def _sum(parts: Iterable[Traffic]) -> Traffic:
    return functools.reduce(Traffic.plus, parts, Traffic())


def _hbm(arrays: Iterable[Array]) -> float:
    return sum(array.hbm for array in arrays)


class _Walk:
    def __init__(self, module: Module, trips: Trips):
        self.module, self.trips, self.computations = module, trips, module.computations

    def computation(self, computation: Computation, depth: int) -> Traffic:
        return _sum(self.instruction(i, computation, depth) for i in computation.instructions.values())

    def instruction(self, i: Instruction, inside: Computation, depth: int) -> Traffic:
        if i.opcode == "while":
            known = self.module.trips(i, inside)
            body = self.computation(self.computations[i.called("body")], depth + (known is None))
            return Traffic().plus(body, self.trips(i, known, depth))
        if i.opcode == "conditional":
            branches = [self.computation(self.computations[b], depth) for b in i.branches()]
            return max(branches, key=lambda t: (t.hbm, t.sent))
        if i.opcode in ("call", "async-start"):
            return self.computation(self.computations[i.called("to_apply") or i.called("calls")], depth)
        is_free_call = i.opcode == "custom-call" and FREE_CALLS.search(i.attributes)
        if is_free_call or i.opcode in FREE or i.opcode.endswith(("-done", "-update")):
            return Traffic()
        moved = Traffic(self.moved(i, inside))
        if i.opcode == "send":
            return moved.plus(_sent_to_slices(i, inside))
        if i.opcode.removesuffix("-start") in KINDS:
            return moved.plus(_collective(i, inside))
        if i.opcode == "fusion":
            fused = self.computations[i.called("calls")]
            # Its arrays are the collective's operands and results, and some scalars.
            started = Traffic(_hbm(i.arrays)) if _starts(fused) else Traffic()
            return moved.plus(started).plus(_fused_collectives(fused))
        return moved

    def moved(self, i: Instruction, inside: Computation) -> float:
        """Bytes of HBM traffic."""
        operands = _operands(i, inside)
        if i.opcode == "fusion":
            return self.fusion(self.computations[i.called("calls")], operands, i.arrays)
        if i.opcode in SLICES:
            return (0 if operands[0][0].space else i.arrays[0].nbytes) + i.arrays[0].hbm
        if i.opcode in UPDATES:
            changed = operands[UPDATES[i.opcode]][0]
            return _hbm(operands[1]) + (0 if i.arrays[0].space else changed.nbytes)
        if i.opcode in ("copy-start", "slice-start"):
            # The result also holds the operand or its context.
            copies = [a for a in i.arrays if a.dims][: 1 if i.opcode == "copy-start" else None]
            copy = min(copies, key=lambda a: a.nbytes, default=Array("pred", (0,), 0))
            return (0 if operands[0][0].space else copy.nbytes) + copy.hbm
        if i.opcode == "send":
            return sum(map(_hbm, operands))
        if i.opcode.endswith("-start"):
            return _hbm(i.arrays)  # a collective's operands and results
        return sum(map(_hbm, operands)) + _hbm(i.arrays)

    def fusion(self, fused: Computation, operands: list, results: tuple[Array, ...]) -> float:
        read = sum(
            self.read(fused, name)
            for name, arrays in zip(fused.parameters, operands) if not any(a.space for a in arrays)
        )  # fmt: skip
        parts = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
        return read + sum(_written(fused, part, array) for part, array in zip(parts, results) if not array.space)

    def read(self, fused: Computation, name: str) -> float:
        """Bytes that a fusion reads of one input."""
        own, total = fused.instructions[name], 0.0
        whole = sum(a.nbytes for a in own.arrays)
        for user in fused.users.get(name, ()):
            if user.opcode in SLICES and user.operands[0] == name:
                total += user.arrays[0].size * own.arrays[0].itemsize
            elif user.opcode == "bitcast":
                total += self.read(fused, user.name)
            elif user.opcode == "fusion":
                inner = self.computations[user.called("calls")]
                used = [p for p, o in zip(inner.parameters, user.operands) if o == name]
                total += sum(self.read(fused, user.name) if _viewed(inner) == p else self.read(inner, p) for p in used)
            elif user.opcode in UPDATES and user.operands[0] == name:
                continue
            elif user.opcode not in ("tuple", "custom-call", *KINDS):
                return whole
        return min(total, whole)


def _viewed(fused: Computation) -> str | None:
    """The input of which a fusion within a fusion is another view: another shape, or another tiling of what its
    readers take of it (of a slice of int8 kernels, never of the whole stack). None if it computes anything."""
    source = fused.root
    while source.opcode in ("bitcast", "copy"):
        source = fused.instructions[source.operands[0]]
    return source.name if source.opcode == "parameter" else None


def _operands(i: Instruction, inside: Computation) -> list[tuple[Array, ...]]:
    return [inside.instructions[name].arrays for name in i.operands if name in inside.instructions]


def _written(fused: Computation, name: str, array: Array) -> float:
    """Bytes that a fusion writes of one result."""
    source = fused.instructions[name]
    while source.opcode == "bitcast" and source.operands[0] in fused.instructions:
        source = fused.instructions[source.operands[0]]
    if source.opcode in ("parameter", "custom-call", "get-tuple-element", *KINDS):
        return 0.0
    if source.opcode in UPDATES:
        changed = fused.instructions[source.operands[UPDATES[source.opcode]]]
        return changed.arrays[0].size * array.itemsize
    return array.nbytes


def _collective(i: Instruction, inside: Computation, kind: str = "") -> Traffic:
    kind, members = kind or i.opcode.removesuffix("-start"), group_size(i.attributes)
    if members == 1 and kind != "collective-permute":
        return Traffic()
    result = sum(a.nbytes for a in i.arrays if a.dims or i.opcode == "all-reduce")
    operands = sum(a.nbytes for arrays in _operands(i, inside) for a in arrays)
    if i.opcode.endswith("-start") and kind != "all-reduce":
        result = max(result - operands, 0.0)
    payload = operands if kind == "reduce-scatter" else result
    # Ring algorithm: "Bringing HPC techniques to deep learning" (Gibiansky, 2017).
    share = (members - 1) / members if members else 1.0
    wire = payload * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    return Traffic(0.0, {kind: payload}, {kind: wire}, {kind: 1.0})


def _sent_to_slices(i: Instruction, inside: Computation) -> Traffic:
    """A transfer to other slices: over the hosts, by a runtime that does the collective. Assumed to be a ring."""
    kind, members = first(r'megascale_transfer_type="(\w+)"', i.attributes), group_size(i.attributes)
    share = (members - 1) / members if members else 1.0
    factor = {"ALL_REDUCE": 2 * share, "ALL_GATHER": members - 1, "ONE_TO_ONE": 1.0}.get(kind, share)
    return Traffic(dcn=factor * sum(a.nbytes for arrays in _operands(i, inside) for a in arrays))


def _starts(fused: Computation) -> bool:
    """Whether a fusion starts an asynchronous collective."""
    return any("AsyncCollectiveStart" in i.attributes for i in fused.instructions.values())


def _fused_collectives(fused: Computation) -> Traffic:
    """Collectives of a fusion; asynchronous ones count in the fusion that starts them."""
    starts, kind = _starts(fused), "reduce-scatter" if "all-reduce-scatter" in fused.name else ""
    return _sum(
        _collective(i, fused, kind)
        for i in fused.instructions.values()
        if i.opcode.removesuffix("-start") in KINDS and (starts or "chain_id" not in i.attributes)
    )
