"""The vocabulary's operations: what each costs beside cross-entropy's forward pass, and dense beside chunked.

P positions, D width, V vocabulary; dense operations form logits [B L V]."""
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.benchmarks.timing import alternate, mebibytes, ratio, ratio_text, spread, spread_text
from softmask_jax.diffusion.vocab import head as vocab_head
from softmask_jax.models.nn.layers import exact
from softmask_jax.report.markdown import table

SWEEPS = 1, 3  # k
FORWARD, BOTH = "cross-entropy, forward", "cross-entropy, forward and backward"


def product(hidden, head):
    """Logits [B L V] float32, of every column that is stored."""
    return jnp.matmul(hidden, head.weight.T.astype(hidden.dtype), precision=exact(hidden.dtype),
                      preferred_element_type=jnp.float32)


def dense_logits(hidden, head):
    """Logits [B L V] float32; -1e30 at mask and padding, whose probability is exactly 0."""
    ids = jnp.arange(head.weight.shape[0])
    exists = (ids < head.vocab_size) & (ids != head.mask_token_id)
    return jnp.where(exists, product(hidden, head) + head.bias, -1e30)


def dense_sweep(hidden, head, k: int):
    log_p = jax.nn.log_softmax(logits := dense_logits(hidden, head))
    top_logits, token_ids = jax.lax.top_k(logits, k)
    return token_ids, top_logits, (jnp.exp(log_p) * log_p).sum(-1)


def chunked_sweep(hidden, head, k: int):
    feedback = vocab_head.sweep(hidden, head, k=k)
    return feedback.token_ids, feedback.top_logits, feedback.neg_entropy


def dense_cross_entropy(hidden, head, targets):
    logits = dense_logits(hidden, head)
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]


def operations(targets) -> dict[tuple[str, str], callable]:
    """Functions of (hidden, head) by (operation, "dense" or "chunked")."""

    def graded(cross_entropy):
        return jax.value_and_grad(lambda hidden, head: cross_entropy(hidden, head, targets).mean(), (0, 1))

    return {
        ("product", "dense"): product,
        (FORWARD, "chunked"): partial(vocab_head.cross_entropy, targets=targets),
        **{(f"sweep, k = {k}", "chunked"): partial(chunked_sweep, k=k) for k in SWEEPS},
        (BOTH, "chunked"): graded(vocab_head.cross_entropy),
        (f"sweep, k = {SWEEPS[-1]}", "dense"): partial(dense_sweep, k=SWEEPS[-1]),
        (BOTH, "dense"): graded(dense_cross_entropy),
    }


def compare(width: int, vocab_size: int, *, batch: int, seq_len: int, compute_dtype: str, calls: int) -> dict:
    """Every operation of one D and V on batch x seq_len positions, interleaved, all positions computed.

    "hidden_size", "vocab_size"; "logits_bytes" of [B L V] float32; "programs": rows of "operation", "kind" (dense or
    chunked), "seconds" (`spread`), "temporary_bytes", "argument_bytes", "output_bytes"; "sweep": by k the `ratio` of a
    sweep's time to that of cross-entropy's forward pass."""
    padded = -(-vocab_size // 128) * 128
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((batch, seq_len, width), np.float32), compute_dtype)
    weight = jnp.asarray(random.standard_normal((padded, width), np.float32) / width**0.5)
    targets = jnp.asarray(random.integers(0, vocab_size - 1, (batch, seq_len)), jnp.int32)
    head = vocab_head.Head(weight, jnp.zeros(padded, jnp.float32), vocab_size, vocab_size - 1, True)
    programs = {name: jax.jit(f).lower(hidden, head).compile() for name, f in operations(targets).items()}
    seconds = alternate({name: partial(program, hidden, head) for name, program in programs.items()}, calls)
    rows = []
    for (operation, kind), program in programs.items():
        memory = program.memory_analysis()
        rows.append({
            "operation": operation, "kind": kind, "seconds": spread(seconds[operation, kind]),
            "temporary_bytes": memory.temp_size_in_bytes, "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
        })  # fmt: skip
    forward = seconds[FORWARD, "chunked"]
    return {
        "hidden_size": width, "vocab_size": vocab_size, "logits_bytes": batch * seq_len * padded * 4, "programs": rows,
        "sweep": {str(k): ratio(seconds[f"sweep, k = {k}", "chunked"], forward) for k in SWEEPS},
    }  # fmt: skip


def markdown(figures: list[Mapping]) -> list[str]:
    """Two tables of figures of `compare`: times, and dense beside chunked."""
    times, memory = [], []
    for row in figures:
        programs = {(entry["operation"], entry["kind"]): entry for entry in row["programs"]}
        sizes = str(row["hidden_size"]), f"{row['vocab_size']:,}"
        kinds = [("product", "dense"), (FORWARD, "chunked"), *((f"sweep, k = {k}", "chunked") for k in SWEEPS),
                 (BOTH, "chunked")]
        times.append((*sizes, *(spread_text(programs[name]["seconds"]) for name in kinds),
                      *(ratio_text(row["sweep"][str(k)]) for k in SWEEPS)))
        for operation in (f"sweep, k = {SWEEPS[-1]}", BOTH):
            pair = [programs[operation, kind] for kind in ("dense", "chunked")]
            memory.append((operation, *sizes, mebibytes(row["logits_bytes"]),
                           *(mebibytes(entry["temporary_bytes"]) for entry in pair),
                           *(spread_text(entry["seconds"]) for entry in pair)))
    sweeps = [f"sweep, k = {k}" for k in SWEEPS]
    return [
        table(("D", "V", "product, s", f"{FORWARD}, s", *(f"{name}, s" for name in sweeps), f"{BOTH}, s",
               *(f"{name} / {FORWARD}" for name in sweeps)), times),
        table(("operation", "D", "V", "B L V logits, MiB", "dense, MiB", "chunked, MiB", "dense, s", "chunked, s"),
              memory),
    ]  # fmt: skip
