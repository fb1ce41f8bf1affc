"""Traffic of a chip in one run of an optimised program: bytes of HBM and bytes between chips, loops multiplied.

HBM: every instruction outside a fusion reads its operands and writes its results once, a slice only what it takes, an
update in place only what it changes; arrays in scratch memory cost nothing. Not seen: what a kernel reads twice, and the
padding of layouts. Of a condition the branch that moves most is counted.
"""
import dataclasses
import math
import re
from collections.abc import Callable

from softmask_jax.compile.hlo import Array, Computation, Instruction, Module

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all",
    "opt-barrier", "domain",
}  # fmt: skip
# Bookkeeping of the TPU compiler: no bytes are moved.
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollective")


@dataclasses.dataclass
class Traffic:
    """hbm: bytes. payload, wire: bytes by kind of collective: of the arrays, and sent by a chip in a ring.
    count: collectives by kind. unknown: loops of unknown length."""

    hbm: float = 0.0
    payload: dict[str, float] = dataclasses.field(default_factory=dict)
    wire: dict[str, float] = dataclasses.field(default_factory=dict)
    count: dict[str, float] = dataclasses.field(default_factory=dict)
    unknown: int = 0

    def add(self, other: "Traffic", times: float = 1.0) -> None:
        self.hbm += times * other.hbm
        self.unknown += other.unknown
        for name in ("payload", "wire", "count"):
            own = getattr(self, name)
            for kind, value in getattr(other, name).items():
                own[kind] = own.get(kind, 0.0) + times * value

    @property
    def sent(self) -> float:
        """Bytes that a chip sends, all kinds together."""
        return sum(self.wire.values())


# (loop, its length or None, depth among loops of unknown length, whether there is another one inside) -> turns
Trips = Callable[[Instruction, int | None, int, bool], float]


def known_only(loop: Instruction, known: int | None, depth: int, holds_another: bool) -> float:
    """A loop whose length is not known is counted once."""
    return 1 if known is None else known


def measure(module: Module, trips: Trips = known_only) -> Traffic:
    """Of the whole program, on one chip."""
    return _Walk(module, trips).computation(module.computations[module.entry], 0)


def group_size(attributes: str) -> int:
    """How many chips take part in a collective, from its attributes; 0 is all."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        return math.prod(sizes.get(name, 1) for name in re.findall(r"'([^']+)'", match[2]))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    match = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return match[1].count(",") + 1 if match else 0


class _Walk:
    def __init__(self, module: Module, trips: Trips):
        self.module, self.trips, self.held = module, trips, {}

    def computation(self, computation: Computation, depth: int) -> Traffic:
        total = Traffic()
        for instruction in computation.instructions.values():
            total.add(self.instruction(instruction, computation, depth))
        return total

    def instruction(self, i: Instruction, inside: Computation, depth: int) -> Traffic:
        named = self.module.computations.get
        if i.opcode == "while":
            known = self.module.trips(i, inside)
            body = named(i.called("body"))
            holds = known is None and self.holds_unknown(body)
            total, one = Traffic(unknown=int(known is None)), self.computation(body, depth + (known is None))
            total.add(one, self.trips(i, known, depth, holds))
            return total
        if i.opcode == "conditional":
            return max((self.computation(named(b), depth) for b in i.branches()), key=lambda t: (t.hbm, t.sent))
        if i.opcode in ("call", "async-start"):
            return self.computation(named(i.called("to_apply") or i.called("calls")), depth)
        if i.opcode in FREE or i.opcode.endswith(("-done", "-update")):
            return Traffic()
        if i.opcode == "custom-call" and any(f'custom_call_target="{name}' in i.attributes for name in FREE_CALLS):
            return Traffic()
        total = Traffic(self.moved(i, inside))
        if i.opcode.removesuffix("-start") in KINDS:
            total.add(self.collective(i, inside))
        elif i.opcode == "fusion":
            total.add(self.fused_collectives(named(i.called("calls"))))
        return total

    def holds_unknown(self, computation: Computation) -> bool:
        """Whether a loop of unknown length is somewhere inside."""
        if computation.name not in self.held:
            self.held[computation.name] = any(
                (i.opcode == "while" and self.module.trips(i, computation) is None)
                or any(self.holds_unknown(self.module.computations[c]) for c in self.inner(i))
                for i in computation.instructions.values()
            )
        return self.held[computation.name]

    def inner(self, i: Instruction) -> tuple[str, ...]:
        if i.opcode == "conditional":
            return i.branches()
        names = [i.called(a) for a in ("body", "to_apply")] if i.opcode in ("while", "call") else []
        return tuple(name for name in names if name)

    def moved(self, i: Instruction, inside: Computation) -> float:
        """Bytes of HBM."""
        given = [inside.instructions[name] for name in i.operands if name in inside.instructions]
        reads = [sum(a.hbm for a in g.arrays) for g in given]
        if i.opcode == "fusion":
            fused = self.module.computations[i.called("calls")]
            return self.fusion(fused, [g.arrays for g in given], i.arrays)
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return (0 if given[0].arrays[0].space else i.arrays[0].nbytes) + i.arrays[0].hbm
        if i.opcode in ("dynamic-update-slice", "scatter"):
            changed = given[1 if i.opcode == "dynamic-update-slice" else -1].arrays[0]
            return reads[1] + (0 if i.arrays[0].space else changed.nbytes)
        if i.opcode in ("copy-start", "slice-start"):
            # The result holds the operand, or its context, beside what was made.
            made = [a for a in i.arrays if a.dims][: 1 if i.opcode == "copy-start" else None]
            made = min(made, key=lambda a: a.nbytes) if made else Array("pred", (0,), 0)
            return (0 if given[0].arrays[0].space else made.nbytes) + made.hbm
        if i.opcode.endswith("-start"):
            return sum(a.hbm for a in i.arrays)  # a collective's operands and results
        return sum(reads) + sum(a.hbm for a in i.arrays)

    def fusion(self, fused: Computation, given: list, results: tuple[Array, ...]) -> float:
        total = 0.0
        for name, arrays in zip(fused.parameters, given):
            if not any(a.space for a in arrays):
                total += self.read(fused, name)
        parts = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
        for part, array in zip(parts, results):
            if not array.space:
                total += self.written(fused, part, array)
        return total

    def read(self, fused: Computation, name: str) -> float:
        """Bytes that a fusion reads of one of its arrays."""
        own, total = fused.instructions[name], 0.0
        whole = sum(a.nbytes for a in own.arrays)
        for user in fused.users.get(name, ()):
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += user.arrays[0].size * own.arrays[0].itemsize
            elif user.opcode == "bitcast":
                total += self.read(fused, user.name)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue
            elif user.opcode in ("tuple", "custom-call") or user.opcode in KINDS:
                continue
            elif user.opcode == "fusion":
                inner = self.module.computations[user.called("calls")]
                total += sum(self.read(inner, p) for p, o in zip(inner.parameters, user.operands) if o == name)
            else:
                return whole
        return min(total, whole)

    def written(self, fused: Computation, name: str, array: Array) -> float:
        """Bytes that a fusion writes of one of its results."""
        made = fused.instructions[name]
        while made.opcode == "bitcast" and made.operands[0] in fused.instructions:
            made = fused.instructions[made.operands[0]]
        if made.opcode in ("parameter", "custom-call", "get-tuple-element") or made.opcode in KINDS:
            return 0.0
        if made.opcode in ("dynamic-update-slice", "scatter"):
            changed = made.operands[1 if made.opcode == "dynamic-update-slice" else -1]
            return fused.instructions[changed].arrays[0].size * array.itemsize
        return array.nbytes

    def collective(self, i: Instruction, inside: Computation, kind: str = "") -> Traffic:
        kind, members = kind or i.opcode.removesuffix("-start"), group_size(i.attributes)
        if members == 1 and kind != "collective-permute":
            return Traffic()
        made = sum(a.nbytes for a in i.arrays if a.dims or i.opcode == "all-reduce")
        given = sum(a.nbytes for name in i.operands if name in inside.instructions
                    for a in inside.instructions[name].arrays)
        if i.opcode.endswith("-start") and kind != "all-reduce":
            made = max(made - given, 0.0)
        share = 1.0 if not members else (members - 1) / members
        # Of a ring, see "Bringing HPC techniques to deep learning" (Gibiansky, 2017).
        payload, wire = {
            "all-reduce": (made, 2 * share * made), "all-gather": (made, share * made),
            "reduce-scatter": (given, share * given), "all-to-all": (made, share * made),
            "collective-permute": (made, made),
        }[kind]  # fmt: skip
        return Traffic(0.0, {kind: payload}, {kind: wire}, {kind: 1.0})

    def fused_collectives(self, fused: Computation) -> Traffic:
        """Of a fusion: a collective that goes on while others compute is counted where it starts."""
        total = Traffic()
        starts = any("AsyncCollectiveStart" in i.attributes for i in fused.instructions.values())
        for i in fused.instructions.values():
            if i.opcode.removesuffix("-start") in KINDS and (starts or "chain_id" not in i.attributes):
                scattered = "reduce-scatter" if "all-reduce-scatter" in fused.name else ""
                total.add(self.collective(i, fused, scattered))
        return total
