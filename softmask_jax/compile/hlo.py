"""The text of an optimised XLA program as computations of instructions: shapes, operands, loops with their lengths.

The format is what `jax.stages.Compiled.as_text()` prints for a CPU or a TPU; texts of jax 0.10 with libtpu 0.0.42 and of
jax 0.12 with 0.0.50 are tested. A TPU's layouts say where an array lies: `S(1)` and above is on the chip's own scratch
memory, not in HBM.
"""
import dataclasses
import functools
import math
import re

_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?(%\S+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?(%\S+) \(.*\{$")
_END = re.compile(r"\}(, execution_thread=.*)?$")
_BYTES = {"pred": 1, "token": 0}


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
        """Bytes of an element: u4 takes half of one."""
        if self.dtype in _BYTES:
            return _BYTES[self.dtype]
        return int(re.match(r"[a-z]+(\d+)", self.dtype)[1]) / 8

    @property
    def nbytes(self) -> float:
        """Bytes wherever it lies, without what a layout pads."""
        return self.size * self.itemsize

    @property
    def hbm(self) -> float:
        return 0.0 if self.space else self.nbytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """shape: its text. arrays: of the result, a tuple's in order. attributes: what follows the operands."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        return arrays(self.shape)

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names: body, condition, calls, to_apply."""
        match = re.search(rf"\b{attribute}=(%[^\s,}}]+)", self.attributes)
        return match[1] if match else None

    def branches(self) -> tuple[str, ...]:
        """Of a conditional."""
        if match := re.search(r"branch_computations=\{([^}]*)\}", self.attributes):
            return tuple(re.findall(r"%[^\s,}]+", match[1]))
        return tuple(c for c in (self.called("true_computation"), self.called("false_computation")) if c)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def parameters(self) -> list[str]:
        """Names, by their numbers."""
        parameters = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return [i.name for i in sorted(parameters, key=lambda i: int(i.literal))]

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions.values() if i.root), None) or list(self.instructions.values())[-1]

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
        """How often a `while` turns, if that is known before it runs.

        XLA's own `known_trip_count` where it is printed; a TPU's program has none, so it is read from the condition:
        a counter below a constant, from the constant that it starts with (0 where that is not seen), in the steps that
        the body adds: an unrolled loop takes several at once.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        compare, inner = condition.root, condition
        given: dict[str, str] = {}  # of a fused comparison, as a CPU has: its parameters -> what they stand for
        while compare.opcode == "fusion":
            inner = self.computations[compare.called("calls")]
            given, compare = dict(zip(inner.parameters, compare.operands)), inner.root
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        sides = [condition.instructions.get(given.get(name, name)) or inner.instructions[name] for name in compare.operands]
        counter, limit = (_through(condition, side) for side in sides)
        index = re.search(r"index=(\d+)", counter.attributes)
        if counter.opcode != "get-tuple-element" or index is None:
            return None
        index, body = int(index[1]), self.computations[loop.called("body")]
        start, last = self._start(loop, inside, index), self._value(condition, limit.name, {}, 0, -1)
        after = body.root.operands[index] if body.root.opcode == "tuple" else None
        step = self._value(body, after, {}, 0, index) if after else 1
        return None if last is None or not step or step < 0 else max(0, math.ceil((last - start) / step))

    def _start(self, loop: Instruction, inside: Computation, index: int) -> int:
        state = inside.instructions.get(loop.operands[0])
        if state is None or state.opcode != "tuple":
            return 0
        return self._value(inside, state.operands[index], {}, 0, -1) or 0

    def _value(self, inside: Computation, name: str, given: dict, counter: int, index: int) -> int | None:
        """The integer that an instruction computes when the loop's counter, element `index` of its state, is `counter`;
        None for what is more than constants and sums. given: integers of parameters."""
        if name in given:
            return given[name]
        i = inside.instructions[name]
        if i.opcode == "constant":
            return int(i.literal) if i.literal.lstrip("-").isdigit() else None
        if i.opcode == "get-tuple-element":
            return counter if f"index={index}," in i.attributes + "," else None
        if i.opcode not in ("add", "copy", "bitcast", "convert", "copy-start", "copy-done", "fusion"):
            return None
        values = [self._value(inside, o, given, counter, index) for o in i.operands]
        if i.opcode == "fusion":
            fused = self.computations[i.called("calls")]
            return self._value(fused, fused.root.name, dict(zip(fused.parameters, values)), counter, -1)
        if None in values:
            return None
        return sum(values) if i.opcode == "add" else values[0]


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays in the text of a shape, in order."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout or "")
        found.append(Array(dtype, tuple(int(d) for d in dims.split(",") if d), int(space[1]) if space else 0))
    return tuple(found)


def parse(text: str) -> Module:
    """Raises ValueError for text without an entry computation."""
    computations, entry, name, body = {}, None, None, {}
    for line in text.splitlines():
        if name is None:
            if match := _COMPUTATION.match(line):
                name, body = match[2], {}
                entry = name if match[1] else entry
        elif _END.match(line):  # attributes of a kernel may run over lines, and one may begin with brackets
            computations[name], name = Computation(name, body), None
        elif match := _INSTRUCTION.match(line):
            body[match[2]] = _instruction(match[2], match[3], bool(match[1]))
    if entry is None:
        raise ValueError("this text holds no ENTRY computation: it is no optimised XLA program")
    return Module(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closed(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closed(rest, opening)
    inside = rest[opening + 1 : closing - 1]
    return Instruction(name, rest[:opening], shape, tuple(re.findall(r"%[^\s,()]+", inside)), inside.strip(),
                       rest[closing:], root)


def _closed(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"a bracket is never closed: {text[:80]}")


def _through(computation: Computation, instruction: Instruction) -> Instruction:
    """What a value was before it was copied or renamed."""
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start") and instruction.operands:
        before = computation.instructions.get(instruction.operands[0])
        if before is None:
            break
        instruction = before
    return instruction
