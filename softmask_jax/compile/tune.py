"""Search for the fastest settings of a training step on a TPU slice, by compiling it.

From the settings that need least memory every coordinate is varied alone: mesh, what is computed again, rows of a
micro-batch, storage of a frozen base. The products of these effects predict all combinations (`Effects`); those that
should fit are compiled, the fastest prediction first, until no prediction beats the fastest compiled program.
`sweep.Units` compiles each program once, on the smallest slice with its sharding. What cannot be built or compiled is passed over."""
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from softmask_jax.compile import sweep
from softmask_jax.compile.choices import SIZES, Choice, Space
from softmask_jax.compile.reading import Reading
from softmask_jax.compile.report import GIB, roofline
from softmask_jax.compile.sweep import FULL, Unit, Units
from softmask_jax.compile.topology import Topology

CHECKED = 6  # combinations compiled at most, for each base


@dataclasses.dataclass(frozen=True)
class Tried:
    """A program: its choice, and its reading or why there is none."""

    choice: Choice
    reading: Reading | None
    problem: str = ""

    @property
    def score(self) -> tuple[int, float]:
        """Larger is better: usable, then fits, then tokens/s half-way between all and no overlap, or least memory."""
        if self.reading is None:
            return -1, 0.0
        if not self.reading.fits:
            return 0, -float(self.reading.peak)
        times = roofline(self.reading)
        return 1, 2 * self.reading.tokens / (times.best_s + times.worst_s)


class Cost(NamedTuple):
    """Of a program: bytes of a chip, and seconds of a token."""

    kept: float  # parameters, optimiser state
    temporary: float
    compute: float
    memory: float
    network: float

    @property
    def peak(self) -> float:
        return self.kept + self.temporary

    @property
    def score(self) -> float:
        """As `Tried.score`."""
        times = self.compute, self.memory, self.network
        return 2 / (max(times) + sum(times))


def cost(reading: Reading) -> Cost:
    """Without memory and network, where the program does not fit."""
    kept, times = sum(reading.kept.values()), roofline(reading)
    return Cost(kept, reading.peak - kept, *(t / reading.tokens for t in (times.compute_s, times.hbm_s, times.ici_s)))


class Effects:
    """Predicts combinations: each coordinate multiplies every part of the cost, as it does for `start` alone."""

    def __init__(self, start: Tried, alone: Iterable[Tried]):
        self.start, self.cost = start.choice, cost(start.reading)
        self.ratios = {self._keys(start.choice): self._ratio(start)}
        self.ratios |= {self._keys(tried.choice): self._ratio(tried) for tried in alone if tried.reading is not None}

    def _keys(self, choice: Choice) -> tuple:
        """Coordinates: sizes of the mesh, remat, rows a chip, base."""
        return choice.sizes, choice.remat, choice.rows / choice.group, choice.base_dtype

    def _ratio(self, tried: Tried) -> list[float]:
        known = len(Cost._fields) if tried.reading.fits else Cost._fields.index("memory")
        pairs = enumerate(zip(self.cost, cost(tried.reading)))
        return [b / a if a and n < known else 1.0 for n, (a, b) in pairs]

    def predict(self, choice: Choice) -> Cost | None:
        """None if a coordinate was not tried alone."""
        own, total = self._keys(self.start), list(self.cost)
        for n, value in enumerate(self._keys(choice)):
            ratio = self.ratios.get((*own[:n], value, *own[n + 1:]))
            if ratio is None:
                return None
            total = [a * b for a, b in zip(total, ratio)]
        return Cost(*total)


class Tuner:
    """Searches for several slices with the same compiled programs. options: of `sweep.Units`."""

    def __init__(self, config, *, say: Callable[[str], None] = lambda _: None, units: Units | None = None, **options):
        self.config, self.say, self.started = config, say, time.monotonic()
        self.units = units or Units(config, **options)
        self.seen: dict[tuple, Tried] = {}

    def tune(self, topology: Topology, batch: int, *, base_dtypes=()) -> Tried:
        """The best program for a slice; `ranking` has all of them. base_dtypes: to try, by default all."""
        space = Space(self.config, topology, batch)
        space.base_dtypes = list(base_dtypes) or space.base_dtypes
        start = next((tried for choice in space.starts() if (tried := self.read(topology, choice)).reading), None)
        if start is None:
            raise RuntimeError(f"The step compiles for {topology.name} on no mesh: {self.ranking(topology)[0].problem}")
        lines = space.lines(start.choice)
        alone = [tried for line in lines for tried in self._alone(topology, line, start, spread=line in lines[1:3])]
        self._combine(topology, space, Effects(start, alone))
        return next(tried for tried in self.ranking(topology) if tried.choice.batch == batch)

    def _alone(self, topology: Topology, line: list[Choice], start: Tried, *, spread: bool) -> Iterator[Tried]:
        """The programs of a line until one does not fit or, if a row is spread over more chips, is slower."""
        for choice in line:
            yield (tried := self.read(topology, choice))
            worse = tried.reading is not None and tried.score < (start.score if spread else (1, 0.0))
            if worse and (spread or choice.fsdp == start.choice.fsdp):  # with less fsdp, int8 may fit
                break

    def _combine(self, topology: Topology, space: Space, effects: Effects) -> None:
        """Compile combinations from the most promising one on, for every base."""
        for dtype in space.base_dtypes:
            limit, left = FULL * topology.memory, CHECKED
            predicted = [
                (own.score, own.peak, choice) for choice in space.every(effects.start)
                if choice.base_dtype == dtype and (own := effects.predict(choice))
            ]  # fmt: skip
            for score, peak, choice in sorted(predicted, key=lambda one: -one[0]):
                best = self.best(topology, dtype, space.batch)
                if not left or (best and best.score >= (1, score)):
                    break
                if peak > limit or (topology.name, choice) in self.seen:
                    continue
                left -= 1
                tried = self.read(topology, choice)
                if tried.reading is not None and not tried.reading.fits:
                    limit = min(limit, peak)

    def unit(self, topology: Topology, choice: Choice) -> Unit:
        return Unit(topology.kind, choice.fsdp, choice.tensor, choice.rows, choice.micro > 1, choice.sequence,
                    choice.remat, choice.base_dtype)

    def read(self, topology: Topology, choice: Choice) -> Tried:
        """The program of a choice."""
        unit = self.unit(topology, choice)
        if (key := (topology.name, choice)) not in self.seen:
            try:
                own = self.units.measure(unit, choice.micro)
                tried = Tried(choice, sweep.spread(own, unit, topology.chips))
            except (ValueError, RuntimeError) as error:  # sizes that do not divide; internal errors of the compiler
                tried = Tried(choice, None, f"{error!s:.160}".partition("\n")[0])
            self.seen[key] = tried
            self.say(self.progress(topology, tried))
        return self.seen[key]

    def ranking(self, topology: Topology) -> list[Tried]:
        """All programs tried for a slice, best first."""
        return sorted((t for (name, _), t in self.seen.items() if name == topology.name), key=lambda t: t.score,
                      reverse=True)

    def best(self, topology: Topology, base_dtype: str, batch: int = 0) -> Tried | None:
        """The first of the ranking with this base and, unless 0, batch."""
        ranking = (t for t in self.ranking(topology) if t.choice.base_dtype == base_dtype)
        return next((t for t in ranking if batch in (0, t.choice.batch)), None)

    def progress(self, topology: Topology, tried: Tried) -> str:
        """A line about a program and the best so far."""
        outcome = tried.problem
        if tried.reading is not None:
            outcome = f"{tried.reading.peak / GIB:.1f} GiB"
            if tried.reading.fits:
                outcome += ", {1:,.0f} to {0:,.0f} tokens/s".format(*roofline(tried.reading).tokens_per_s)
            else:
                outcome += ", too much"
        best = self.ranking(topology)[0]
        most = f"; best so far {best.score[1]:,.0f} tokens/s at half overlap" if best.score[0] == 1 else ""
        done = f"[{time.monotonic() - self.started:5.0f} s, {len(self.seen)} tried] {topology.name}"
        return f"{done}, {words(tried.choice)}: {outcome}{most}"


def words(choice: Choice) -> str:
    """A choice in a line."""
    sizes = ", ".join(f"{name} {size}" for name, size in zip(SIZES, choice.sizes) if size > 1) or "data only"
    base = ", int8 base" if choice.base_dtype == "int8" else ""
    return f"{sizes}, remat {choice.remat}, {choice.rows} rows a micro-batch of {choice.batch}{base}"
