"""Every sampler by name: options of a command line or a notebook, the sampler that they describe, and its call."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.config.jax_settings import checked_key, settled
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.samplers import dream, transitions
from softmask_jax.samplers.blocks import BlockSampler
from softmask_jax.samplers.canvas import check_masks, check_steps
from softmask_jax.samplers.constraints import Constraints
from softmask_jax.samplers.dream import DreamSampler
from softmask_jax.samplers.mdlm import MDLMSampler
from softmask_jax.samplers.result import Generated

# MDLM's grid is independent of the length; 128 steps are the fewest that ReMDM's and the soft-masking paper report.
MDLM_STEPS = 128
TRANSITIONS = {"mdlm": transitions.Mdlm, "remdm_cap": transitions.RemdmCap, "remdm_rescale": transitions.RemdmRescale,
               "remdm_conf": transitions.RemdmConf, "remdm_loop": transitions.RemdmLoop}  # fmt: skip
ALGORITHMS = (*TRANSITIONS, *dream.ALGORITHMS)
# Options that only some algorithms have: a name for these, and the algorithms.
LIMITED = {
    "nucleus_p": ("mdlm and remdm", TRANSITIONS),
    "eta": ("other samplers", ("remdm_cap", "remdm_rescale", "remdm_loop")),
    **dict.fromkeys(("t_on", "t_off", "alpha_on"), ("other samplers", ("remdm_loop",))),
    **dict.fromkeys(("top_p", "top_k", "tokens_per_step", "suppress_mask", "stop_at_end", "block_length", "cache",
                     "full_call"), ("Dream's algorithms", dream.ALGORITHMS)),
    "threshold": ("confidence_threshold", ("confidence_threshold",)),
    "factor": ("confidence_factor", ("confidence_factor",)),
    "alg_temp": ("other samplers", tuple(alg for alg in dream.ALGORITHMS if alg != "origin")),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Which sampler, and how it samples; None is the sampler's default. ValueError for options that clash. Fields
    without a comment: see `MDLMSampler`, the `transitions`, `DreamSampler`, `BlockSampler`."""

    alg: str = ""  # the model's own: mdlm, or entropy for Dream
    # 128 for mdlm and remdm, else one a position that may be filled; unused by confidence_factor, tokens_per_step and,
    # in blocks, confidence_threshold
    steps: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float | None = None
    nucleus_p: float | None = None
    eta: float | None = None
    t_on: float | None = None
    t_off: float | None = None
    alpha_on: float | None = None
    block_length: int | None = None  # decode blocks from left to right with a `cache`
    cache: str | None = None
    full_call: str | None = None
    threshold: float | None = None
    factor: float | None = None
    tokens_per_step: int | None = None
    suppress_mask: bool = False
    stop_at_end: bool = False
    forbidden: tuple[int, ...] = ()  # ids that are never drawn
    end_penalty: float = 0.0  # nats off the logits of tokens that end a text
    soft_mask: SoftMask | str | None = None  # settings instead of the model's own; "none" for plain masks
    compat: bool = False  # as the reference: see `MDLMSampler.reuse` and `BlockSampler.compat`

    def __post_init__(self):
        # A list has no hash, which jit needs.
        object.__setattr__(self, "forbidden", tuple(self.forbidden))
        if self.alg and self.alg not in ALGORITHMS:
            raise ValueError(f"alg is '{self.alg}'; choose one of {', '.join(ALGORITHMS)}.")
        check_steps(self.steps)
        if self.soft_mask is not None and self.soft_mask != "none" and not isinstance(self.soft_mask, SoftMask):
            raise ValueError(f"soft_mask must be 'none' or SoftMask(variant, k, schedule), not {self.soft_mask!r}.")
        if self.block_length is None and (self.cache or self.full_call):
            raise ValueError("cache and full_call are for decoding in blocks; give block_length too.")
        if self.alg:
            # Report numbers out of range before a model is loaded.
            self.sampler(None, SoftMask(), (0,), new_tokens=max(self.block_length or 1, self.steps or 1))

    def sampler(self, denoiser, soft_mask: SoftMask, end_token_ids: tuple[int, ...], *, new_tokens: int,
                prompt_length: int = 0, alg: str = "", trace: bool = False) -> MDLMSampler | DreamSampler:
        """The sampler over a denoiser; soft_mask, end_token_ids, alg: the model's own. new_tokens: positions that may
        be filled, for the default number of steps. prompt_length: where blocks begin."""
        alg = self.alg or alg
        values = {name: value for name, value in vars(self).items() if not (value is None or value is False)}
        for name, (owners, algorithms) in LIMITED.items():
            if name in values and alg not in algorithms:
                raise ValueError(f"{name} is an option of {owners}; '{alg}' has none.")
        if self.soft_mask is not None:
            soft_mask = SoftMask() if self.soft_mask == "none" else self.soft_mask
        common = {"denoiser": denoiser, "soft_mask": soft_mask, "history": False, "trace": trace,
                  "constraints": Constraints(self.forbidden, tuple(end_token_ids), self.end_penalty)}

        def make(part: type, **settings):
            """A part with the options that are its fields."""
            names = {field.name for field in dataclasses.fields(part)}
            return part(**{name: value for name, value in values.items() if name in names} | settings)

        if alg in TRANSITIONS:
            return make(MDLMSampler, **common, steps=self.steps or MDLM_STEPS, transition=make(TRANSITIONS[alg]),
                        reuse="compat" if self.compat else "exact")
        common |= {"alg": alg, "top_k": self.top_k}
        if self.block_length is not None:
            if alg == "origin":
                raise ValueError("'origin' cannot decode in blocks; choose another alg, or leave block_length out.")
            return make(BlockSampler, **common, steps=self.steps or new_tokens, prompt_length=prompt_length)
        if self.compat:
            raise ValueError(f"compat changes nothing for '{alg}' without blocks; leave it out.")
        ungridded = alg.startswith("confidence_") or self.tokens_per_step is not None
        return make(DreamSampler, **common, steps=self.steps if ungridded else self.steps or new_tokens)


@functools.partial(jax.jit, static_argnums=0)
def run(sampler, params: dict, keys, tokens, attention_mask, *more) -> Generated:
    """A sampler's call, compiled once for each sampler and shape."""
    return sampler(params, keys, tokens, attention_mask, *more)


@settled()
def fill(model, tokens, attention_mask=None, *, keys: jax.Array, options: Options, prompt_length: int = 0,
         trace: bool = False) -> Generated:
    """Fill the masks of tokens [B L] for a `generate.model.Model`; other tokens stay.

    attention_mask: [B L], 0 for padding. keys: [B] typed, one a row, whose answer depends on no other row or padding.
    prompt_length: where blocks begin; positions from there on are Dream's default number of steps. trace: keep every
    step, for `report.viewer`. ValueError: unknown ids, rows that are too long, nothing masked, invalid options."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers [B L], not {tokens.dtype} {tokens.shape}.")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < model.denoiser.vocab_size:
        raise ValueError(f"tokens must lie in 0..{model.denoiser.vocab_size - 1}, not {tokens.min()}..{tokens.max()}.")
    attended = np.ones(tokens.shape) if attention_mask is None else np.asarray(attention_mask) != 0
    longest = int(attended.sum(-1).max(initial=0))
    if longest > model.max_length:
        raise ValueError(f"A row has {longest:,} tokens, masks among them; this model takes {model.max_length:,}.")
    check_masks(tokens, attention_mask, model.denoiser.mask_token_id)
    sampler = options.sampler(model.denoiser, model.soft_mask, model.end_token_ids, prompt_length=prompt_length,
                              new_tokens=tokens.shape[1] - prompt_length, alg=model.default_alg, trace=trace)
    mask, rows = None if attention_mask is None else jnp.asarray(attention_mask, jnp.int32), len(tokens)
    arrays = (checked_key(keys), jnp.asarray(tokens, jnp.int32), mask)
    if rows % model.row_shards:
        # Devices take equal numbers of rows: repeat the first ones.
        repeated = jnp.arange(-(-rows // model.row_shards) * model.row_shards) % rows
        arrays = jax.tree.map(lambda x: x[repeated], arrays)
    return run(sampler, model.params, *arrays).first_rows(rows)
