"""Report of one program on one slice: memory per chip, work, and a roofline prediction of speed."""
import dataclasses
from collections.abc import Sequence

from softmask_jax.compile.reading import Reading
from softmask_jax.report.markdown import table

GIB = 2**30
# Warn if less than this share of HBM stays free.
TIGHT = 0.05
# Attainable shares of public peak figures: large bfloat16 products, memory streams, a ring along one mesh axis.
COMPUTE, HBM, LINKS = 0.7, 0.8, 0.9
ASSUMED = (f"products at {COMPUTE:.0%} of the bfloat16 peak, HBM at {HBM:.0%} of its bandwidth, collectives as rings "
           f"over one dimension of the network at {LINKS:.0%} of its links; elementwise work free; between all three "
           "overlapping perfectly (first figure) and not at all (second)")
ASSUMED_DCN = ("data-centre network at {:.3g} GB/s a chip (Google's figure for a pod or a chip), rings between slices by a "
               "runtime on the hosts, overlapping like the rest. The compiler shows what a chip hands to that runtime "
               "and where in the step, not how it is sent, with what delay, or what else is on the network")
NO_DCN = "Google publishes no figure for its data-centre network, whose time is left out"


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Predicted seconds of one run; best: products, memory and network overlap perfectly, worst: not at all."""

    compute_s: float
    hbm_s: float
    ici_s: float
    dcn_s: float
    bound: str
    best_s: float
    worst_s: float
    tokens_per_s: tuple[float, float]  # of the slice, (best, worst)
    utilisation: tuple[float, float]  # MFU, without recomputation
    assumed: str = ASSUMED


def roofline(reading: Reading) -> Roofline:
    chip = reading.slice.chip
    times = {
        "compute": reading.flops / (chip.flops * COMPUTE), "memory": reading.hbm / (chip.hbm * HBM),
        "network": reading.sent / (chip.ici / chip.torus * LINKS),
        "network between slices": reading.dcn / chip.dcn if chip.dcn else 0.0,
    }  # fmt: skip
    ends = max(times.values()), sum(times.values())
    tokens, utilisation = zip(*((reading.tokens / end, reading.model_flops / end / chip.flops) for end in ends))
    return Roofline(*times.values(), max(times, key=times.get), *ends, tokens, utilisation)


def verdict(reading: Reading) -> str:
    """Whether it fits and with what margin; if not, the cheapest changes to try."""
    size = reading.slice.memory
    if reading.fits:
        left = size - reading.peak
        close = "; that is little: the compiler keeps some for itself" if left < TIGHT * size else ""
        return f"fits, {left / GIB:.2f} GiB to spare ({left / size:.0%}){close}"
    missing = reading.peak - (reading.free or size)
    tries = "; ".join(f"{number}. {change}" for number, change in enumerate(advice(reading), 1))
    return f"does NOT fit, {missing / GIB:.2f} GiB too much. Try {tries}"


def advice(reading: Reading) -> list[str]:
    """The three cheapest ways to save memory, most effective first."""
    if reading.kind == "generate":
        return ["fewer rows (--rows)", "more tensor (--config.mesh.tensor)", "a shorter text (--length)"]
    cut, state = reading.mesh["fsdp"], sum(size for name, size in reading.kept.items() if name != "batch")
    fsdp = f"a larger slice, cut over fsdp ({reading.chips * 4} chips, --config.mesh.fsdp=-1)"
    if reading.chips > cut:
        fsdp = f"more fsdp (--config.mesh.data=-1 --config.mesh.fsdp={cut * 2})"
    micro = f"a smaller micro-batch (--config.train.micro_batches={reading.micro * 2})"
    if reading.rows_per_chip == 1:
        micro = "shorter rows (--length), a micro-batch is one row a chip already"
    remat = "more computed again (--config.model.remat=full)"
    return [fsdp, micro, remat] if state > max(reading.peak - state, 0) else [micro, remat, fsdp]


def text(reading: Reading) -> str:
    """Readable report."""
    topology, gib = reading.slice, lambda size: f"{size / GIB:8.3f}"
    kept = ", ".join(f"{name} {size / GIB:.3f}" for name, size in reading.kept.items() if size)
    lines = [f"Memory of a chip of {topology} ({topology.chips} chips), GiB"]
    if reading.needed:
        lines += [f"  arguments                   ({kept})", f"  the compiler needs {gib(reading.needed)}"]
    else:
        notes = {
            "arguments": f"   ({kept})", "temporary": "   (activations, gradients, gathered weights)",
            "output": "   (beside what is updated in place)", "program": "",
        }  # fmt: skip
        lines += [f"  {part:17s}{gib(reading.memory[part])}{note}" for part, note in notes.items()]
    lines.append(f"  together         {gib(reading.peak)}   of {topology.memory / GIB:.0f}: {verdict(reading)}")
    lines += _work(reading)
    if reading.logits:
        lines.append(f"WARNING: {len(reading.logits)} arrays of size B L V, which may be most of the memory:")
        lines += [f"  {line}" for line in reading.logits[:8]]
    elif not reading.needed:
        lines.append("No array of size B L V.")
    return "\n".join(lines)


def _work(reading: Reading) -> list[str]:
    what = "a step in which soft-masking makes two passes" if reading.kind == "train" else "all texts"
    own = f"{reading.model_flops / 1e12:.3f} of them nobody could leave out"
    lines = [f"Work of a chip for {what}", f"  products         {reading.flops / 1e12:10.3f} TFLOP, {own}"]
    if reading.needed:
        return lines
    moved = ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in sorted(reading.wire.items()) if size) or "none"
    times, chip = roofline(reading), reading.slice.chip
    lines += [
        f"  HBM              {reading.hbm / 1e9:10.3f} GB, {reading.flops / max(reading.hbm, 1):.0f} FLOP a byte "
        f"(the chip is balanced at {chip.flops / chip.hbm:.0f})",
        f"  to other chips   {reading.sent / 1e9:10.3f} GB ({moved})",
    ]  # fmt: skip
    several, between = reading.slice.slices > 1, ""
    if several:
        between = f", between slices {times.dcn_s:.4g} s"
        lines.append(f"  to other slices  {reading.dcn / 1e9:10.3f} GB")
    lines += [
        f"Predicted, never run: bound by {times.bound} (compute {times.compute_s:.4g} s, HBM {times.hbm_s:.4g} s, "
        f"network {times.ici_s:.4g} s{between})",
        f"  {'step' if reading.kind == 'train' else 'all texts':17s}{times.best_s:10.4g} to {times.worst_s:.4g} s",
        "  tokens a second  {:10,.0f} to {:,.0f}".format(*times.tokens_per_s),
        "  utilisation      {:10.1%} to {:.1%} of ".format(*times.utilisation) + f"{chip.flops / 1e12:.0f} TFLOP/s",
        f"  assumed: {ASSUMED}.",
    ]
    if several:
        lines.append(f"  Between slices: {ASSUMED_DCN.format(chip.dcn / 1e9) if chip.dcn else NO_DCN}.")
    if reading.calls:
        lines.append(f"  Assumed as well: all {reading.calls} network calls are made, and masks vanish evenly.")
    return lines


def by_rows(readings: Sequence[Reading]) -> str:
    """Table of one sampler with different numbers of rows."""
    lines = []
    for reading in readings:
        lines.append([f"{reading.rows}", f"{reading.peak / GIB:.1f}", *["does not fit"] * (not reading.fits)])
        if reading.fits:
            times = roofline(reading)
            milliseconds = f"{times.best_s / reading.calls * 1e3:.3g} to {times.worst_s / reading.calls * 1e3:.3g}"
            lines[-1] += [f"{reading.hbm / reading.calls / 1e9:.1f}", times.bound, milliseconds,
                          "{:,.0f} to {:,.0f}".format(*sorted(times.tokens_per_s))]  # fmt: skip
        lines[-1] += [""] * (6 - len(lines[-1]))
    first = readings[0]
    header = ["rows", "memory, GiB", "HBM a call, GB", "bound by", "a call, ms", "new tokens/s"]
    return (f"{first.description.split(', ')[0]} on {first.topology}, {first.tokens // first.rows} new tokens of "
            f"{first.length} a row, {first.calls} network calls, all of them made. Predicted, never run.\n\n"
            f"{table(header, lines)}\n\nAssumed: {ASSUMED}.")  # fmt: skip


def as_json(reading: Reading) -> dict:
    """All fields of `Reading` and derived figures."""
    figures = dataclasses.asdict(reading) | {"peak": reading.peak, "fits": reading.fits, "verdict": verdict(reading)}
    return figures if reading.needed else figures | {"roofline": dataclasses.asdict(roofline(reading))}
