"""Many slices and batch sizes from few compiled programs.

Memory and work of a chip depend only on its own rows and the sharding of parameters. So each sharding is compiled once,
on the smallest slice that has it (four chips of a data axis, else one fsdp x tensor group), with three micro-batches if
gradients accumulate; more of them scale a loop, and a wider data axis changes only traffic."""
import dataclasses
from collections.abc import Callable, Iterator

from softmask_jax.compile import programs, reading, report
from softmask_jax.compile.compiled import Compiled, compile_program
from softmask_jax.compile.reading import Reading
from softmask_jax.compile.report import GIB, roofline
from softmask_jax.compile.topology import slice_of
from softmask_jax.compile.traffic import Traffic
from softmask_jax.config import Mesh

MICRO = 3  # fewer would compile without a loop
WIDEST_FSDP = 16  # beyond, the data axis grows
FULL = 0.95  # share of HBM that an estimate may fill
FIRST = 4  # rows per micro-batch and chip to try first
MOST = 16
SMALLEST = 4  # chips of a slice to compile for


@dataclasses.dataclass(frozen=True)
class Unit:
    kind: str
    fsdp: int
    tensor: int
    rows: int  # of a micro-batch, per chip, or per group of a tensor and a sequence axis
    accumulates: bool  # gradients over micro-batches
    sequence: int = 1
    remat: str = ""  # "" is the config's, like base_dtype
    base_dtype: str = ""

    @property
    def group(self) -> int:
        """Chips without the data axis."""
        return self.fsdp * self.tensor * self.sequence

    @property
    def data(self) -> int:
        return max(1, SMALLEST // self.group)


class Units:
    """Compiles each unit once. say: prints progress. sizes: options of `programs.training`."""

    def __init__(self, config, *, cache=None, say: Callable[[str], None] = lambda _: None, **sizes):
        self.config, self.cache, self.say, self.sizes, self.compiled = config, cache, say, sizes, {}

    def read(self, unit: Unit, micro: int) -> Reading:
        """The unit with `micro` micro-batches, on its own slice."""
        if unit not in self.compiled:
            self.compiled[unit] = self._compile(unit, MICRO if unit.accumulates else 1)
        return reading.of(*self.compiled[unit], micro=micro)

    def _compile(self, unit: Unit, micro: int) -> tuple:
        """Arguments of `reading.of`."""
        topology, rows = slice_of(unit.kind, unit.data * unit.group), unit.rows * unit.data * unit.fsdp
        train = dataclasses.replace(self.config.train, micro_batches=micro, global_batch_size=rows * micro)
        mesh = Mesh(data=unit.data, fsdp=unit.fsdp, sequence=unit.sequence, tensor=unit.tensor)
        chosen = {name: value for name in ("remat", "base_dtype") if (value := getattr(unit, name))}
        model = dataclasses.replace(self.config.model, **chosen)
        config = dataclasses.replace(self.config, train=train, mesh=mesh, model=model)
        self.say(f"{topology.name}: {unit.rows} rows a chip and micro-batch, fsdp {unit.fsdp} ...")
        program = programs.training(config, topology.devices(), **self.sizes)
        if (kept := programs.bytes_per_chip(program.parts)) > topology.memory:
            compiled = Compiled("", {}, kept, topology.memory)  # parameters and optimiser state alone do not fit
        else:
            compiled = compile_program(program.traced.lower(), topology.name, cache=self.cache)
        return program, topology, config.model, compiled

    def measure(self, unit: Unit, micro: int) -> Reading:
        """`read`, or `repeated` where libtpu 0.0.42 has an internal error on the loop over micro-batches."""
        try:
            return self.read(unit, micro)
        except RuntimeError as error:
            if not unit.accumulates or "INTERNAL" not in str(error):
                raise
            self.say(f"  the compiler fails on several micro-batches ({str(error):.80}); from one of them instead")
            return self.repeated(unit, micro)

    def repeated(self, unit: Unit, micro: int) -> Reading:
        """The unit scaled up from one micro-batch, plus memory for summed gradients."""
        one = self.read(dataclasses.replace(unit, accumulates=False), 1)
        if not one.fits:
            return one
        work = {name: getattr(one, name) * micro for name in ("rows", "tokens", "flops", "model_flops")}
        memory = one.memory | {"temporary": one.memory["temporary"] + one.kept["params"]}
        traffic = Traffic().plus(one, micro)
        if unit.group == 1:  # gradients alone, once a step
            traffic = dataclasses.replace(traffic, payload=one.payload, wire=one.wire, count=one.count)
        return dataclasses.replace(one, micro=micro, memory=memory, **work, **vars(traffic))

    def estimate(self, unit: Unit) -> float | None:
        """Bytes per chip, extrapolated linearly in rows from the nearest program of the same sharding."""
        estimates = []
        for other, (program, _, _, compiled) in self.compiled.items():
            if dataclasses.replace(other, rows=unit.rows, accumulates=unit.accumulates) == unit:
                kept = programs.bytes_per_chip(program.parts)
                estimates.append((abs(other.rows - unit.rows), kept + (compiled.peak - kept) * unit.rows / other.rows))
        return min(estimates)[1] if estimates else None


def sweep(config, kinds: list[str], chips: list[int], batches: list[int], **options) -> list[Reading]:
    """A `Reading` per kind of chip, number of chips and global batch size; where nothing fits, the last try."""
    units = Units(config, **options)
    return [point(units, kind, number, batch) for kind in kinds for batch in batches for number in chips]


def point(units: Units, kind: str, chips: int, batch: int) -> Reading:
    """The training step on these chips: the first fsdp size that fits, with as many rows per micro-batch as fit."""
    for fsdp in cuts(units.config.mesh, chips):
        for result in _with_cut(units, kind, chips, batch, fsdp):
            if result.fits:
                return result
    return result


def cuts(mesh, chips: int) -> list[int]:
    """Sizes of the fsdp axis to try: the config's and, unless it is -1, larger ones."""
    most = min(chips // mesh.tensor, WIDEST_FSDP)
    if mesh.fsdp == -1:
        return [most]
    return [mesh.fsdp] + [n for n in (2, 4, 8, 16) if mesh.fsdp < n <= most]


def _with_cut(units: Units, kind: str, chips: int, batch: int, fsdp: int) -> Iterator[Reading]:
    """Readings with ever fewer rows per micro-batch."""
    tensor, size = units.config.mesh.tensor, slice_of(kind, chips).memory
    shards = chips // tensor
    each = max(1, batch // shards) if batch % shards == 0 else 1
    most = max(1, min(each // min(units.config.train.micro_batches, each), MOST))
    for rows in (rows for rows in range(most, 0, -1) if each % rows == 0):
        unit = Unit(kind, fsdp, tensor, rows, rows < each)
        expected = units.estimate(unit)
        too_large = rows > FIRST if expected is None else expected > FULL * size
        if too_large and rows > 1:
            continue
        yield spread(units.measure(unit, each // rows), unit, chips)


def spread(own: Reading, unit: Unit, chips: int) -> Reading:
    """The same step on `chips` chips, with a wider or narrower data axis."""
    data, wire = chips // unit.group, dict(own.wire)
    if unit.data > 1 and unit.group == 1:
        # All traffic is over the data axis.
        scale = ((data - 1) / data) / ((unit.data - 1) / unit.data)
        wire = {kind: size * scale for kind, size in wire.items()}
    elif data > unit.data:
        # Plus the gradients, once a step, each chip its shard.
        extra = 2 * ((data - 1) / data - (unit.data - 1) / unit.data) * own.kept["params"]
        wire["all-reduce"] = wire.get("all-reduce", 0.0) + extra
    share = chips / (unit.data * unit.group)
    mesh = own.mesh | {"data": data}
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one chip"
    cut = f"{unit.rows} rows a chip in each of {own.micro} micro-batches; compiled as {own.topology}"
    return dataclasses.replace(
        own, topology=slice_of(unit.kind, chips).name, mesh=mesh, wire=wire, rows=round(own.rows * share),
        tokens=round(own.tokens * share), description=f"{sizes}, {cut}",
    )


def table(points: list[Reading]) -> str:
    """Markdown table with a row per point."""
    header = ("| slice | chips | rows | data x fsdp | rows a chip x micro-batches | GiB a chip | of | fits | GB sent | "
              "step, s | tokens/s | utilisation |")
    return "\n".join([header, "|---" * 12 + "|", *map(_row, points)])


def _row(p: Reading) -> str:
    others = "".join(f", {axis} {size}" for axis in ("sequence", "tensor") if (size := p.mesh.get(axis, 1)) > 1)
    row = (f"| {p.topology} | {p.chips} | {p.rows:,} | {p.mesh['data']} x {p.mesh['fsdp']}{others} | {p.rows_per_chip} "
           f"x {p.micro} | {p.peak / GIB:.1f} | {p.slice.memory / GIB:.0f} | ")
    if not p.fits:
        return row + "no | | | | |"
    times = roofline(p)
    (fast, slow), (high, low) = times.tokens_per_s, times.utilisation
    return row + (f"yes | {p.sent / 1e9:.2f} | {times.best_s:.3g} to {times.worst_s:.3g} | {slow:,.0f} to {fast:,.0f} "
                  f"| {low:.0%} to {high:.0%} |")


def smallest(points: list[Reading]) -> str:
    """A line naming the smallest machine on which a point fits: fewest chips, then least memory per chip."""
    fitting = [p for p in points if p.fits]
    if not fitting:
        return "Nothing fits. " + report.verdict(min(points, key=lambda p: p.peak / p.slice.memory))
    best = min(fitting, key=lambda p: (p.chips, p.slice.memory, p.rows))
    sizes = f"{best.peak / GIB:.1f} GiB of {best.slice.memory / GIB:.0f} a chip"
    return f"The smallest that fits: {best.topology} with {best.rows} rows ({sizes})."
