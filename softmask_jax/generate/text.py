"""Text in, text out, and a model in words: methods of `Model`."""
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence

import jax

from softmask_jax.config.jax_settings import checked_seed, settled
from softmask_jax.data.prompts import MASKS, Row
from softmask_jax.data.sources.records import nearest
from softmask_jax.diffusion import soft_masking
from softmask_jax.generate.batches import FAILED, Generator, counts_masks, plan, shape_of
from softmask_jax.report.patterns import Encoder
from softmask_jax.samplers import Options, SoftMask

NEW_TOKENS = 256  # of models without a fixed length


@settled()
def write(model, prompt: str = "", *, max_new_tokens: int | None = None, steps: int | None = None, seed: int = 0,
          soft_mask: SoftMask | str | None = None, **options) -> str:  # fmt: skip
    """A text that begins with `prompt`, continued as by `python -m softmask_jax.generate` with this seed; without one a
    text from masks alone, of models of fixed length.

    max_new_tokens: what fits by default, or 256 where lengths are not fixed. seed: of everything that is drawn.
    steps, soft_mask, options: fields of `samplers.Options`; None is the model's own.
    ValueError: unknown options, a prompt that is too long. FloatingPointError: a logit was NaN or infinite."""
    check_names(write, options, Options)
    if not isinstance(prompt, str):
        kind = type(prompt).__name__
        raise ValueError(f"write continues a text, not {kind}; generate takes token ids, chat messages.")
    if not prompt and not model.family.fixed_length:
        raise ValueError("This model continues prompts: give write one.")
    row = Row("write", "prompt", prompt) if prompt else Row("write", MASKS, None)
    options |= {"steps": steps, "soft_mask": soft_mask}
    return prompt + _answer(model, row, max_new_tokens, seed, options)


@settled()
def chat(model, messages: Sequence[Mapping[str, str]], *, max_new_tokens: int | None = None, steps: int | None = None,
         seed: int = 0, soft_mask: SoftMask | str | None = None, **options) -> str:  # fmt: skip
    """The answer to a chat, a list of {"role", "content"}; the rest as of `write`. ValueError also for a model that
    does not chat, and for invalid messages."""
    check_names(chat, options, Options)
    if model.template is None:
        raise ValueError("This model has no chat template: use write, or convert it again with its tokenizer files.")
    options |= {"steps": steps, "soft_mask": soft_mask}
    return _answer(model, Row("chat", "messages", messages), max_new_tokens, seed, options)


def _answer(model, row: Row, max_new_tokens: int | None, seed: int, options: dict) -> str:
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    fixed, options = model.family.fixed_length, Options(**{"alg": model.default_alg} | options)
    limit = max_new_tokens if max_new_tokens and row.kind == MASKS else model.max_length
    encode = Encoder(model, limit, max_new_tokens or (None if fixed else NEW_TOKENS), bos=fixed)
    pattern, generator = encode(row), Generator(model, options, checked_seed(seed))
    (batch,) = plan([shape_of(pattern, model, limit, counted=counts_masks(options))], samples=1, batch_size=1)
    (answer,) = generator.batch(batch, [row], [pattern])
    if "error" in answer:
        raise FloatingPointError(f"{FAILED.capitalize()}: check the checkpoint.")
    return answer["text"]


def check_names(method: Callable, options: Mapping, fields_of: type) -> None:
    """ValueError for options that are neither parameters of the method nor fields of the dataclass."""
    known = [*inspect.signature(method).parameters, *(field.name for field in dataclasses.fields(fields_of))]
    known = [one for one in dict.fromkeys(known) if one not in ("model", "self", "options")]
    for name in options:
        if name not in known:
            raise ValueError(f"{method.__name__} has no option {name} for this model; {nearest(name, known)}.")


def described(model) -> str:
    """The model in ten lines."""
    config, denoiser, tokenizer = model.config.model, model.denoiser, model.tokenizer
    dtypes = sorted({leaf.dtype.name for leaf in jax.tree.leaves(model.params["backbone"])})
    soft_mask = "none"
    if model.soft_mask.on:
        scalars = soft_masking.effective(model.params["soft_mask"])
        values = (f"{name} {float(value):.3g}" for name, value in scalars._asdict().items())
        schedule = f", schedule {model.soft_mask.schedule}" if model.soft_mask.schedule != "none" else ""
        soft_mask = f"{model.soft_mask.variant}, k {model.soft_mask.k}{schedule} ({', '.join(values)})"
    adapter = "none" if config.adapter == "none" else f"{config.adapter}, rank {config.adapter_rank}"
    lines = {
        "kind": config.kind, "step": f"{model.step:,}",
        "parameters": f"{denoiser.num_params:,} ({', '.join(dtypes)})", "adapter": adapter,
        "vocabulary": f"{denoiser.vocab_size:,}, mask {denoiser.mask_token_id}",
        "tokenizer": "none" if tokenizer is None else tokenizer.kind, "max length": f"{model.max_length:,} tokens",
        "soft-masking": soft_mask, "chats": "no" if model.template is None else "yes",
    }  # fmt: skip
    return "\n".join(["softmask_jax.Model", *(f"  {name:14s}{value}" for name, value in lines.items())])
