"""FLOPs of a training update in closed form: from a network's sizes, frozen parts and rematerialisation."""
import functools
from typing import NamedTuple

import jax

from softmask_jax.config import Config
from softmask_jax.config.jax_settings import root_key


# Share of the positions whose logits are computed: masks alone, half of all on average.
SCORED = 0.5


class Passes(NamedTuple):
    """Runs of each part in a training step, in forward passes over all positions."""

    weights: float  # products with weights
    attention: float
    head: float


def closed_form(denoiser, tokens: int, length: int, passes: Passes) -> float:
    """FLOPs of one training step over so many tokens in rows of `length`, on all devices together."""
    return tokens * sum(runs * flops for runs, flops in zip(passes, parts(denoiser, length), strict=True))


@functools.lru_cache(maxsize=8)
def parts(denoiser, length: int) -> tuple[float, float, float]:
    """FLOPs of one token's forward pass: products with weights, attention, the head."""
    width = jax.eval_shape(lambda key: denoiser.embedding(denoiser.init(key)["backbone"]), root_key(0)).shape[-1]
    head = 2.0 * width * denoiser.vocab_size
    bare = denoiser.flops_per_token(0)
    return bare - head, denoiser.flops_per_token(length) - bare, head


def forward_flops(denoiser, length: int) -> float:
    """FLOPs of one token's forward pass in training, its logits computed where there are masks."""
    weights, attention, head = parts(denoiser, length)
    return weights + attention + SCORED * head


def model_flops(
    denoiser, model, tokens: int, length: int, *, two_passes: bool, again: bool = False, scored: float = 1.0
) -> float:
    """FLOPs that a step has to compute, the numerator of MFU: a backward pass costs two forward ones, or one on a
    frozen base (attention's always two). again: count what `remat` repeats, too. scored: share of the positions
    with logits; the paper counts all, a step computes `SCORED`."""
    forward, backward = 1.0 + two_passes, 1.0 if model.adapter != "none" else 2.0
    repeated = {"full": 1.0, "mlp": denoiser.attention_share}.get(model.remat, 0.0)
    layers, attention = again * repeated, again and model.remat not in ("none", "products")
    cost = Passes(forward + backward + layers, forward + 2.0 + attention, scored * (forward + backward))
    return closed_form(denoiser, tokens, length, cost)


def plain_passes(denoiser, model, length: int) -> float:
    """Cost of an update without soft-masking, in forward passes over rows of `length`."""
    plain, both = (model_flops(denoiser, model, 1, length, two_passes=two, again=True) for two in (False, True))
    return plain / (both - plain)


def mean_passes(denoiser, config: Config, length: int) -> float:
    """Mean cost of an update in forward passes over rows of `length`: a share `p_sm` makes one more."""
    second = config.soft_mask.p_sm if config.soft_mask.variant != "none" else 0.0
    return plain_passes(denoiser, config.model, length) + second


def budgeted(config: Config, denoiser, steps_per_epoch: float = 0.0) -> Config:
    """A config with its number of updates: by default what its budget buys for this network. steps_per_epoch: updates
    of one pass over the training set, for `train.epochs`, which become `train.steps`."""
    if config.train.epochs:
        steps = max(1, round(config.train.epochs * steps_per_epoch))
        config = config if steps == config.train.steps else config.with_steps(steps)
    passes = plain_passes(denoiser, config.model, config.longest_row)
    return config.with_updates(config.train.updates or config.bought(passes))
