"""`launch/SCALING.md`: predictions for both models on 1 to 256 chips."""
from pathlib import Path

from softmask_jax import config as schema
from softmask_jax.compile import choices, report, sweep as sweeps, tune, tuned
from softmask_jax.compile.reading import Reading
from softmask_jax.compile.report import ASSUMED, roofline
from softmask_jax.compile.topology import slice_of

ROOT = Path(__file__).resolve().parents[2]
# End of the file: method, limits of a chip, what breaks beyond 256 chips.
NOTES = Path(__file__).with_name("scaling_notes.md")
MODELS = (
    ("The paper's 169M model", "configs/mdlm_owt.py", "512 rows of 1,024 tokens whatever the slice, as in the paper"),
    ("Dream-7B, DoRA on a frozen base", "configs/dream7b.py",
     "8 rows of 2,048 tokens, or a row a chip where there are more chips (then the learning rate needs a thought)"),
    ("The same on an int8 base", "configs/dream7b.py:int8", "the base's kernels are int8, and gathered as int8"),
)  # fmt: skip

HEAD = """# On paper: 1 to 256 chips

Made by `python -m softmask_jax.compile --scaling --kinds={kinds} --out=launch/SCALING.md` (extra `[aot]`); do not edit.
**Nothing here was run on a TPU.** Memory is what the TPU compiler plans for the real training step, two passes with soft-masking; what is
sent and moved is counted in its optimised programs, loops multiplied; operations are counted in the traced programs. Times
are a roofline over the makers' public figures, with these assumptions: {assumed}. No latency is counted, neither of
launches nor of collectives, nor the reading of data. Each way of cutting a model is compiled once (four chips for a data
axis, one group of chips for fsdp); wider data axes are arithmetic. Mesh, rematerialisation and micro-batches of every
slice are those that `--tune` ranks first.

Columns: rows is the global batch; GB sent is what a chip sends in a step; times and rates go from no overlap at all to
perfect overlap; utilisation is of the bfloat16 peak, by operations that nobody could leave out (no recomputation).
"""


def document(kinds: list[str], chips: list[int], *, models=MODELS, say=lambda _: None, **options) -> str:
    """The whole file. models, options (of `sweep.Units`) replace the real ones in tests."""
    parts = [HEAD.format(assumed=ASSUMED, kinds=",".join(kinds))]
    for title, path, what in models:
        config = schema.load(str(ROOT / path))
        tuner, best = tune.Tuner(config, say=say, **options), []
        for topology in (slice_of(kind, number) for kind in kinds for number in chips):
            rows = choices.batches(config, topology)[-1]
            best.append(tuner.tune(topology, rows, base_dtypes=[config.model.base_dtype]))
        points = [tried.reading for tried in best]
        parts += [f"## {title}\n", f"`{path}`: {what}.\n", sweeps.table(points) + "\n", sweeps.smallest(points) + "\n",
                  settings(config, best) + "\n", sent_table(points) + "\n", remarks(points)]
    return "\n".join(parts) + "\n" + NOTES.read_text("utf-8")


def settings(config, best: list[tune.Tried]) -> str:
    """What a slice's config changes."""
    lines = ["| slice | settings |", "|---|---|"]
    for tried in best:
        flags = tuned.flags(tuned.changes(config, tried.choice))
        lines.append(f"| {tried.reading.topology} | {f'`{flags}`' if flags else 'as they are'} |")
    return "\n".join(lines)


def sent_table(points: list[Reading]) -> str:
    """GB sent per chip and step, by kind of collective, and what bounds the step."""
    kinds = sorted({kind for p in points for kind, size in p.wire.items() if size})
    lines = ["| slice | " + " | ".join(f"{kind}, GB" for kind in kinds) + " | HBM, GB | TFLOP | bound by |",
             "|---" * (len(kinds) + 4) + "|"]
    for p in filter(lambda p: p.fits, points):
        sent = " | ".join(f"{p.wire.get(kind, 0) / 1e9:.2f}" for kind in kinds)
        lines.append(f"| {p.topology} | {sent} | {p.hbm / 1e9:.0f} | {p.flops / 1e12:.1f} | {roofline(p).bound} |")
    return "\n".join(lines)


def remarks(points: list[Reading]) -> str:
    """What does not fit and why; where the network dominates."""
    lines = [f"- {p.topology}: {report.verdict(p)}." for p in points if not p.fits]
    for kind in dict.fromkeys(p.slice.kind for p in points):
        fitting = sorted((p for p in points if p.slice.kind == kind and p.fits), key=lambda p: p.chips)
        if len(fitting) > 1:
            low, high = fitting[0].chips, fitting[-1].chips
            first, last = map(roofline, (fitting[0], fitting[-1]))
            gain, share = last.tokens_per_s[1] / first.tokens_per_s[1], last.ici_s / last.worst_s
            lines.append(f"- {kind}: from {low} to {high} chips ({high / low:.0f} times) {gain:.1f} times the tokens a "
                         f"second without overlap; the network's share of that step is {share:.0%}.")
    bad = ", ".join(p.topology for p in points if p.logits)
    return "\n".join([*lines, f"- Arrays of size B L V: {bad or 'none in any of these programs'}."]) + "\n"
