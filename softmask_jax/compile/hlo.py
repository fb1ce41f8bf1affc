"""Parser of optimised XLA programs, `jax.stages.Compiled.as_text()` for a CPU or a TPU: shapes, operands, trip counts.

Tested with jax 0.10 and libtpu 0.0.42, jax 0.12 and 0.0.50. `S(1)` and above in TPU layouts is on-chip memory, not HBM.
"""
import dataclasses
import functools
import math
import re

_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?(%\S+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?(%\S+) \(.*\{$")
_END = re.compile(r"\}(, execution_thread=.*)?$")
_SUMS = ("add", "copy", "bitcast", "convert", "copy-start", "copy-done", "fusion")


def first(pattern: str, text: str) -> str | None:
    """First group of the first match of a pattern, or None."""
    match = re.search(pattern, text)
    return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str
    dims: tuple[int, ...]
    space: int  # 0 is HBM, or a CPU's memory

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def itemsize(self) -> float:
        """Bytes per element; 0.5 for u4."""
        return 1 if self.dtype == "pred" else int(first(r"[a-z]+(\d+)", self.dtype)) / 8

    @property
    def nbytes(self) -> float:
        """Bytes without layout padding."""
        return self.size * self.itemsize

    @property
    def hbm(self) -> float:
        return 0.0 if self.space else self.nbytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shape: str  # as printed
    operands: tuple[str, ...]
    literal: str
    attributes: str  # text after the operands

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Arrays of the result, in order if a tuple."""
        return tuple(
            Array(dtype, tuple(int(d) for d in dims.split(",") if d), int(first(r"S\((\d+)\)", layout) or 0))
            for dtype, dims, layout in _ARRAY.findall(self.shape)
        )

    @property
    def op_name(self) -> str:
        """Origin in the Python program."""
        return first(r'op_name="([^"]*)"', self.attributes) or ""

    def called(self, attribute: str) -> str | None:
        """Computation named by an attribute: body, condition, calls, to_apply."""
        return first(rf"\b{attribute}=(%[^\s,}}]+)", self.attributes)

    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional."""
        if names := first(r"branch_computations=\{([^}]*)\}", self.attributes):
            return tuple(re.findall(r"%[^\s,}]+", names))
        return tuple(c for c in (self.called("true_computation"), self.called("false_computation")) if c)


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]  # in order
    root: Instruction

    @functools.cached_property
    def parameters(self) -> list[str]:
        """Names in order of their numbers."""
        parameters = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return [i.name for i in sorted(parameters, key=lambda i: int(i.literal))]

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str

    def trips(self, loop: Instruction, inside: Computation) -> int | None:
        """Trip count of a `while`, None if unknown before it runs.

        XLA's `known_trip_count` where printed (CPU). Else from a counter that starts at a constant (0 if not seen),
        grows by constant steps of the body and must stay below a constant."""
        if known := first(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known)
        condition, body = (self.computations[loop.called(name)] for name in ("condition", "body"))
        compare, arguments = condition.root, {}
        while compare.opcode == "fusion":  # on a CPU
            fused = self.computations[compare.called("calls")]
            sums = [self._sum(condition, name, arguments) for name in compare.operands]
            condition, compare, arguments = fused, fused.root, dict(zip(fused.parameters, sums))
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        (index, offset), (variable, last) = (self._sum(condition, name, arguments) for name in compare.operands)
        if index is None or offset != 0 or variable is not None or last is None:
            return None
        state, start = inside.instructions.get(loop.operands[0]), 0
        if state is not None and state.opcode == "tuple":
            variable, start = self._sum(inside, state.operands[index], {})
            start = start if variable is None and start else 0
        counter, step = self._sum(body, body.root.operands[index], {}) if body.root.opcode == "tuple" else (index, 1)
        return max(0, math.ceil((last - start) / step)) if counter == index and step and step > 0 else None

    def _sum(self, inside: Computation, name: str, arguments: dict) -> tuple[int | None, int | None]:
        """(index, integer) of an instruction that is an element of the loop's state (None: of none) plus an integer.
        (None, None) for anything else. arguments: such pairs by parameter."""
        if name in arguments:
            return arguments[name]
        i = inside.instructions[name]
        if i.opcode == "constant" and i.literal.lstrip("-").isdigit():
            return None, int(i.literal)
        if i.opcode == "get-tuple-element":
            return int(first(r"index=(\d+)", i.attributes)), 0
        sums = [self._sum(inside, o, arguments) for o in i.operands] if i.opcode in _SUMS else []
        if i.opcode == "fusion":
            fused = self.computations[i.called("calls")]
            return self._sum(fused, fused.root.name, dict(zip(fused.parameters, sums)))
        elements = [index for index, _ in sums if index is not None]
        if not sums or (None, None) in sums or len(elements) > 1:
            return None, None
        return (elements or [None])[0], sum(integer for _, integer in sums)


def parse(text: str) -> Module:
    """Parse a program. ValueError for text without an entry computation."""
    computations, entry, name, body = {}, None, None, {}
    for line in text.splitlines():
        if name is None:
            if match := _COMPUTATION.match(line):
                name, body, root = match[2], {}, None
                entry = name if match[1] else entry
        elif _END.match(line):  # a kernel's attributes may span lines and begin with brackets
            computations[name], name = Computation(name, body, root), None
        elif match := _INSTRUCTION.match(line):
            body[match[2]] = _instruction(match[2], match[3])
            root = body[match[2]] if match[1] else root
    if entry is None:
        raise ValueError("this text holds no ENTRY computation: it is no optimised XLA program")
    return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    end = _closed(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closed(rest, opening)
    inside, opcode = rest[opening + 1 : closing - 1], rest[:opening]
    return Instruction(name, opcode, shape, tuple(re.findall(r"%[^\s,()]+", inside)), inside.strip(), rest[closing:])


def _closed(text: str, start: int) -> int:
    """Index after the bracket that closes the one at `start`."""
    depth = 0
    for bracket in re.finditer(r"[()]", text[start:]):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return start + bracket.end()
    raise ValueError(f"a bracket is never closed: {text[:80]}")
