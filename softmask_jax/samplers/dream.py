"""Dream's and LLaDA's samplers with soft-masking, one compiled loop (`diffusion_generate` of the Dream models, HKU NLP
and Huawei; `generate` of LLaDA, arXiv 2502.09992).

From t = 1 down the grid every step predicts all masks and commits some: by a coin each (`origin`), the most confident
ones, or with `confidence_threshold` and `confidence_factor` all that are sure enough (Fast-dLLM, arXiv 2505.22618).
LLaDA's `low_confidence` and `random` divide the masks evenly over the steps instead of a grid of times.
With soft-masking (arXiv 2510.17206) every step after the first reads the prediction before it. The denoiser's hidden
states predict their own position: Dream's shift by one belongs into its `trunk`."""
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.samplers import commit, dream_draw
from softmask_jax.samplers.algorithms import DREAM as ALGORITHMS, LLADA, check_steps
from softmask_jax.samplers.canvas import Canvas, IntBL, KeysB
from softmask_jax.samplers.constraints import Constraints
from softmask_jax.samplers.decoding import Carry, Decoding
from softmask_jax.samplers.draws import Draws
from softmask_jax.samplers.result import Generated, candidates


@dataclasses.dataclass(frozen=True)
class DreamSampler:
    """`sampler(params, keys [B], tokens [B L], attention_mask=None) -> Generated`; pure, jit it with the sampler closed
    over. ValueError for invalid options.

    Without suppress_mask a prediction may be the mask, as in the reference: on a time grid it counts as committed and
    may stay to the end; elsewhere the step skips it, and a row with nothing else is done. `low_confidence` and `random`
    never predict it."""

    denoiser: object  # a `models.Denoiser`
    soft_mask: SoftMask = SoftMask()  # settings of the feedback
    steps: int | None = 512  # of the time grid; the fewest that `confidence_threshold` takes, None for no limit
    alg: str = "origin"  # a name from `ALGORITHMS`
    temperature: float = 0.0  # this and the next two: see `dream_draw.Filters`
    top_p: float | None = None
    top_k: int | None = 50  # the default of the reference's library
    alg_temp: float | None = None  # above 0, positions are drawn from softmax(confidence / alg_temp); not for `origin`
    cfg_scale: float = 0.0  # above 0, guide the draws, see `guidance`; twice the rows of a network call
    eps: float = 1e-3  # where the time grid ends
    threshold: float | None = None  # of `confidence_threshold` (0.9), see `commit`; `low_confidence` takes it, too
    factor: float | None = None  # of `confidence_factor` (1), or of `low_confidence`
    tokens_per_step: int | None = None  # commit as many a step, surest first, instead of the grid's share
    suppress_mask: bool = False  # never predict the mask
    # LLaDA's, for an answer that is too short; the first of constraints.end_token_ids, end of text, is not drawn
    logits_eos_inf: bool = False
    # of `low_confidence`: drawn tokens of constraints.end_token_ids have confidence 0, the others' leaves them out
    confidence_eos_eot_inf: bool = False
    # finish a row once an end token precedes its first mask; in the result, not in the history, masks behind become it
    stop_at_end: bool = False
    constraints: Constraints = Constraints()  # tokens that are not drawn, and tokens that end a text
    history: bool = True  # keep the tokens of every step
    trace: bool = False  # keep the `Trace` of every step

    algorithms: ClassVar = tuple(ALGORITHMS)
    # One block of all positions, without a step that commits only its first token.
    by_blocks = False
    prompt_length = 0
    full_call = "rule"
    as_llada = False

    def __post_init__(self):
        if self.alg not in self.algorithms:
            raise ValueError(f"alg is '{self.alg}'; choose one of {', '.join(self.algorithms)}.")
        check_steps(self.steps)
        if self.grid and self.steps is None:
            raise ValueError(f"alg '{self.alg}' needs a number of steps.")
        if self.alg_temp is not None and not 0 <= self.alg_temp < math.inf:
            raise ValueError(f"alg_temp must be finite and 0 or above, or None, not {self.alg_temp}.")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps, where the time grid ends, must be in (0, 1), not {self.eps}.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be a probability in [0, 1], not {self.threshold}.")
        if self.factor is not None and not self.factor > 0:
            raise ValueError(f"factor must be above 0, not {self.factor}.")
        if not 0 <= self.cfg_scale < math.inf:
            raise ValueError(f"cfg_scale must be 0 (no guidance) or above and finite, not {self.cfg_scale}.")
        counts = [self.tokens_per_step, *((self.threshold, self.factor) if self.alg == "low_confidence" else ())]
        if sum(count is not None for count in counts) > 1:
            raise ValueError("tokens_per_step, threshold and factor all say how many tokens a step commits; give one.")
        if self.tokens_per_step is not None and self.alg in ("origin", "confidence_threshold", "confidence_factor"):
            raise ValueError(f"alg '{self.alg}' decides how many tokens a step commits; leave tokens_per_step out.")
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            raise ValueError(f"A step must commit at least 1 token, not {self.tokens_per_step}.")
        for name in ("stop_at_end", "logits_eos_inf", "confidence_eos_eot_inf"):
            if getattr(self, name) and not self.constraints.end_token_ids:
                raise ValueError(f"{name} needs to know which tokens end a text: constraints.end_token_ids.")
        _ = self.filters

    @property
    def grid(self) -> bool:
        """Whether the number of steps says how many tokens each commits."""
        return self.committing in ("shares", "even")

    @property
    def committing(self) -> str:
        """The rule of `commit` that says how many tokens a step commits, by name."""
        if self.alg.startswith("confidence_"):
            return self.alg.removeprefix("confidence_")
        if self.alg == "low_confidence" and (self.threshold is not None or self.factor is not None):
            return "factor" if self.threshold is None else "threshold"
        if self.tokens_per_step is not None:
            return "number"
        return "even" if self.alg in LLADA else "shares"

    @property
    def never_masks(self) -> bool:
        """Whether the algorithm itself never predicts the mask."""
        return self.alg in LLADA and not self.as_llada

    @property
    def filters(self) -> dream_draw.Filters:
        ends = self.constraints.end_token_ids if self.confidence_eos_eot_inf else ()
        return dream_draw.Filters(self.temperature, self.top_p, self.top_k, ALGORITHMS[self.alg], ends)

    @property
    def reads(self) -> int:
        """How many candidates of a prediction are kept."""
        return candidates(self.soft_mask, self.trace)

    def rule(self, blocks: int) -> Callable:
        """How many tokens a step commits with `blocks` blocks, see `commit`."""
        if self.committing == "threshold":
            threshold = 0.9 if self.threshold is None else self.threshold
            return partial(commit.threshold, threshold=threshold, steps=self.steps)
        if self.committing == "factor":
            return partial(commit.factor, factor=1.0 if self.factor is None else self.factor)
        if self.committing == "number":
            return partial(commit.number, number=self.tokens_per_step)
        if self.committing == "even":
            return partial(commit.even, steps=self.steps // blocks)
        return partial(commit.shares, steps=self.steps // blocks, eps=self.eps)

    def blocks(self, length: int) -> int:
        """How many blocks a sequence of `length` positions has."""
        return 1

    def max_steps(self, length: int) -> int:
        """The most steps of a block; without a grid each commits a token at least."""
        return self.steps if self.grid else length

    def least_steps(self, length: int) -> int:
        """The steps of a block that are made without a mask in it, too."""
        return 0

    def most_calls(self, length: int) -> int:
        """T, the most network calls there can be: the length of the history, the trace and recorded draws."""
        return self.blocks(length) * self.max_steps(length)

    def __call__(self, params: dict, keys: KeysB | None, tokens: IntBL, attention_mask: IntBL | None = None,
                 draws: Draws | None = None) -> Generated:
        """Fill the masks of `tokens`.

        Args:
          params: {"backbone", "soft_mask"}; the raw scalars are read only with soft-masking.
          keys: one a row; noise depends on (row key, the row's calls before, position from its first token), so a row's
            text depends neither on other rows nor on its padding.
          tokens: ids, the mask where text is wanted.
          attention_mask: 1 for tokens, 0 for padding, which is neither seen nor filled.
          draws: recorded random numbers, used instead of `keys`."""
        denoiser, begin = self.denoiser, 0 if self.as_llada else self.prompt_length
        canvas = Canvas.of(tokens, attention_mask, denoiser.mask_token_id, begin)
        length, draws, origin = tokens.shape[1], draws or Draws(), self.alg == "origin"
        rule, most_calls = self.rule(self.blocks(length)), self.most_calls(length)
        needed = {"coins": self.alg in ("origin", "random"), "gumbel": self.temperature > 0,
                  "order": self.alg_temp and not origin}
        draws.check(keys, most_calls, tokens, self.denoiser.vocab_size, needed)
        params = {**params, "backbone": self.denoiser.prepared(params["backbone"])}
        head = self.denoiser.head(params["backbone"])
        constraints = self.constraints
        if self.logits_eos_inf:
            forbidden = (*constraints.forbidden, constraints.end_token_ids[0])
            constraints = dataclasses.replace(constraints, forbidden=forbidden)
        bias = constraints.bias(head, None if self.as_llada else denoiser.used_vocab)
        decoding = Decoding(self, canvas, params, keys, draws, rule, self.max_steps(length), head, bias)
        return decoding.result(self.decode(decoding, decoding.start(most_calls)))

    def decode(self, decoding: Decoding, carry: Carry) -> Carry:
        return decoding.fill(carry, decoding.block(carry, 0, decoding.length), decoding.full_call)
