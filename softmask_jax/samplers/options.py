"""Every sampler by name: options of a command line or a notebook, and the sampler that they describe."""
import dataclasses
from typing import TYPE_CHECKING

from softmask_jax.diffusion.soft_mask import SoftMask
from softmask_jax.samplers.algorithms import DREAM, LLADA, MDLM_STEPS, TRANSITIONS, check_steps

if TYPE_CHECKING:
    from softmask_jax.samplers.dream import DreamSampler
    from softmask_jax.samplers.mdlm import MDLMSampler

ALGORITHMS = (*TRANSITIONS, *DREAM)
# Options that only some algorithms have: a name for these, and the algorithms.
LIMITED = {
    "nucleus_p": ("mdlm and remdm", TRANSITIONS),
    "eta": ("other samplers", ("remdm_cap", "remdm_rescale", "remdm_loop")),
    **dict.fromkeys(("t_on", "t_off", "alpha_on"), ("other samplers", ("remdm_loop",))),
    **dict.fromkeys(("top_p", "top_k", "tokens_per_step", "suppress_mask", "stop_at_end", "block_length", "cache",
                     "full_call", "cfg_scale", "logits_eos_inf"), ("Dream's and LLaDA's algorithms", DREAM)),
    "threshold": ("confidence_threshold and low_confidence", ("confidence_threshold", "low_confidence")),
    "factor": ("confidence_factor and low_confidence", ("confidence_factor", "low_confidence")),
    "confidence_eos_eot_inf": ("low_confidence", ("low_confidence",)),
    "alg_temp": ("other samplers", tuple(alg for alg in DREAM if alg not in ("origin", "random"))),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Which sampler, and how it samples; None is the sampler's default. ValueError for options that clash. Fields
    without a comment: see `MDLMSampler`, the `transitions`, `DreamSampler`, `BlockSampler`."""

    alg: str = ""  # the model's own: mdlm, entropy for Dream, or low_confidence for LLaDA
    # 128 for mdlm and remdm, else one a position that may be filled; unused with a factor, tokens_per_step and, in
    # blocks, a threshold
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
    cfg_scale: float | None = None
    block_length: int | None = None  # decode blocks from left to right with a `cache`
    cache: str | None = None
    full_call: str | None = None
    threshold: float | None = None
    factor: float | None = None
    tokens_per_step: int | None = None
    suppress_mask: bool = False
    stop_at_end: bool = False
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
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

    def counts_steps(self, alg: str = "") -> bool:
        """Whether the sampler takes a fixed number of steps; alg: the model's default, for options without one."""
        alg = self.alg or alg
        thresholds = alg == "low_confidence" and (self.threshold, self.factor) != (None, None)
        return not (alg.startswith("confidence_") or thresholds or self.tokens_per_step is not None)

    def sampler(self, denoiser, soft_mask: SoftMask, end_token_ids: tuple[int, ...], *, new_tokens: int,
                prompt_length: int = 0, alg: str = "", trace: bool = False) -> "MDLMSampler | DreamSampler":
        """The sampler over a denoiser; soft_mask, end_token_ids, alg: the model's own. new_tokens: positions that may
        be filled, for the default number of steps. prompt_length: where blocks begin."""
        # Imports JAX, which flags made from the fields do not need.
        from softmask_jax.samplers import transitions
        from softmask_jax.samplers.blocks import BlockSampler
        from softmask_jax.samplers.constraints import Constraints
        from softmask_jax.samplers.dream import DreamSampler
        from softmask_jax.samplers.mdlm import MDLMSampler

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
            transition = getattr(transitions, TRANSITIONS[alg])
            return make(MDLMSampler, **common, steps=self.steps or MDLM_STEPS, transition=make(transition),
                        reuse="compat" if self.compat else "exact")
        common |= {"alg": alg, "top_k": self.top_k}
        if self.compat and alg in LLADA:
            # Without blocks, one of all new tokens.
            common["block_length"] = self.block_length or new_tokens
        if self.block_length is not None or "block_length" in common:
            if alg == "origin":
                raise ValueError("'origin' cannot decode in blocks; choose another alg, or leave block_length out.")
            return make(BlockSampler, **common, steps=self.steps or new_tokens, prompt_length=prompt_length)
        if self.compat:
            raise ValueError(f"compat changes nothing for '{alg}' without blocks; leave it out.")
        own = new_tokens if self.counts_steps(alg) else None
        return make(DreamSampler, **common, steps=self.steps or own)
