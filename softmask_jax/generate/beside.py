"""A text written twice with the same draws, with plain and with soft masks, side by side on one page."""
import dataclasses
from collections.abc import Mapping

from softmask_jax.generate.batches import Generator, shape_of
from softmask_jax.report.patterns import Pattern
from softmask_jax.report.viewer import trajectory_page
from softmask_jax.samplers import Options

# `Options.soft_mask` by name; None is the model's own.
WAYS = {"plain masks": "none", "soft masks": None}


def beside(model, pattern: Pattern, options: Options, *, seed: int = 0, title: str,
           facts: Mapping[str, object] = {}) -> tuple[dict[str, str], str]:  # fmt: skip
    """Texts by way, and the page that plays them (see `report.viewer`); facts: more entries of its table."""
    shape, made, texts = shape_of(pattern, model, model.max_length), {}, {}
    for way, soft_mask in WAYS.items():
        generator = Generator(model, dataclasses.replace(options, soft_mask=soft_mask), seed)
        made[way] = generator.fill([(0, 0)], [pattern], shape, trace=True)
        texts[way] = generator.answer(pattern, generator.unpadded(pattern, made[way].tokens[0]))["text"]
    page = trajectory_page(
        made, model.tokenizer, mask_token_id=model.mask_token_id, title=title,
        facts={**facts, "sampler": options.alg or model.default_alg, "seed": seed},
        attention_mask=generator.padding([pattern], shape),
    )  # fmt: skip
    return texts, page
