"""`launch/SCALING.md`: both models from 1 to 256 chips, on paper, by one command."""
from collections.abc import Callable
from pathlib import Path

from softmask_jax.compile import programs, report, sweep as sweeps
from softmask_jax.compile.reading import Reading
from softmask_jax.compile.roofline import ASSUMED, roofline

ROOT = Path(__file__).resolve().parents[2]
MODELS = (
    ("The paper's 169M model", "configs/mdlm_owt.py", "512 rows of 1,024 tokens whatever the slice, as in the paper"),
    ("Dream-7B, DoRA on a frozen base", "configs/dream7b.py",
     "8 rows of 2,048 tokens, or a row a chip where there are more chips (then the learning rate needs a thought)"),
)  # fmt: skip

HEAD = """# On paper: 1 to 256 chips

Made by `python -m softmask_jax.compile --scaling --kinds={kinds} --out=launch/SCALING.md` (extra `[aot]`); do not edit.
**Nothing here was run on a TPU.** Memory is what the TPU compiler plans for the real training step, two passes with soft-masking; what is
sent and moved is counted in its optimised programs, loops multiplied; operations are counted in the traced programs. Times
are a roofline over the makers' public figures, with these assumptions: {assumed}. No latency is counted, neither of
launches nor of collectives, nor the reading of data. Each way of cutting a model is compiled once (four chips for a data
axis, one group of chips for fsdp); wider data axes are arithmetic.

Columns: rows is the global batch; GB sent is what a chip sends in a step; times and rates go from no overlap at all to
perfect overlap; utilisation is of the bfloat16 peak, by operations that nobody could leave out (no recomputation).
"""


def document(kinds: list[str], chips: list[int], *, models=MODELS, sizes: dict | None = None, cache=None,
             vocab_size: int = programs.VOCAB_SIZE, say: Callable[[str], None] = lambda _: None) -> str:
    """The whole file. sizes, vocab_size: of other models than the real ones, for tests."""
    from softmask_jax import config as schema

    parts = [HEAD.format(assumed=ASSUMED, kinds=",".join(kinds))]
    for title, path, what in models:
        config = schema.load(str(ROOT / path))
        points = sweeps.sweep(config, kinds, chips, [config.train.global_batch_size], sizes=sizes, cache=cache,
                              vocab_size=vocab_size, say=say)
        parts += [f"## {title}\n", f"`{path}`: {what}.\n", sweeps.table(points) + "\n", sweeps.smallest(points) + "\n",
                  sent_table(points) + "\n", remarks(points)]
    return "\n".join(parts) + "\n" + BEYOND


def sent_table(points: list[Reading]) -> str:
    """GB that a chip sends in a step, by kind of collective, and what bounds the step."""
    kinds = sorted({kind for p in points for kind, size in p.wire.items() if size})
    lines = ["| slice | " + " | ".join(f"{kind}, GB" for kind in kinds) + " | HBM, GB | TFLOP | bound by |",
             "|---" * (len(kinds) + 4) + "|"]
    for p in points:
        if p.fits:
            sent = " | ".join(f"{p.wire.get(kind, 0) / 1e9:.2f}" for kind in kinds)
            lines.append(f"| {p.topology} | {sent} | {p.hbm / 1e9:.0f} | {p.flops / 1e12:.1f} | {roofline(p).bound} |")
    return "\n".join(lines)


def remarks(points: list[Reading]) -> str:
    """What does not fit and why; where the network takes over."""
    lines = [f"- {p.topology}: {report.verdict(p)}." for p in points if not p.fits]
    for kind in dict.fromkeys(p.slice.kind for p in points):
        own = sorted((p for p in points if p.slice.kind == kind and p.fits), key=lambda p: p.chips)
        if len(own) > 1:
            first, last = own[0], own[-1]
            gain = roofline(last).tokens(roofline(last).worst) / roofline(first).tokens(roofline(first).worst)
            lines.append(
                f"- {kind}: from {first.chips} to {last.chips} chips ({last.chips / first.chips:.0f} times) {gain:.1f} times the "
                f"tokens a second without overlap; the network's share of that step is {roofline(last).ici / roofline(last).worst:.0%}."
            )
    bad = [p.topology for p in points if p.logits]
    lines.append(f"- Arrays of size B L V: {', '.join(bad) if bad else 'none in any of these programs'}.")
    return "\n".join(lines) + "\n"


BEYOND = """## Beside it: what was run

The same program as several processes on one machine, each with its own devices, which find each other as hosts do
(`tests/distributed/test_several_hosts.py`, whole runs of a small model): two and four processes give the losses of one, two of the four
go on from its checkpoint with the same examples, a process that is killed or stopped is named on the others, and the run
that its supervisors start again ends with the bits of one that nobody disturbed. On eight devices of one process the step
gives the same losses and gradients on meshes of every shape, the sequence axis among them (`tests/training/test_train_step.py`,
`test_dream_mesh.py`). That shows that the program is right, not how fast it would be.

## What holds a chip back already

The 169M model is bound by memory on every slice: its attention, with heads of 64, runs without a flash kernel and writes
L x L weights to HBM. Dream's heads of 128 take the splash kernel; with a row a chip it is gathering the base that costs.

## What breaks first beyond 256 chips, and what to do

1. **The 169M model runs out of rows.** 512 rows on 256 chips are two rows a chip. At 1,024 chips there is less than one,
   and the gradient's all-reduce is the same size however little a chip computes. More chips than rows do not help a model
   of this size: use a larger batch (and learn its learning rate), or run several seeds beside each other.
2. **The embedding's gradient is sent too often.** The 169M model's table is read in several places (the token, and those fed
   back to masks), and the compiler reduces the gradient of three of them over the data axis on their own, in every
   micro-batch: 154 MB each. With few rows a chip that is most of what is sent. To do: add up gradients of micro-batches on
   each chip and reduce once a step (a `shard_map` over data around the accumulation), and one scatter for all places.
3. **Dream gathers its base in every pass.** With fsdp each chip receives all 15 GB of the frozen base up to four times a
   step, for one row of work. More rows a chip hide it (two rows halve it for each token); a tensor axis of 4 within a host
   gathers a quarter; an int8 base halves it. Beyond 16 chips only the data axis grows here, so a chip's part of
   the base stays a sixteenth and the price does not rise.
4. **A batch of one row a chip is 256 rows on 256 chips**, 32 times the paper's 8. Longer rows over a sequence axis use
   chips without a larger batch.
5. **One slice ends.** v5e and v6e slices end at 256 chips; more are several slices over the data-centre network, one or two
   orders of magnitude slower than the links within. Then the data axis goes over slices, with the gradient reduced within
   a slice first; the 169M model's 0.7 GB of float32 gradients a step are the first to feel it, Dream's 34 MB of adapters
   the last.
6. **A host lost stops all.** The chance grows with their number; checkpoints every few minutes cost little here (2.7 GB, or
   0.1 GB of adapters), and a supervisor starts all again.
"""
