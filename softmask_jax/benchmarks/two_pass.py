"""What the second pass costs, and what a chunked vocabulary saves, on this machine:

    python -m softmask_jax.benchmarks.two_pass [--steps 12] [--device cpu] [--json out.json]

Seconds of a train step with one pass and with two, alternating, and their ratio beside its limit: with a forward pass
as 1 and a backward pass as 2, a plain step is 3 and two passes are 4/3 of it; with full rematerialisation 4, and 5/4.
Work that both kinds of step share (the optimiser, logits computed again) lowers the ratio, the sweep over the
vocabulary raises it. Then the vocabulary's operations, dense and chunked: planned temporary memory, and seconds."""
import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax import config
from softmask_jax.benchmarks.timing import (
    alternate, benchmark_parser, machine, positive, prepare, publish, quartiles, spread_text,
)  # fmt: skip
from softmask_jax.config.command_line import command
from softmask_jax.config.jax_settings import root_key, settled
from softmask_jax.diffusion.vocab import head as vocab_head
from softmask_jax.distributed import sharding
from softmask_jax.models import denoiser
from softmask_jax.report.markdown import table
from softmask_jax.training import optimizer, train_state, train_step

LIMITS = {"none": Fraction(4, 3), "full": Fraction(5, 4)}  # with a frozen base 3/2
SCORED = 3  # k of the sweep


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the trained model and its batch; head_*: of the hidden states [batch L D] that meet a large vocabulary."""

    hidden_size: int = 192
    num_blocks: int = 4
    num_heads: int = 4
    seq_len: int = 128
    batch: int = 16
    vocab_size: int = 2048
    compute_dtype: str = "float32"
    head_batch: int = 2
    head_seq_len: int = 128
    head_width: int = 128


def random_step(settings: config.Config, vocab_size: int, *coin: jax.Array) -> tuple[Callable, int]:
    """One compiled train step on one device with random tokens, as a call with `coin`; its temporary bytes."""
    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    sizes = dict(vocab_size=vocab_size, mask_token_id=vocab_size - 1)
    model = denoiser.build(settings.model, settings.soft_mask, mesh=mesh, **sizes)
    tx = optimizer.make(settings.optimizer, settings.updates)
    rows, length = settings.train.global_batch_size, settings.data.seq_len
    tokens = np.random.default_rng(0).integers(0, vocab_size - 1, (rows, length), np.int32)
    batch = sharding.global_batch({"tokens": tokens, "rows": np.arange(rows, dtype=np.int32)}, mesh)
    state, key = train_state.initialise(model, tx, mesh, seed=0), root_key(0)
    train = jax.jit(train_step.make(settings, model, tx).train_step, donate_argnums=0)
    step = train.lower(state, batch, key, *coin).compile()

    def call(*coin):
        nonlocal state
        state, metrics = step(state, batch, key, *coin)
        return state, metrics

    return call, step.memory_analysis().temp_size_in_bytes


def compiled_steps(sizes: Sizes, remat: str) -> tuple[dict[str, Callable], int]:
    """One compiled train step as two calls, the coin forced to 0 and to 1; its temporary memory."""
    settings = config.from_dict(dict(
        model=dict(hidden_size=sizes.hidden_size, num_blocks=sizes.num_blocks, num_heads=sizes.num_heads, dropout=0.0,
                   compute_dtype=sizes.compute_dtype, remat=remat),
        soft_mask=dict(init_scale=0.5), train=dict(global_batch_size=sizes.batch), data=dict(seq_len=sizes.seq_len),
    ))  # fmt: skip
    single, two_pass = jnp.zeros(1, bool), jnp.ones(1, bool)
    call, temporary_bytes = random_step(settings, sizes.vocab_size, single)
    return {"single": partial(call, single), "two_pass": partial(call, two_pass)}, temporary_bytes


def spread(seconds: np.ndarray) -> dict[str, float]:
    """Quartiles, extremes and number of calls."""
    return quartiles(seconds) | {"min": float(min(seconds)), "max": float(max(seconds)), "calls": len(seconds)}


def time_steps(sizes: Sizes, remat: Sequence[str], steps: int) -> list[dict]:
    """Single-pass and two-pass train steps for each name in `remat` (see LIMITS), interleaved.

    Each: "remat"; "single", "two_pass": `spread` of seconds; "ratio" of medians; "ratio_quartiles" over neighbouring
    pairs; "limit"; "temporary_bytes"."""
    programs = {name: compiled_steps(sizes, name) for name in remat}
    calls = {(name, kind): call for name, (pair, _) in programs.items() for kind, call in pair.items()}
    seconds, rows = alternate(calls, steps), []
    for name, (_, temporary_bytes) in programs.items():
        pairs = seconds[name, "two_pass"] / seconds[name, "single"]
        single, two_pass = (spread(seconds[name, kind]) for kind in ("single", "two_pass"))
        rows.append({
            "remat": name, "single": single, "two_pass": two_pass, "ratio": two_pass["median"] / single["median"],
            "ratio_quartiles": np.quantile(pairs, (0.25, 0.75)).tolist(), "limit": float(LIMITS[name]),
            "temporary_bytes": temporary_bytes,
        })  # fmt: skip
    return rows


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f}"


def dense_logits(hidden, head):
    """Logits [B L V] float32; -1e30 at mask and padding, whose probability is exactly 0."""
    ids = jnp.arange(head.weight.shape[0])
    exists = (ids < head.vocab_size) & (ids != head.mask_token_id)
    logits = jnp.matmul(hidden, head.weight.T.astype(hidden.dtype), preferred_element_type=jnp.float32) + head.bias
    return jnp.where(exists, logits, -1e30)


def dense_sweep(hidden, head):
    log_p = jax.nn.log_softmax(logits := dense_logits(hidden, head))
    top_logits, token_ids = jax.lax.top_k(logits, SCORED)
    return token_ids, top_logits, (jnp.exp(log_p) * log_p).sum(-1)


def chunked_sweep(hidden, head):
    feedback = vocab_head.sweep(hidden, head, k=SCORED)
    return feedback.token_ids, feedback.top_logits, feedback.neg_entropy


def dense_cross_entropy(hidden, head, targets):
    logits = dense_logits(hidden, head)
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]


def compare_vocabulary(sizes: Sizes, vocab_size: int, calls: int) -> list[dict]:
    """The sweep, and the cross-entropy with its gradients, dense and chunked, for one V.

    Each: "operation", "vocab_size", "logits_bytes" of [B L V] float32; under "dense", "chunked": "temporary_bytes",
    "argument_bytes", "output_bytes", "seconds" (`spread`)."""
    rows, length, width = sizes.head_batch, sizes.head_seq_len, sizes.head_width
    padded = -(-vocab_size // 128) * 128
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((rows, length, width), np.float32), sizes.compute_dtype)
    weight = jnp.asarray(random.standard_normal((padded, width), np.float32) / width**0.5)
    targets = jnp.asarray(random.integers(0, vocab_size - 1, (rows, length)), jnp.int32)
    head = vocab_head.Head(weight, jnp.zeros(padded, jnp.float32), vocab_size, vocab_size - 1, True)

    def graded(cross_entropy):
        return jax.value_and_grad(lambda hidden, head: cross_entropy(hidden, head, targets).mean(), (0, 1))

    operations = {
        f"sweep, k = {SCORED}": {"dense": dense_sweep, "chunked": chunked_sweep},
        "cross-entropy, forward and backward": {
            "dense": graded(dense_cross_entropy), "chunked": graded(vocab_head.cross_entropy),
        },
    }  # fmt: skip
    figures = []
    for operation, functions in operations.items():
        programs = {name: jax.jit(function).lower(hidden, head).compile() for name, function in functions.items()}
        seconds = alternate({name: partial(program, hidden, head) for name, program in programs.items()}, calls)
        row = {"operation": operation, "vocab_size": vocab_size, "logits_bytes": rows * length * padded * 4}
        for name, program in programs.items():
            memory = program.memory_analysis()
            row[name] = {
                "temporary_bytes": memory.temp_size_in_bytes,
                "argument_bytes": memory.argument_size_in_bytes,
                "output_bytes": memory.output_size_in_bytes,
                "seconds": spread(seconds[name]),
            }
        figures.append(row)
    return figures


@settled()
def measure(sizes: Sizes, remat: Sequence[str], vocab_sizes: Sequence[int], steps: int, calls: int) -> dict:
    """JSON figures: `machine`, "sizes", "steps" (`time_steps`), "vocabulary" (`compare_vocabulary`)."""
    return machine() | {
        "sizes": dataclasses.asdict(sizes),
        "steps": time_steps(sizes, remat, steps),
        "vocabulary": [row for v in vocab_sizes for row in compare_vocabulary(sizes, v, calls)],
    }


def markdown(figures: dict) -> str:
    """Figures of `measure` as two tables for a README."""
    sizes = Sizes(**figures["sizes"])
    steps = [
        (row["remat"], spread_text(row["single"]), spread_text(row["two_pass"]),
         "{:.3f} ({:.3f} to {:.3f})".format(row["ratio"], *row["ratio_quartiles"]),
         f"{LIMITS[row['remat']]} = {row['limit']:.3f}", mebibytes(row["temporary_bytes"]))
        for row in figures["steps"]
    ]  # fmt: skip
    vocabulary = [
        (row["operation"], f"{row['vocab_size']:,}", mebibytes(row["logits_bytes"]),
         *(mebibytes(row[name]["temporary_bytes"]) for name in ("dense", "chunked")),
         *(spread_text(row[name]["seconds"]) for name in ("dense", "chunked")))
        for row in figures["vocabulary"]
    ]  # fmt: skip
    calls = figures["steps"][0]["single"]["calls"] if steps else 0
    columns = "operation", "V", "B L V logits, MiB", "dense, MiB", "chunked, MiB", "dense, s", "chunked, s"
    return "\n\n".join([
        f"Device: {figures['device']}; jax {figures['jax']}. Medians, quartiles in brackets.",
        f"Train step: D {sizes.hidden_size}, {sizes.num_blocks} blocks, V {sizes.vocab_size:,}, batch {sizes.batch} x "
        f"{sizes.seq_len} tokens, {sizes.compute_dtype}; {calls} steps of each kind, alternating.",
        table(("remat", "one pass, s", "two passes, s", "ratio", "limit, in forwards", "temporary memory, MiB"), steps),
        f"Vocabulary: hidden states {sizes.head_batch} x {sizes.head_seq_len} x {sizes.head_width}, "
        f"{sizes.compute_dtype}; temporary memory is what the compiled program needs beside arguments and results.",
        table(columns, vocabulary),
    ])  # fmt: skip


def policy(name: str) -> str:
    if name not in LIMITS:
        raise argparse.ArgumentTypeError(f"{name} is not among {', '.join(LIMITS)}")
    return name


def listed(value: Callable[[str], object]) -> Callable[[str], list]:
    """Flag type: comma-separated values."""
    return lambda text: [value(part) for part in text.split(",") if part]


@command()
def main(argv: list[str]) -> None:
    parser = benchmark_parser("two_pass", __doc__, Sizes)
    parser.add_argument("--steps", type=positive, default=12, help="timed train steps of each kind")
    parser.add_argument("--calls", type=positive, default=5, help="timed calls of each vocabulary operation")
    parser.add_argument("--remat", type=listed(policy), default="none,full", help=f"policies, of {', '.join(LIMITS)}")
    parser.add_argument("--vocab_sizes", type=listed(positive), default="50258,152064",
                        help="for the vocabulary's operations")  # fmt: skip
    flags = parser.parse_args(argv)
    figures = measure(prepare(flags, Sizes), flags.remat, flags.vocab_sizes, flags.steps, flags.calls)
    publish(markdown(figures), figures, flags.json)


if __name__ == "__main__":
    sys.exit(main())
