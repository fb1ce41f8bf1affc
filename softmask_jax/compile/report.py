"""Report of one program on one slice: memory of a chip, work, predicted speed."""
import dataclasses

from softmask_jax.compile.reading import Reading
from softmask_jax.compile.roofline import ASSUMED, roofline

GIB = 2**30
# Warn if less than this share of HBM stays free.
TIGHT = 0.05


def verdict(reading: Reading) -> str:
    """Whether it fits and with what margin; if not, the cheapest changes to try."""
    size = reading.slice.memory
    if reading.fits:
        left = size - reading.peak
        close = "; that is little: the compiler keeps some for itself" if left < TIGHT * size else ""
        return f"fits, {left / GIB:.2f} GiB to spare ({left / size:.0%}){close}"
    missing = reading.peak - (reading.free or size)
    tries = "; ".join(f"{number}. {what}" for number, what in enumerate(advice(reading), 1))
    return f"does NOT fit, {missing / GIB:.2f} GiB too much. Try {tries}"


def advice(reading: Reading) -> list[str]:
    """The three cheapest ways to less memory, the most effective first."""
    state = sum(size for name, size in reading.kept.items() if name != "batch")
    temporary = reading.peak - state if reading.needed == 0 else max(reading.needed - state, 0)
    if reading.kind == "generate":
        return ["fewer rows (--rows)", "more tensor (--config.mesh.tensor)", "a shorter text (--length)"]
    cut = reading.mesh["fsdp"] * 2
    if reading.chips > reading.mesh["fsdp"]:
        fsdp = f"more fsdp (--config.mesh.data=-1 --config.mesh.fsdp={cut})"
    else:
        fsdp = f"a larger slice, cut over fsdp ({reading.chips * 4} chips, --config.mesh.fsdp=-1)"
    micro = f"a smaller micro-batch (--config.train.micro_batches={reading.micro * 2})"
    if reading.rows_per_chip == 1:
        micro = "shorter rows (--length), a micro-batch is one row a chip already"
    remat = "more computed again (--config.model.remat=full)"
    return [fsdp, micro, remat] if state > temporary else [micro, remat, fsdp]


def text(reading: Reading) -> str:
    """Readable report."""
    topology, gib = reading.slice, lambda size: f"{size / GIB:8.3f}"
    kept = ", ".join(f"{name} {size / GIB:.3f}" for name, size in reading.kept.items() if size)
    lines = [f"Memory of a chip of {topology.name} ({topology.chips} chips), GiB"]
    if reading.needed:
        lines += [f"  arguments                   ({kept})", f"  the compiler needs {gib(reading.needed)}"]
    else:
        lines += [
            f"  arguments        {gib(reading.memory['arguments'])}   ({kept})",
            f"  temporary        {gib(reading.memory['temporary'])}   (activations, gradients, gathered weights)",
            f"  output           {gib(reading.memory['output'])}   (beside what is updated in place)",
            f"  program          {gib(reading.memory['program'])}",
        ]
    lines.append(f"  together         {gib(reading.peak)}   of {topology.memory / GIB:.0f}: {verdict(reading)}")
    return "\n".join(lines + _work(reading) + warnings(reading))


def warnings(reading: Reading) -> list[str]:
    """Warnings of arrays of size B L V."""
    if not reading.logits:
        return [] if reading.needed else ["No array of size B L V."]
    shown = [f"  {line}" for line in reading.logits[:8]]
    return [f"WARNING: {len(reading.logits)} arrays of size B L V, which may be most of the memory:", *shown]


def _work(reading: Reading) -> list[str]:
    what = "a step in which soft-masking makes two passes" if reading.kind == "train" else "all texts"
    lines = [f"Work of a chip for {what}",
             f"  products         {reading.flops / 1e12:10.3f} TFLOP, {reading.model_flops / 1e12:.3f} of them nobody could leave out"]
    if reading.needed:
        return lines
    moved = ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in sorted(reading.wire.items()) if size) or "none"
    times, chip = roofline(reading), reading.slice.chip
    lines += [
        f"  HBM              {reading.hbm / 1e9:10.3f} GB, {reading.flops / max(reading.hbm, 1):.0f} FLOP a byte "
        f"(the chip is balanced at {chip.flops / chip.hbm:.0f})",
        f"  to other chips   {reading.sent / 1e9:10.3f} GB ({moved})",
        f"Predicted, never run: bound by {times.bound} (compute {times.compute:.4g} s, HBM {times.hbm:.4g} s, network "
        f"{times.ici:.4g} s)",
        f"  {'step' if reading.kind == 'train' else 'all texts':17s}{times.best:10.4g} to {times.worst:.4g} s",
        f"  tokens a second  {times.tokens(times.best):10,.0f} to {times.tokens(times.worst):,.0f}",
        f"  utilisation      {times.utilisation(times.best):10.1%} to {times.utilisation(times.worst):.1%} of "
        f"{chip.flops / 1e12:.0f} TFLOP/s",
        f"  assumed: {ASSUMED}.",
    ]
    if reading.calls:
        lines.append(f"  Assumed as well: all {reading.calls} network calls are made, and masks vanish evenly.")
    return lines


def as_json(reading: Reading) -> dict:
    """For programs: every field of `Reading`, and what follows from them."""
    found = dataclasses.asdict(reading) | {"peak": reading.peak, "fits": reading.fits, "verdict": verdict(reading)}
    if not reading.needed:
        times = roofline(reading)
        found["roofline"] = {
            "compute_s": times.compute, "hbm_s": times.hbm, "ici_s": times.ici, "bound": times.bound,
            "best_s": times.best, "worst_s": times.worst, "tokens_per_s": [times.tokens(t) for t in (times.best, times.worst)],
            "utilisation": [times.utilisation(t) for t in (times.best, times.worst)], "assumed": ASSUMED,
        }  # fmt: skip
    return found
