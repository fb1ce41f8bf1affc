"""Dream's sampler with soft-masking, one compiled loop (`diffusion_generate` of the Dream models, HKU NLP and Huawei).

From t = 1 down the grid every step predicts all masks and commits some: each by a coin (`origin`) or the most confident
ones. With soft-masking (arXiv 2510.17206) the first step reads plain masks, every later one the prediction before it.
`confidence_threshold` and `confidence_factor` commit whatever is sure enough (Fast-dLLM, arXiv 2505.22618).
The denoiser's hidden states are those of the position itself: Dream's shift by one belongs into its `trunk`.
"""
import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.samplers import commit, dream_draw, feedback
from softmask_jax.samplers.canvas import Canvas, IntBL, KeysB
from softmask_jax.samplers.constraints import Constraints
from softmask_jax.samplers.decoding import Carry, Decoding, Draws
from softmask_jax.samplers.result import Generated

# The confidence that an algorithm ranks predictions by; all but `origin` unmask the surest first.
ALGORITHMS = {
    "origin": "none", "maskgit_plus": "probability", "topk_margin": "margin", "entropy": "entropy",
    "confidence_threshold": "probability", "confidence_factor": "probability",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DreamSampler:
    """`sampler(params, keys [B], tokens [B L], attention_mask=None) -> Generated`; pure, jit it with the sampler closed
    over. ValueError for options that make no sense.

    A prediction may be the mask unless suppress_mask is set, as in the reference. On a time grid it counts as committed
    and may stay to the end; elsewhere the step passes it over, and a row with nothing else is done.

    Attributes:
      denoiser: a `models.Denoiser`.
      soft_mask: settings of the feedback.
      steps: of the time grid; `confidence_threshold` spreads its tokens over as many at least, or with None over none.
      alg: a name from `ALGORITHMS`.
      temperature, top_p: see `dream_draw.Filters`.
      top_k: see `dream_draw.Filters`; 50 is the default of the reference's library, None is no filter.
      alg_temp: above 0, positions are drawn without replacement from softmax(confidence / alg_temp); not for `origin`.
      eps: where the time grid ends.
      threshold: of `confidence_threshold`.
      factor: of `confidence_factor`.
      tokens_per_step: commit as many a step instead of the grid's share.
      suppress_mask: never predict the mask.
      stop_at_end: finish a row once an end token stands before its first mask; its other masks become that token.
      constraints: tokens that are not drawn, and tokens that end a text.
      history, trace: keep every step.
    """

    denoiser: object
    soft_mask: SoftMask = SoftMask()
    steps: int | None = 512
    alg: str = "origin"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = 50
    alg_temp: float | None = None
    eps: float = 1e-3
    threshold: float = 0.9
    factor: float = 1.0
    tokens_per_step: int | None = None
    suppress_mask: bool = False
    stop_at_end: bool = False
    constraints: Constraints = Constraints()
    history: bool = True
    trace: bool = False

    algorithms: ClassVar = tuple(ALGORITHMS)
    # One block of everything, without a step that commits only its first token.
    prompt_length = 0
    full_call = "rule"

    def __post_init__(self):
        if self.alg not in self.algorithms:
            raise ValueError(f"alg is '{self.alg}'; choose one of {', '.join(self.algorithms)}.")
        if self.alg_temp is not None and not 0 <= self.alg_temp < math.inf:
            raise ValueError(f"alg_temp must be finite and 0 or above, or None, not {self.alg_temp}.")
        if self.stop_at_end and not self.constraints.end_token_ids:
            raise ValueError("stop_at_end needs to know which tokens end a text: constraints.end_token_ids.")
        if self.tokens_per_step is not None and self.alg in ("origin", "confidence_threshold", "confidence_factor"):
            raise ValueError(f"alg '{self.alg}' decides itself how many tokens a step commits; "
                             "leave tokens_per_step out.")
        _ = self.filters, self.rule(1)

    @property
    def grid(self) -> bool:
        """Whether a time grid says how many tokens a step commits."""
        return not self.alg.startswith("confidence_") and self.tokens_per_step is None

    @property
    def filters(self) -> dream_draw.Filters:
        return dream_draw.Filters(self.temperature, self.top_p, self.top_k, ALGORITHMS[self.alg])

    @property
    def reads(self) -> int:
        """How many candidates of a prediction are kept."""
        return feedback.shown(self.soft_mask) if self.trace else self.soft_mask.reads

    def rule(self, blocks: int) -> Callable:
        """How many tokens a step of one of `blocks` blocks commits, see `commit`."""
        if self.alg == "confidence_threshold":
            return commit.Threshold(self.threshold, self.steps)
        if self.alg == "confidence_factor":
            return commit.Factor(self.factor)
        if self.tokens_per_step is not None:
            return commit.Number(self.tokens_per_step)
        if self.steps is None:
            raise ValueError(f"alg '{self.alg}' needs a number of steps.")
        return commit.Shares(self.steps // blocks, self.eps)

    def blocks(self, length: int) -> int:
        """How many blocks a sequence of `length` positions has."""
        return 1

    def max_steps(self, length: int) -> int:
        """The most steps of a block; without a grid each commits a token at least."""
        return self.steps if self.grid else length

    def most_calls(self, length: int) -> int:
        """T, the most network calls there can be: the length of the history, the trace and recorded draws."""
        return self.blocks(length) * self.max_steps(length)

    def __call__(self, params: dict, keys: KeysB | None, tokens: IntBL, attention_mask: IntBL | None = None,
                 draws: Draws | None = None) -> Generated:
        """Fill the masks of `tokens`.

        Args:
          params: {"backbone", "soft_mask"}; the raw scalars are read only with soft-masking.
          keys: one a row: noise is a function of (row key, number of the row's calls before, position from its first
            token), so a row's text depends neither on the rows beside it nor on its padding.
          tokens: ids, the mask where text is wanted.
          attention_mask: 1 for tokens and 0 for padding, which is neither seen nor filled.
          draws: recorded random numbers, used instead of `keys` where there are some.
        """
        canvas = Canvas.of(tokens, attention_mask, self.denoiser.mask_token_id, self.prompt_length)
        rule, length, draws = self.rule(self.blocks(tokens.shape[1])), tokens.shape[1], draws or Draws()
        origin = self.alg == "origin"
        needed = {"coins": origin, "gumbel": self.temperature > 0, "order": self.alg_temp and not origin}
        draws.check(keys, self.most_calls(length), tokens, self.denoiser.vocab_size, needed)
        head = self.denoiser.head(params["backbone"])
        decoding = Decoding(self, canvas, params, keys, draws, rule, self.max_steps(length), head,
                            self.constraints.bias(head))
        return decoding.result(self.decode(decoding, decoding.start(self.most_calls(length))))

    def decode(self, decoding: Decoding, carry: Carry) -> Carry:
        return decoding.fill(carry, decoding.block(carry, 0, decoding.length), decoding.full_call)
