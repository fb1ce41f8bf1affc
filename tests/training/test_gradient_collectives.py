"""Gradients are summed over devices once a step, however often a parameter is read and into however many micro-batches
a batch is cut."""
import jax
import pytest

from softmask_jax import config
from softmask_jax.compile import hlo, programs, traffic

MODEL = {"hidden_size": 32, "num_blocks": 2, "num_heads": 2, "cond_dim": 16, "dropout": 0.1}


@pytest.mark.full
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_devices_exchange_one_gradient_a_step(micro_batches):
    c = config.from_dict({
        "model": MODEL, "soft_mask": {"variant": "topk", "k": 3}, "data": {"seq_len": 16},
        "train": {"global_batch_size": 32, "micro_batches": micro_batches},
    })  # fmt: skip
    program = programs.training(c, jax.devices()[:8], vocab_size=1000)
    module = hlo.parse(program.traced.lower().compile().as_text())
    # Loops over masked positions exchange nothing: a thousand times a collective in them would be seen.
    moved = traffic.measure(module, lambda loop, known, depth, inner: 1000 if known is None else known)
    gradient = programs.bytes_per_chip(program.parts["params"])
    assert gradient <= sum(moved.payload.values()) <= 1.1 * gradient
