"""Many slices and batch sizes at once, from few compiled programs.

A chip's memory and work depend on its own rows and on the sharding of parameters, not on the number of chips that do the
same to other rows. So each sharding is compiled once, on the smallest slice that has it (four chips of a data axis, else
one group of fsdp x tensor), with three micro-batches where gradients are added up. The rest is arithmetic: the number of
micro-batches scales a loop, and a wider data axis changes only what is sent.
"""
import dataclasses
from collections.abc import Callable

from softmask_jax.compile import programs, reading, report
from softmask_jax.compile.compiled import Compiled, compile_program
from softmask_jax.compile.reading import Reading
from softmask_jax.compile.roofline import roofline
from softmask_jax.compile.topology import slice_of

MICRO = 3  # fewer would be no loop
WIDEST_FSDP = 16  # a group that gathers weights together; beyond, groups of the data axis
FULL = 0.95  # of a chip's memory, that an estimate may fill
FIRST = 4  # rows of a micro-batch on a chip that are tried before anything is known
MOST = 16


@dataclasses.dataclass(frozen=True)
class Unit:
    """A sharding: rows of a micro-batch on a chip, whether gradients are added up."""

    kind: str
    fsdp: int
    tensor: int
    rows: int
    accumulates: bool

    @property
    def data(self) -> int:
        return 4 if self.fsdp * self.tensor == 1 else 1


class Units:
    """Compiles each unit once. say: prints progress; other arguments as of `programs.training`."""

    def __init__(self, config, *, length: int, vocab_size: int, sizes: dict | None = None, cache=None, say=lambda _: None):
        self.config, self.cache, self.say, self.made = config, cache, say, {}
        self.options = {"length": length, "vocab_size": vocab_size, "sizes": sizes}

    def read(self, unit: Unit, micro: int) -> Reading:
        """The unit with so many micro-batches, on its own slice."""
        if unit not in self.made:
            topology = slice_of(unit.kind, unit.data * unit.fsdp * unit.tensor)
            number = MICRO if unit.accumulates else 1
            config = self.config
            train = dataclasses.replace(
                config.train, micro_batches=number, global_batch_size=unit.rows * unit.data * unit.fsdp * number
            )
            mesh = dataclasses.replace(config.mesh, data=unit.data, fsdp=unit.fsdp, tensor=unit.tensor)
            config = dataclasses.replace(config, train=train, mesh=mesh)
            self.say(f"{topology.name}: {unit.rows} rows a chip and micro-batch, fsdp {unit.fsdp} ...")
            program = programs.training(config, topology.devices(), **self.options)
            kept = sum(map(programs.bytes_per_chip, program.parts.values()))
            if kept > topology.memory:
                # Parameters and state alone are too much: at least so much is needed.
                compiled = Compiled("", {}, kept, topology.memory)
            else:
                compiled = compile_program(program.traced.lower(), topology.name, cache=self.cache)
            self.made[unit] = (program, topology, config.model, compiled)
        return reading.of(*self.made[unit], micro=micro)

    def repeated(self, unit: Unit, micro: int) -> Reading:
        """The unit from the program of one micro-batch, for where the compiler fails on the loop over several: so many
        times its work, and memory for the gradients that are added up."""
        one = self.read(dataclasses.replace(unit, accumulates=False), 1)
        if not one.fits:
            return one
        times = {name: getattr(one, name) * micro for name in ("rows", "tokens", "flops", "model_flops", "hbm")}
        for name in ("payload", "wire", "count"):
            times[name] = {kind: value * micro for kind, value in getattr(one, name).items()}
        memory = one.memory | {"temporary": one.memory["temporary"] + one.kept["params"]}
        return dataclasses.replace(one, micro=micro, memory=memory, **times)

    def estimate(self, unit: Unit) -> float | None:
        """Bytes of a chip, from programs of the same cut with other rows: what grows with rows grows evenly."""
        found = []
        for other, (program, _, _, compiled) in self.made.items():
            if (other.fsdp, other.tensor) == (unit.fsdp, unit.tensor):
                kept = sum(map(programs.bytes_per_chip, program.parts.values()))
                found.append((abs(other.rows - unit.rows), kept + (compiled.peak - kept) * unit.rows / other.rows))
        return min(found)[1] if found else None


def sweep(config, kinds: list[str], chips: list[int], batches: list[int], *, length: int = 0,
          vocab_size: int = programs.VOCAB_SIZE, sizes: dict | None = None, cache=None,
          say: Callable[[str], None] = lambda _: None) -> list[Reading]:
    """One `Reading` for each kind of chip, number of chips and global batch size; what does not fit as it was tried last."""
    units = Units(config, length=length, vocab_size=vocab_size, sizes=sizes, cache=cache, say=say)
    return [point(units, kind, number, batch) for kind in kinds for batch in batches for number in chips]


def point(units: Units, kind: str, chips: int, batch: int) -> Reading:
    """The training step on so many chips: the first cut that fits, with as many rows in a micro-batch as fit."""
    found = None
    for fsdp in cuts(units.config.mesh, chips):
        found = _with_cut(units, kind, chips, batch, fsdp)
        if found.fits:
            break
    return found


def cuts(mesh, chips: int) -> list[int]:
    """Sizes of the fsdp axis to try: the config's, and where that is a number, larger ones."""
    most = min(chips // mesh.tensor, WIDEST_FSDP)
    if mesh.fsdp == -1:
        return [most]
    return [mesh.fsdp] + [n for n in (2, 4, 8, 16) if mesh.fsdp < n <= most]


def _with_cut(units: Units, kind: str, chips: int, batch: int, fsdp: int) -> Reading:
    tensor, size = units.config.mesh.tensor, slice_of(kind, chips).memory
    shards = chips // tensor
    each = max(1, batch // shards) if batch % shards == 0 else 1
    most = max(1, min(each // min(units.config.train.micro_batches, each), MOST))
    choices = [rows for rows in range(most, 0, -1) if each % rows == 0]
    for number, rows in enumerate(choices):
        unit = Unit(kind, fsdp, tensor, rows, rows < each)
        expected = units.estimate(unit)
        too_large = rows > FIRST if expected is None else expected > FULL * size
        if too_large and number < len(choices) - 1:
            continue
        try:
            own = units.read(unit, each // rows)
        except RuntimeError as error:  # libtpu 0.0.42 has internal errors on some loops
            if not unit.accumulates or "INTERNAL" not in str(error):
                raise
            units.say(f"  the compiler fails on several micro-batches ({str(error):.80}); from one of them instead")
            own = units.repeated(unit, each // rows)
        found = spread(own, unit, chips)
        if found.fits:
            break
    return found


def spread(found: Reading, unit: Unit, chips: int) -> Reading:
    """The same step on `chips` chips: only the data axis is wider, or narrower."""
    group = unit.fsdp * unit.tensor
    data, wire = chips // group, dict(found.wire)
    if unit.data > 1:
        # All that is sent goes over the data axis.
        scale = ((data - 1) / data) / ((unit.data - 1) / unit.data)
        wire = {kind: size * scale for kind, size in wire.items()}
    elif data > 1:
        # Beside what the group does: the gradients of every micro-batch, each chip its part.
        extra = 2 * (data - 1) / data * found.kept["params"] * found.micro
        wire["all-reduce"] = wire.get("all-reduce", 0.0) + extra
    share = chips / (unit.data * group)
    mesh = found.mesh | {"data": data}
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one chip"
    return dataclasses.replace(
        found, topology=slice_of(unit.kind, chips).name, mesh=mesh, wire=wire, rows=round(found.rows * share),
        tokens=round(found.tokens * share),
        said=f"{sizes}, {unit.rows} rows a chip in each of {found.micro} micro-batches; compiled as {found.topology}",
    )


def table(points: list[Reading]) -> str:
    """Markdown: a row for each point."""
    lines = [
        "| slice | chips | rows | data x fsdp | rows a chip x micro-batches | GiB a chip | of | fits | GB sent | step, s | tokens/s | utilisation |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_row(p) for p in points])


def _row(p: Reading) -> str:
    cut = f"{p.mesh['data']} x {p.mesh['fsdp']}" + (f" x {p.mesh['tensor']}" if p.mesh["tensor"] > 1 else "")
    start = (f"| {p.topology} | {p.chips} | {p.rows:,} | {cut} | {p.rows_per_chip} x {p.micro} | {p.peak / report.GIB:.1f} | "
             f"{p.slice.memory / report.GIB:.0f} | ")
    if not p.fits:
        return start + "no | | | | |"
    times = roofline(p)
    return start + (f"yes | {p.sent / 1e9:.2f} | {times.best:.3g} to {times.worst:.3g} | {times.tokens(times.worst):,.0f} to "
                    f"{times.tokens(times.best):,.0f} | {times.utilisation(times.worst):.0%} to {times.utilisation(times.best):.0%} |")


def smallest(points: list[Reading]) -> str:
    """A line that names the smallest machine on which something fits: fewest chips, then least memory a chip."""
    fitting = [p for p in points if p.fits]
    if not fitting:
        return "Nothing fits. " + report.verdict(min(points, key=lambda p: p.peak / p.slice.memory))
    best = min(fitting, key=lambda p: (p.chips, p.slice.memory, p.rows))
    return f"The smallest that fits: {best.topology} with {best.rows} rows ({best.peak / report.GIB:.1f} GiB of {best.slice.memory / report.GIB:.0f} a chip)."
