"""Facts of one compiled program: memory, operations, traffic, arrays of the size of all logits."""
import dataclasses
import math

from softmask_jax.compile import flops, hlo, traffic
from softmask_jax.compile.compiled import Compiled, compile_program
from softmask_jax.compile.hlo import Module
from softmask_jax.compile.programs import Program, bytes_per_chip
from softmask_jax.compile.topology import Topology
from softmask_jax.compile.traffic import Traffic
from softmask_jax.diffusion.vocab import head
from softmask_jax.distributed import sharding
from softmask_jax.training import update_flops

# Bytes below which an array of all logits gives no warning: small vocabularies take one dense window on purpose.
SMALL_LOGITS = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Reading:
    """Bytes and FLOPs of one chip in one run of the program: a training step, or all of a text.

    Attributes:
      kept: bytes by name: base, params, ema, optimizer, batch.
      memory: see `Compiled.memory`; empty where it does not fit: then the compiler `needed` more than was `free`, and
        traffic is unknown.
      flops: of matrix products; model_flops: without recomputation. tokens: of the global batch, or new ones of all rows.
      logits: lines about arrays of size B x L x V. calls: network calls. unknown: loops whose length was assumed.
    """

    topology: str
    kind: str
    said: str
    mesh: dict
    rows: int
    length: int
    micro: int
    tokens: int
    kept: dict
    memory: dict
    needed: int
    free: int
    flops: float
    model_flops: float
    hbm: float = 0.0
    payload: dict = dataclasses.field(default_factory=dict)
    wire: dict = dataclasses.field(default_factory=dict)
    count: dict = dataclasses.field(default_factory=dict)
    logits: tuple = ()
    calls: int = 0
    unknown: int = 0
    seconds: float = 0.0

    @property
    def slice(self) -> Topology:
        return Topology(self.topology)

    @property
    def chips(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def peak(self) -> int:
        return self.needed or sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return not self.needed and self.peak <= self.slice.memory

    @property
    def sent(self) -> float:
        """Bytes that the chip sends to others."""
        return sum(self.wire.values())

    @property
    def rows_per_chip(self) -> int:
        """Of one micro-batch."""
        return max(1, self.rows // self.micro // (self.mesh["data"] * self.mesh["fsdp"]))


def read(program: Program, topology: Topology, model, *, cache=None, micro: int = 0) -> Reading:
    """Compile a program and read it.

    Args:
      model: the config's section. cache: see `compile_program`.
      micro: count so many micro-batches of the same size instead of the program's own; 0 leaves them.
    """
    compiled = compile_program(program.traced.lower(), topology.name, cache=cache)
    return of(program, topology, model, compiled, micro=micro)


def of(program: Program, topology: Topology, model, compiled: Compiled, *, micro: int = 0) -> Reading:
    """`read`, of a compiled program."""
    micro, chips = micro or program.micro, program.mesh.size
    rows = program.rows // program.micro * micro
    tokens, train = rows * program.length, program.kind == "train"
    loops = Loops(program, micro)
    count = flops.count(program.traced.jaxpr, loops.of_jaxpr)
    if train:
        # Nearly all products are a micro-batch's.
        work = count.flops * micro / program.micro
        own = update_flops.model_flops(program.denoiser, model, tokens, program.length, two_passes=program.two_passes)
    else:
        work = count.flops
        # With a cache less than every position is computed.
        own = min(work, program.calls * tokens * program.denoiser.flops_per_token(program.length))
    found, logits = Traffic(), ()
    if compiled.text:
        module = hlo.parse(compiled.text)
        found, logits = traffic.measure(module, loops.of_hlo), whole_logits(module, program)
    return Reading(
        topology=topology.name, kind=program.kind, said=program.said, mesh=dict(program.mesh.shape), rows=rows,
        length=program.length, micro=micro, tokens=tokens if train else program.rows * program.new_tokens,
        kept={name: bytes_per_chip(tree) for name, tree in program.parts.items()},
        memory=compiled.memory, needed=compiled.needed, free=compiled.free, flops=work / chips,
        model_flops=own / chips, hbm=found.hbm, payload=found.payload, wire=found.wire, count=found.count,
        logits=logits, calls=program.calls, unknown=found.unknown, seconds=compiled.seconds,
    )  # fmt: skip


class Loops:
    """Turns of loops of unknown length, and of the one over micro-batches.

    The innermost are sweeps over the positions that are still masked, some at a time: if masks vanish evenly, half of the
    positions on average. The loops around them are a sampler's calls (and, in blocks, the blocks).
    """

    def __init__(self, program: Program, micro: int):
        self.program, self.micro = program, micro
        shards = sharding.batch_shards(program.mesh)
        total = max(1, program.rows // program.micro // shards) * program.length
        per = min(total, max(head.MIN_BLOCK, total // 8))
        self.sweep = (-(-total // per) + 1) / 2

    def of_jaxpr(self, depth: int, holds_another: bool) -> float:
        if not holds_another:
            return self.sweep
        blocks = self.program.blocks
        return (blocks or self.program.calls) if depth == 0 else self.program.calls / max(blocks, 1)

    def of_hlo(self, loop, known: int | None, depth: int, holds_another: bool) -> float:
        if known is None:
            return self.of_jaxpr(depth, holds_another)
        if self.program.kind == "train" and self.program.micro > 1 and loop.op_name == "jit(train_step)/while":
            # The loop over micro-batches; the dit's first one is outside.
            return known + self.micro - self.program.micro
        return known


def whole_logits(module: Module, program: Program) -> tuple[str, ...]:
    """Arrays of a number for every token of the vocabulary at every position of a chip, by name.

    That is: one dimension is the vocabulary (padded or not, whole or cut by an axis of the mesh); the elements are at
    least a micro-batch's positions on a chip times the tensor axis's share of the vocabulary, but no table [V D]; and
    the bytes at least `SMALL_LOGITS`.
    """
    shards, cuts = sharding.batch_shards(program.mesh), {1, *program.mesh.shape.values()}
    positions = max(1, program.rows // program.micro // shards) * program.length
    fewest = positions * min(program.vocab_sizes) // program.mesh.shape["tensor"]
    sizes = {v // cut for v in program.vocab_sizes for cut in cuts if v % cut == 0}
    every = [i for c in module.computations.values() for i in c.instructions.values()]
    # What is inside a fusion is never held.
    fused = {i.called("calls") for i in every if i.opcode == "fusion"}
    found = {}
    for computation in module.computations.values():
        for i in computation.instructions.values() if computation.name not in fused else ():
            for array in i.arrays if i.opcode not in traffic.FREE else ():
                whole = [v for v in sizes & set(array.dims) if array.size // v != program.width or positions == program.width]
                if array.nbytes >= SMALL_LOGITS and array.size >= fewest and whole:
                    dims = ",".join(map(str, array.dims))
                    found[i.op_name or i.name] = f"{array.dtype}[{dims}], {array.nbytes / 2**20:,.1f} MiB"
    return tuple(f"{what}: {where}" for where, what in found.items())
