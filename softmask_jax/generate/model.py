"""A trained model of any family; `softmask_jax.load` returns it."""
import dataclasses
import functools
import numbers
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.config import Config
from softmask_jax.config.jax_settings import checked_key, checked_seed, root_key, settled
from softmask_jax.data import Tokenizer
from softmask_jax.data.chat.conversations import NoConversation, read_messages
from softmask_jax.data.chat.template import ChatTemplate, TemplateError
from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.diffusion.noise import Stream, row_keys, stream_key
from softmask_jax.generate import text
from softmask_jax.models import families
from softmask_jax.models.denoiser import Denoiser
from softmask_jax.models.nn import dream
from softmask_jax.samplers import (
    BlockSampler, Constraints, Draws, DreamSampler, Generated, MDLMSampler, Options, SoftMask, fill, recorded_gumbel,
)  # fmt: skip
from softmask_jax.samplers.dream import LLADA
from softmask_jax.samplers.dream_generate import diffusion_generate
from softmask_jax.samplers.filling import run

# Prompts are padded to it, for few compiled samplers.
PROMPT_MULTIPLE = 64
NO_TOKENIZER = "This model has no tokenizer; convert it again with its tokenizer files beside it."


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A network with its parameters and tokenizer; methods are compiled on first use."""

    config: Config  # of the run; of a converted model as far as known
    tokenizer: Tokenizer | None
    denoiser: Denoiser
    params: dict  # {"backbone", "soft_mask"}
    step: int  # updates of its training
    template: ChatTemplate | None = None  # None if the model does not chat
    soft_mask: SoftMask | None = None  # soft-masking in use, by default as in config
    end_token_ids: tuple[int, ...] | None = None  # end a text, by default EOS
    pad_token_id: int | None = None  # `decode` strips it; None if the family has none
    max_length: int | None = None  # most positions of a row, by default as in training
    row_shards: int = 1  # parts into which a mesh splits the rows of a batch

    def __post_init__(self):
        defaults = {
            "soft_mask": SoftMask.from_config(self.config.soft_mask),
            "end_token_ids": () if self.tokenizer is None else (self.tokenizer.eos_id,),
            "max_length": self.config.data.seq_len,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    family = property(lambda self: families.of(self.config.model.kind))
    padding = property(lambda self: self.family.padding)
    default_alg = property(lambda self: self.family.default_alg)
    mask_token_id = property(lambda self: self.denoiser.mask_token_id)

    @property
    def objective(self) -> Nelbo:
        """NELBO with the soft-masking in use."""
        in_use = SoftMask(self.soft_mask.variant, self.soft_mask.k)
        return dataclasses.replace(Nelbo.from_config(self.config), soft_mask=in_use)

    @settled()
    def logits(self, tokens, attention_mask=None, *, shifted: bool = False) -> jax.Array:
        """Plain forward pass of a few sequences: tokens [B L] -> logits [B L V] float32, the mask's column included.

        attention_mask: [B L], 0 at padding. shifted: logits at i predict token i (PyTorch's Dream: token i + 1)."""
        tokens = self._checked(tokens)
        mask = None if attention_mask is None else jnp.asarray(attention_mask, jnp.int32)
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(f"attention_mask must have the shape of tokens {tokens.shape}, not {mask.shape}.")
        return self._logits(self.params, tokens, mask, self.family.shifted and not shifted)

    @settled()
    def nelbo(self, tokens, key: jax.Array, *, two_pass: bool = True, draws: int = 1) -> jax.Array:
        """Upper bound on -log p per token: tokens [B L] without padding -> [B] float32, nats; unbiased for every row.

        two_pass: with soft-masking's feedback, unless the model is binary. draws: masks of each row, t stratified."""
        return self._nelbo(self.params, self._checked(tokens), checked_key(key), two_pass, draws)

    @settled()
    def generate(
        self, prompts=None, *, tokens=None, key: jax.Array | None = None, seed: int | None = None,
        count: int | None = None, length: int | None = None, max_new_tokens: int | None = None,
        steps: int | None = None, soft_mask: SoftMask | Mapping | str | None = None, attention_mask=None,
        draws: np.ndarray | Draws | None = None, trace: bool = False, **options,
    ) -> Generated:  # fmt: skip
        """Fill masks, or continue prompts; `decode` turns the result into text.

        Args:
          prompts: of models of fixed length: ids [B L], `mask_token_id` where text is wanted, or None for `count` rows
            of `length` (the training length) masks. Of others: token ids of any lengths, or chats, lists of
            {"role", "content"}, which are continued by `max_new_tokens` (256).
          tokens: another name of `prompts`.
          key: None where nothing is drawn.
          seed: instead of a key.
          steps: by default 128 for mdlm and remdm, else one a position that may be filled.
          soft_mask: in place of the model's, "none" for plain masks; for prompts also a `transparency_config.json`.
          attention_mask: shape of prompts, 0 for padding.
          draws: recorded randomness of a reference: uniforms [steps B L V] of mdlm and remdm, `Draws` of prompts.
          trace: keep every step, for `viewer`.
          options: fields of `samplers.Options`; where lengths are not fixed of `DreamSampler`, with block_length or
            compat of `BlockSampler`. Defaults of Dream are those of its `diffusion_generate` (alg "origin", top_k 50),
            of LLaDA those of its `generate` (alg "low_confidence").

        ValueError for unknown options, or rows that are too long."""
        prompts, key = tokens if prompts is None else prompts, _key(key, seed)
        if isinstance(prompts, str):
            raise ValueError("generate takes token ids; write continues a text.")
        if not self.family.fixed_length:
            _refuse("continues prompts: give prompts and max_new_tokens, or use fill", count=count, length=length)
            _refuse("begins blocks behind its prompts", prompt_length=options.get("prompt_length"))
            new_tokens = text.NEW_TOKENS if max_new_tokens is None else max_new_tokens
            if options.get("compat") and self.default_alg in LLADA:
                # The reference always decodes in blocks, by default in one.
                options.setdefault("block_length", new_tokens)
            text.check_names(Model.generate, options, BlockSampler if options.get("block_length") else DreamSampler)
            return self._continue(prompts, key, new_tokens, steps, soft_mask, attention_mask,
                                  draws=draws, trace=trace, **options)
        _refuse("fills rows of fixed length: put mask_token_id where text is wanted", max_new_tokens=max_new_tokens)
        text.check_names(Model.generate, options, Options)
        if prompts is None:
            shape = 1 if count is None else count, self.max_length if length is None else length
            prompts = np.full(shape, self.mask_token_id, np.int32)
        tokens, options = self._checked(prompts), Options(steps=steps, soft_mask=soft_mask, **options)
        if key is None:
            raise ValueError("There is nothing to draw with: pass seed=0, or key=jax.random.key(0).")
        keys = row_keys(stream_key(key, Stream.SAMPLE, 0), jnp.arange(len(tokens)))
        if draws is None:
            return self.fill(tokens, attention_mask, keys=keys, options=options, trace=trace)
        sampler = options.sampler(self.denoiser, self.soft_mask, self.end_token_ids, new_tokens=tokens.shape[1],
                                  alg=self.default_alg, trace=trace)
        if not isinstance(sampler, MDLMSampler):
            raise ValueError(f"Recorded draws are for mdlm and remdm, not {options.alg}.")
        return run(sampler, self.params, keys, tokens, attention_mask, jnp.asarray(recorded_gumbel(draws), jnp.float32))

    def _continue(self, prompts, key, max_new_tokens: int, steps, soft_mask, attention_mask, **options) -> Generated:
        if prompts is None:
            raise ValueError("This model continues prompts: give token ids, or chats.")
        if len(prompts) and isinstance(prompts[0], (list, tuple)) and prompts[0] and isinstance(prompts[0][0], Mapping):
            prompts = [self.encode_chat(chat) for chat in prompts]
        if soft_mask is None or soft_mask == "none":
            soft_mask = self.soft_mask if soft_mask is None else SoftMask()
        if self.default_alg in LLADA:
            options = {"alg": self.default_alg, "top_k": None} | options
        if {"stop_at_end", "logits_eos_inf", "confidence_eos_eot_inf"} & set(options):
            options.setdefault("constraints", Constraints(end_token_ids=self.end_token_ids))
        # A threshold of LLaDA's algorithms needs no number of steps.
        if steps is None and not (options.get("alg") in LLADA and {"threshold", "factor"} & set(options)):
            steps = max_new_tokens
        return diffusion_generate(
            self.denoiser, self.params, prompts, key, max_new_tokens=max_new_tokens, max_length=self.max_length,
            steps=steps, pad_token_id=self.pad_token_id, soft_mask=soft_mask, attention_mask=attention_mask,
            pad_multiple=PROMPT_MULTIPLE if attention_mask is None else 1, **options,
        )  # fmt: skip

    fill = fill
    write, chat = text.write, text.chat
    __repr__ = text.described

    def encode(self, text: str) -> np.ndarray:
        """Token ids [L] int32 of a text, without BOS; `decode` inverts it. ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError(NO_TOKENIZER)
        if not isinstance(text, str):
            raise ValueError(f"encode takes a text, not {type(text).__name__}.")
        return np.asarray(self.tokenizer.encode(text), np.int32)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
        """The prompt [P] of a chat (see `data.conversations`), generation prompt included. ValueError for a model that
        does not chat, and for invalid messages."""
        if self.template is None:
            advice = "give token ids, or convert it again with its tokenizer files"
            raise ValueError(f"This model has no chat template; {advice}.")
        try:
            return self.template.encode_prompt(self.tokenizer, read_messages(messages))
        except (NoConversation, TemplateError) as error:
            raise ValueError(f"The chat {error}.") from error

    def decode(self, tokens, *, new_tokens: int | None = None) -> list[str]:
        """[B L] or [L] ids -> B strings, without padding; masks stay visible. new_tokens: only so many last positions
        of each row, up to the first token that ends a text. ValueError for a model without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError(NO_TOKENIZER)
        texts = []
        for row in np.atleast_2d(tokens):
            stops = [] if self.pad_token_id is None else [self.pad_token_id]
            if new_tokens is not None:
                row, stops = row[-new_tokens:], self.end_token_ids
            else:
                row = row[np.argmax(~np.isin(row, stops)) :]
            ends = np.flatnonzero(np.isin(row, stops))
            texts.append(self.tokenizer.decode(row[: ends[0]] if len(ends) else row))
        return texts

    def _checked(self, tokens) -> jax.Array:
        tokens, size = np.asarray(tokens), self.denoiser.vocab_size
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be integers [B L], not {tokens.dtype} {tokens.shape}.")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            raise ValueError(f"tokens must lie in 0..{size - 1}; found {tokens.min()}..{tokens.max()}.")
        return jnp.asarray(tokens, jnp.int32)

    @functools.cached_property
    def _logits(self):
        def logits(params, tokens, mask, unshift):
            backbone = params["backbone"]
            if unshift:
                # One more position at the end: the shift drops the first.
                mask = jnp.pad(jnp.ones_like(tokens) if mask is None else mask, ((0, 0), (0, 1)))
                tokens = jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=self.pad_token_id)
            layout = {} if mask is None else dict(zip(("positions", "segment_ids"), dream.padded_inputs(mask)))
            hidden, _ = self.denoiser.trunk(backbone, self.denoiser.embed(backbone, tokens), **layout)
            head, hidden = self.denoiser.head(backbone), hidden[:, 1:] if unshift else hidden
            z = jnp.matmul(hidden, head.weight.T.astype(hidden.dtype), preferred_element_type=jnp.float32)
            return (z if head.bias is None else z + head.bias)[..., : head.vocab_size]

        return jax.jit(logits, static_argnums=3)

    @functools.cached_property
    def _nelbo(self):
        def nelbo(params, tokens, key, soft, draws):
            rows, soft_mask = len(tokens), self.objective.soft_mask if soft else SoftMask()

            def draw(total, i):
                index = jnp.arange(rows) * draws + i
                noisy = self.objective.draw(tokens, index, draws, key, 0, mask_token_id=self.mask_token_id)
                loss = two_pass.row_scores(self.denoiser, soft_mask, params, noisy).loss
                return total + loss["two_pass" if soft_mask.on else "one_pass"] / draws, None

            return jax.lax.scan(draw, jnp.zeros(rows), jnp.arange(draws))[0]

        return jax.jit(nelbo, static_argnums=(3, 4))


def _refuse(advice: str, **arguments) -> None:
    """ValueError for an argument that is set."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"generate has no use for {name}: this model {advice}.")


def _key(key: jax.Array | None, seed: int | None) -> jax.Array | None:
    """The key, or that of the seed. ValueError for both, or for a seed as key."""
    if isinstance(key, numbers.Integral):
        raise ValueError(f"key is {key}, an integer; pass seed={key}, or key=jax.random.key({key}).")
    if seed is None:
        return key
    if key is not None:
        raise ValueError("Give key or seed, not both.")
    return root_key(checked_seed(seed))
