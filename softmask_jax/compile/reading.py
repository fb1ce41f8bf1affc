"""Facts of one compiled program: memory, FLOPs, traffic, logits-sized arrays."""
import dataclasses
import math

from softmask_jax.compile import flops, hlo, traffic
from softmask_jax.compile.compiled import Compiled, compile_program
from softmask_jax.compile.hlo import Instruction, Module
from softmask_jax.compile.programs import Program, bytes_per_chip
from softmask_jax.compile.topology import Topology
from softmask_jax.compile.traffic import Traffic
from softmask_jax.diffusion.vocab.positions import SCOPE, block_size
from softmask_jax.distributed import sharding
from softmask_jax.training import update_flops

# Bytes of logits below which there is no warning: small vocabularies use one dense window on purpose.
SMALL_LOGITS = 16 * 2**20
# Names of the loop over micro-batches, on one data shard and on several.
MICRO_BATCHES = ("jit(train_step)/while", "jit(train_step)/shard_map/while")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading(Traffic):
    """Bytes and FLOPs of one chip in one run of a program: a training step, or a whole text of a sampler."""

    topology: str
    kind: str
    description: str
    mesh: dict
    rows: int
    length: int
    micro: int
    tokens: int  # of the batch, or new ones of all rows
    kept: dict  # bytes by name: base, params, ema, optimizer, batch
    memory: dict  # see `Compiled`, also needed, free, seconds; traffic is unknown if the program does not fit
    needed: int
    free: int
    flops: float  # of matrix products
    model_flops: float  # without recomputation
    logits: tuple = ()  # lines about arrays of size B x L x V
    calls: int = 0  # of the network
    seconds: float = 0.0

    @property
    def slice(self) -> Topology:
        return Topology(self.topology, self.mesh["dcn_data"])

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
    def rows_per_chip(self) -> int:
        """Rows of one micro-batch."""
        return max(1, self.rows // self.micro // math.prod(self.mesh[axis] for axis in sharding.BATCH_AXES))


def read(program: Program, topology: Topology, model, *, cache=None) -> Reading:
    """Compile and read a program. model: the config's section. cache: see `compile_program`."""
    return of(program, topology, model, compile_program(program.traced.lower(), str(topology), cache=cache))


def of(program: Program, topology: Topology, model, compiled: Compiled, *, micro: int = 0) -> Reading:
    """Read a compiled program. micro: number of micro-batches to count; 0 is the program's own."""
    micro, chips = micro or program.micro, program.mesh.size
    rows = program.rows // program.micro * micro
    tokens, train = rows * program.length, program.kind == "train"
    loops = Loops(program, micro)
    work = flops.count(flops.live(program.traced.jaxpr), loops.of_jaxpr)
    if train:
        # Nearly all products are inside micro-batches.
        work = work * micro / program.micro
        own = update_flops.model_flops(program.denoiser, model, tokens, program.length, two_passes=program.two_passes,
                                       scored=update_flops.SCORED)
    else:
        # With a cache, fewer positions are computed.
        own = min(work, program.calls * tokens * program.denoiser.flops_per_token(program.length))
    moved, logits = Traffic(), ()
    if compiled.text:
        module = hlo.parse(compiled.text)
        moved, logits = traffic.measure(module, loops.of_hlo), whole_logits(module, program)
    return Reading(
        topology=topology.name, kind=program.kind, description=program.description, mesh=dict(program.mesh.shape),
        rows=rows, length=program.length, micro=micro, tokens=tokens if train else program.rows * program.new_tokens,
        kept={name: bytes_per_chip(tree) for name, tree in program.parts.items()}, memory=compiled.memory,
        needed=compiled.needed, free=compiled.free, flops=work / chips, model_flops=own / chips, logits=logits,
        calls=program.calls, seconds=compiled.seconds, **vars(moved),
    )  # fmt: skip


class Loops:
    """Assumed trip counts of loops of unknown length and of the micro-batch loop.

    Those of `positions.SCOPE` sweep the masked positions, on average half of all, or half of a slice's; the ones around
    them are a sampler's calls or blocks."""

    def __init__(self, program: Program, micro: int):
        self.program, self.micro = program, micro
        total = positions(program)
        self.sweep = (-(-total // block_size(total)) + 1) / 2

    def of_jaxpr(self, scope: str, depth: int) -> float:
        calls, blocks = self.program.calls, self.program.blocks
        if SCOPE in scope:
            return self.dense(in_slice=depth > 1) if self.program.dense_block else self.sweep
        if depth == 0:
            return blocks or calls
        # With slices the first call of a block is outside the loop.
        return calls / max(blocks, 1) - (self.program.slice_length > 0)

    def dense(self, in_slice: bool) -> float:
        """Blocks of positions that are dense in V: on average half of a call's fillable positions are masks."""
        program = self.program
        rows = positions(program) // program.length
        in_slice = in_slice and program.slice_length
        computed, masks = (program.slice_length,) * 2 if in_slice else (program.length, program.new_tokens)
        return (-(-rows * masks // program.dense_block(rows * computed)) + 1) / 2

    def of_hlo(self, loop: Instruction, known: int | None, depth: int) -> float:
        if known is None:
            return self.of_jaxpr(loop.op_name, depth)
        if self.program.kind == "train" and self.program.micro > 1 and loop.op_name in MICRO_BATCHES:
            # The micro-batch loop; the DiT's first micro-batch is outside.
            return known + self.micro - self.program.micro
        return known


def positions(program: Program) -> int:
    """Positions of a micro-batch per chip."""
    return max(1, program.rows // program.micro // sharding.batch_shards(program.mesh)) * program.length


def whole_logits(module: Module, program: Program) -> tuple[str, ...]:
    """Names of arrays with a number per token of the vocabulary and position of a chip.

    One dimension is the vocabulary, padded or not, whole or sharded. They have at least `SMALL_LOGITS` bytes, at least
    as many elements as `positions` times the tensor axis's share of the vocabulary, and are no table [V D] (where D is
    the number of positions, an array [D V] counts)."""
    mesh, count = program.mesh.shape, positions(program)
    fewest = count * min(program.vocab_sizes) // mesh["tensor"]
    sizes = {v // cut for v in program.vocab_sizes for cut in {1, *mesh.values()} if v % cut == 0}
    # Arrays inside a fusion are never stored.
    every = [i for c in module.computations.values() for i in c.instructions.values()]
    fused = {i.called("calls") for i in every if i.opcode == "fusion"}
    held = [i for c in module.computations.values() if c.name not in fused for i in c.instructions.values()]
    lines = {}
    for i, array in ((i, array) for i in held if i.opcode not in traffic.FREE for array in i.arrays):
        whole = any(array.size // v != program.width or count == program.width and array.dims[0] != v
                    for v in sizes & set(array.dims))
        if whole and array.nbytes >= SMALL_LOGITS and array.size >= fewest:
            dims = ",".join(map(str, array.dims))
            lines[i.op_name or i.name] = f"{array.dtype}[{dims}], {array.nbytes / 2**20:,.1f} MiB"
    return tuple(f"{array}: {name}" for name, array in lines.items())
