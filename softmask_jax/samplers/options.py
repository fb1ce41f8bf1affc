"""Every sampler by name: the options of a command line or a notebook, the sampler that they describe, and its call."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.config.jax_settings import checked_key, settled
from softmask_jax.samplers import dream, transitions
from softmask_jax.samplers.blocks import BlockSampler
from softmask_jax.samplers.constraints import Constraints
from softmask_jax.samplers.dream import DreamSampler
from softmask_jax.samplers.feedback import SoftMask, check_masks
from softmask_jax.samplers.mdlm import MDLMSampler
from softmask_jax.samplers.result import Generated

# MDLM's grid is independent of the length; 128 steps are the fewest that ReMDM's and the soft-masking paper report.
MDLM_STEPS = 128
TRANSITIONS = {
    "mdlm": (transitions.Mdlm, ()),
    "remdm_cap": (transitions.RemdmCap, ("eta",)),
    "remdm_rescale": (transitions.RemdmRescale, ("eta",)),
    "remdm_conf": (transitions.RemdmConf, ()),
    "remdm_loop": (transitions.RemdmLoop, ("eta", "t_on", "t_off", "alpha_on")),
}
ALGORITHMS = (*TRANSITIONS, *dream.ALGORITHMS)
# What belongs to one family alone, and may not be set for another.
_MDLM = ("nucleus_p", "eta", "t_on", "t_off", "alpha_on")
_DREAM = ("top_p", "top_k", "alg_temp", "threshold", "factor", "tokens_per_step", "suppress_mask", "stop_at_end",
          "block_length", "cache", "full_call")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which sampler, and how it samples; ValueError for what makes no sense together. None is the sampler's own default.

    alg: "" is the model's own: mdlm, or entropy for Dream. steps: 128 for mdlm and remdm, else one a position that may be
    filled; confidence_factor, tokens_per_step and confidence_threshold in blocks do not read it. block_length: decode
    blocks from left to right with a `cache`, see `BlockSampler`. soft_mask: settings instead of the model's own, "none" for plain masks. forbidden: ids
    that are never drawn; end_penalty: nats off the logits of whatever ends a text. compat: as the reference where ours
    is better: mdlm and remdm reuse predictions when no token of the batch changed, blocks see `BlockSampler`.
    The rest: see `MDLMSampler`, the `transitions`, `DreamSampler`.
    """

    alg: str = ""
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
    block_length: int | None = None
    cache: str | None = None
    full_call: str | None = None
    threshold: float | None = None
    factor: float | None = None
    tokens_per_step: int | None = None
    suppress_mask: bool = False
    stop_at_end: bool = False
    forbidden: tuple[int, ...] = ()
    end_penalty: float = 0.0
    soft_mask: SoftMask | str | None = None
    compat: bool = False

    def __post_init__(self):
        # A list, as notebooks write it, could not be compiled for.
        object.__setattr__(self, "forbidden", tuple(self.forbidden))
        if self.alg and self.alg not in ALGORITHMS:
            raise ValueError(f"alg is '{self.alg}'; choose one of {', '.join(ALGORITHMS)}.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"A sampler needs at least 1 step, not {self.steps}.")
        if self.soft_mask is not None and self.soft_mask != "none" and not isinstance(self.soft_mask, SoftMask):
            raise ValueError(f"soft_mask must be 'none' or SoftMask(variant, k, schedule), not {self.soft_mask!r}.")
        if self.block_length is None and (self.cache or self.full_call):
            raise ValueError("cache and full_call are for decoding in blocks; give block_length too.")
        if self.alg:
            # Whatever is wrong with numbers is said before a model is loaded.
            self.sampler(None, SoftMask(), (0,), new_tokens=max(self.block_length or 1, self.steps or 1))

    def sampler(self, denoiser, soft_mask: SoftMask, end_token_ids: tuple[int, ...], *, new_tokens: int,
                prompt_length: int = 0, alg: str = "", trace: bool = False) -> MDLMSampler | DreamSampler | BlockSampler:
        """The sampler over a denoiser.

        Args:
          soft_mask, end_token_ids, alg: the model's own settings, the tokens that end its texts, its default algorithm.
          new_tokens: positions that may be filled, for the default number of steps. prompt_length: where blocks begin.
        """
        alg = self.alg or alg
        if self.soft_mask is not None:
            soft_mask = SoftMask() if self.soft_mask == "none" else self.soft_mask
        constraints = Constraints(self.forbidden, tuple(end_token_ids), self.end_penalty)
        common = {"denoiser": denoiser, "soft_mask": soft_mask, "constraints": constraints, "history": False, "trace": trace}
        given = {name: value for name, value in vars(self).items() if not (value is None or value is False)}
        if alg in TRANSITIONS:
            self._belongs(alg, given, _DREAM, "Dream's algorithms")
            make, names = TRANSITIONS[alg]
            self._belongs(alg, given, [name for name in _MDLM[1:] if name not in names], "other samplers")
            transition = make(**{name: given[name] for name in names if name in given})
            own = {name: given[name] for name in ("temperature", "nucleus_p") if name in given}
            reuse = "compat" if self.compat else "exact"
            return MDLMSampler(**common, steps=self.steps or MDLM_STEPS, transition=transition, reuse=reuse, **own)
        self._belongs(alg, given, _MDLM, "mdlm and remdm")
        for name in ("threshold", "factor"):
            self._belongs(alg, given, [name] * (alg != f"confidence_{name}"), f"confidence_{name}")
        self._belongs(alg, given, ["alg_temp"] * (alg == "origin"), "other samplers")
        names = ("temperature", "top_p", "top_k", "alg_temp", "threshold", "factor", "suppress_mask")
        own = {"top_k": None} | {name: given[name] for name in names if name in given}
        if self.block_length is None:
            counts = alg in ("confidence_threshold", "confidence_factor") or self.tokens_per_step is not None
            steps = self.steps if counts else self.steps or new_tokens
            if self.compat:
                raise ValueError(f"There is nothing that '{alg}' without blocks does otherwise; leave compat out.")
            return DreamSampler(**common, **own, alg=alg, steps=steps, stop_at_end=self.stop_at_end,
                                tokens_per_step=self.tokens_per_step)
        if alg == "origin":
            raise ValueError("'origin' cannot decode in blocks; choose another alg, or leave block_length out.")
        own |= {name: given[name] for name in ("cache", "full_call") if name in given}
        return BlockSampler(**common, **own, alg=alg, steps=self.steps or new_tokens, compat=self.compat,
                            block_length=self.block_length, prompt_length=prompt_length,
                            stop_at_end=self.stop_at_end, tokens_per_step=self.tokens_per_step)

    @staticmethod
    def _belongs(alg: str, given: dict, names, family: str) -> None:
        wrong = [name for name in names if name in given]
        if wrong:
            raise ValueError(f"{wrong[0]} is an option of {family}; '{alg}' has none.")


@functools.partial(jax.jit, static_argnums=0)
def run(sampler, params: dict, keys, tokens, attention_mask, *more) -> Generated:
    """A sampler's call, compiled once for each sampler and shape."""
    return sampler(params, keys, tokens, attention_mask, *more)


@settled()
def fill(model, tokens, attention_mask=None, *, keys: jax.Array, options: Options, prompt_length: int = 0,
         trace: bool = False) -> Generated:
    """Fill masks wherever they stand; what is given stays.

    Args:
      model: its `denoiser`, `params`, `soft_mask`, `end_token_ids`, `default_alg`, `max_length` and `row_shards` are used.
      tokens: [B L] ids, the mask where text is wanted. attention_mask: [B L], 0 for padding.
      keys: [B] one typed key a row: with it a row's answer depends neither on the rows beside it nor on padding.
      prompt_length: where blocks begin; positions from there on are the default number of steps of Dream's algorithms.
      trace: keep every step, for `viewer`.

    Raises:
      ValueError: ids that do not exist, rows that are too long, nothing masked, options that make no sense.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers [B L], not {tokens.dtype} {tokens.shape}.")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < model.denoiser.vocab_size:
        raise ValueError(f"tokens must lie in 0..{model.denoiser.vocab_size - 1}; found {tokens.min()}..{tokens.max()}.")
    longest = tokens.shape[1] if attention_mask is None else int((np.asarray(attention_mask) != 0).sum(-1).max(initial=0))
    if longest > model.max_length:
        raise ValueError(f"A row has {longest:,} tokens, masks among them; this model takes {model.max_length:,}.")
    check_masks(tokens, attention_mask, model.denoiser.mask_token_id)
    sampler = options.sampler(
        model.denoiser, model.soft_mask, model.end_token_ids, new_tokens=tokens.shape[1] - prompt_length,
        prompt_length=prompt_length, alg=model.default_alg, trace=trace,
    )  # fmt: skip
    mask, rows = None if attention_mask is None else jnp.asarray(attention_mask, jnp.int32), len(tokens)
    arrays = (checked_key(keys), jnp.asarray(tokens, jnp.int32), mask)
    if rows % model.row_shards:
        # Every device of a mesh takes as many rows: the first one is computed again where there are too few.
        whole = jnp.arange(-(-rows // model.row_shards) * model.row_shards) % rows
        arrays = jax.tree.map(lambda x: x[whole], arrays)
    return run(sampler, model.params, *arrays).first_rows(rows)
