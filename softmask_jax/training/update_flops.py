"""FLOPs of a training update in closed form: from a network's sizes, what is frozen in it and what is computed again."""
import dataclasses

import jax

from softmask_jax.config import Config, layer_passes
from softmask_jax.config.jax_settings import root_key


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often a training step runs each part, in forward passes: products with weights, attention, the head."""

    weights: float
    attention: float
    head: float


def passes(model, *, two_passes: bool, flash: bool = False) -> Passes:
    """Of a training step.

    Args:
      model: the config's section. two_passes: the coin fell on soft-masking. flash: attention is a kernel that never
        keeps its weights, and computes the scores again in both of its backward parts.

    A backward pass is two products for each forward one, or one where a frozen base wants no gradient of its own;
    attention's is always two, a flash kernel's 3.5 (7 products for 2). The head's logits are computed again, chunk by
    chunk; `remat` "full" runs every layer's forward pass again.
    """
    frozen = model.adapter != "none"
    first, again = float(two_passes), float(model.remat == "full")
    attention_again = float(model.remat in ("full", "dots", "attention")) if not flash else again
    return Passes(
        weights=first + layer_passes(model),
        attention=first + 1 + attention_again + (3.5 if flash else 2),
        head=first + 2 + (1 if frozen else 2),
    )


def closed_form(denoiser, tokens: int, length: int, how: Passes) -> float:
    """FLOPs of one training step over so many tokens in rows of `length`, of all devices together."""
    weights, attention, head = parts(denoiser, length)
    return tokens * (how.weights * weights + how.attention * attention + how.head * head)


def parts(denoiser, length: int) -> tuple[float, float, float]:
    """FLOPs of one token's forward pass: products with weights, attention, the head."""
    width = jax.eval_shape(lambda key: denoiser.embedding(denoiser.init(key)["backbone"]), root_key(0)).shape[-1]
    head = 2.0 * width * denoiser.vocab_size
    bare = denoiser.flops_per_token(0)
    return bare - head, denoiser.flops_per_token(length) - bare, head


def model_flops(denoiser, model, tokens: int, length: int, *, two_passes: bool, again: bool = False) -> float:
    """What a step has to compute: the numerator of model-FLOPs utilisation.

    Forward passes, and a backward one that costs twice as much, or with a frozen base once (attention's: twice). again:
    count what `remat` runs again, too.
    """
    frozen = model.adapter != "none"
    ahead, back = 1.0 + two_passes, 1.0 if frozen else 2.0
    layers, attention = again and model.remat == "full", again and model.remat != "none"
    return closed_form(denoiser, tokens, length, Passes(ahead + back + layers, ahead + 2.0 + attention, ahead + back))


def plain_passes(denoiser, model, length: int) -> float:
    """What an update without soft-masking costs, in forward passes over rows of `length`: what one more pass costs."""
    plain, both = (model_flops(denoiser, model, 1, length, two_passes=two, again=True) for two in (False, True))
    return plain / (both - plain)


def budgeted(config: Config, denoiser) -> Config:
    """A config with the number of its updates, if it is not there already: what its budget buys for this network."""
    passes = plain_passes(denoiser, config.model, config.longest_row)
    return config.with_updates(config.train.updates or config.bought(passes))
