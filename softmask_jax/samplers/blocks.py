"""Decoding block by block, left to right, with a key/value cache (Fast-dLLM, arXiv 2505.22618); one compiled loop.

A full call at a block's start computes all positions, keeps their keys and values and commits the block's first token.
The steps after it compute a slice only: the block (`dual`), or everything from its start on (`prefix`); what lies
outside is seen as it was at the full call. Soft-masking (arXiv 2510.17206), which the reference has not, runs through
all of it: a mask carries the last prediction that was made for it, within its block and before.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp

from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.samplers import commit, dream_draw, feedback as feeding
from softmask_jax.samplers.block_loop import Carry, Run
from softmask_jax.samplers.constraints import Constraints
from softmask_jax.samplers.dream import Draws
from softmask_jax.samplers.result import Generated, held

CACHES = ("none", "prefix", "dual")
# How sure an algorithm is of a prediction.
ALGORITHMS = {"confidence_threshold": "probability", "confidence_factor": "probability", "maskgit_plus": "probability",
              "topk_margin": "margin", "entropy": "entropy"}  # fmt: skip
COUNTING = ("confidence_threshold", "confidence_factor")
FULL_CALLS = ("first", "rule")


@dataclasses.dataclass(frozen=True)
class BlockSampler:
    """`sampler(params, keys [B] | None, tokens [B L], attention_mask=None, draws=None) -> Generated`; pure, jit it with
    the sampler closed over.

    prompt_length: where the first block begins; masks before it stay. block_length: the last block may be shorter.
    cache: a name from `CACHES`; `none` computes every position at every call.
    alg: a name from `ALGORITHMS`. `confidence_threshold` commits every token of the block whose probability reaches
      `threshold`, `confidence_factor` as many as `commit.Factor` allows, at least one. The others take
      `tokens_per_step` tokens a call, surest first, or without it int(masks * (1 - s / t)) on a time grid of the
      block's own, of steps // blocks steps.
    full_call: whether the call at a block's start commits the block's first token only, as the reference, or by the
      same rule as the other steps, which needs fewer calls.
    temperature, top_p, top_k, alg_temp, eps, suppress_mask, history, trace: as `DreamSampler`.
    constraints: see `Constraints`. stop_at_end: where everything before a generated end token of `constraints` is known,
      or its block is done, a row is finished: the masks behind it become this token, are not counted as filled, and
      cost nothing.
    compat: as the reference where it is in error: time grids rank by entropy whatever `alg` says, and the first
      position of a slice is predicted from its own hidden state instead of the one before it.
    A mask that is predicted to be the mask stays one: with a time grid it counts as committed, else the step passes it
    over, and a row with nothing else leaves the block. ValueError for options that make no sense.
    """

    denoiser: object
    soft_mask: SoftMask = SoftMask()
    prompt_length: int = 0
    block_length: int = 32
    cache: str = "dual"
    steps: int = 512
    alg: str = "confidence_threshold"
    threshold: float = 0.9
    factor: float = 1.0
    tokens_per_step: int | None = None
    full_call: str = "first"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = 50
    alg_temp: float | None = None
    eps: float = 1e-3
    suppress_mask: bool = False
    stop_at_end: bool = False
    constraints: Constraints = Constraints()
    compat: bool = False
    history: bool = True
    trace: bool = False

    def __post_init__(self):
        for name, value, names in (("cache", self.cache, CACHES), ("alg", self.alg, ALGORITHMS),
                                   ("full_call", self.full_call, FULL_CALLS)):
            if value not in names:
                raise ValueError(f"{name} is '{value}'; choose one of {', '.join(names)}.")
        if self.block_length < 1:
            raise ValueError(f"A block has at least 1 position, block_length cannot be {self.block_length}.")
        if self.prompt_length < 0:
            raise ValueError(f"prompt_length, where the first block begins, cannot be {self.prompt_length}.")
        if self.alg_temp is not None and not 0 <= self.alg_temp < math.inf:
            raise ValueError(f"alg_temp must be finite and 0 or above, or None, not {self.alg_temp}.")
        if self.stop_at_end and not self.constraints.end_token_ids:
            raise ValueError("stop_at_end needs to know which tokens end a text: constraints.end_token_ids.")
        if self.tokens_per_step is not None and self.alg in COUNTING:
            raise ValueError(f"alg '{self.alg}' decides itself how many tokens a step commits; leave tokens_per_step out.")
        if self.steps < 1:
            raise ValueError(f"A sampler needs at least 1 step, not {self.steps}.")
        _ = self.filters, self._rule(1)

    @property
    def filters(self) -> dream_draw.Filters:
        grid = self.alg not in COUNTING and self.tokens_per_step is None
        confidence = "entropy" if self.compat and grid else ALGORITHMS[self.alg]
        return dream_draw.Filters(self.temperature, self.top_p, self.top_k, confidence)

    @property
    def reads(self) -> int:
        """How many candidates of a prediction are kept."""
        return feeding.shown(self.soft_mask) if self.trace else self.soft_mask.reads

    def blocks(self, length: int) -> int:
        """How many blocks a sequence of `length` positions has."""
        return -(-(length - self.prompt_length) // self.block_length)

    def most_calls(self, length: int) -> int:
        """The most network calls there can be: the length of the history, the trace and recorded draws."""
        blocks = self.blocks(length)
        return blocks * self._most_steps(self._rule(blocks))

    def _rule(self, blocks: int):
        if self.alg == "confidence_threshold":
            return commit.Threshold(self.threshold)
        if self.alg == "confidence_factor":
            return commit.Factor(self.factor)
        if self.tokens_per_step is not None:
            return commit.Number(self.tokens_per_step)
        if self.steps < blocks:
            raise ValueError(f"{self.steps} steps are too few for {blocks} blocks: every block takes at least one.")
        return commit.Shares(self.steps // blocks, self.eps)

    def _most_steps(self, rule) -> int:
        # Every other rule commits a token a step, only the full call's one may be the mask.
        return rule.steps if isinstance(rule, commit.Shares) else self.block_length + (self.full_call == "first")

    def __call__(self, params: dict, keys: jax.Array | None, tokens: jax.Array, attention_mask: jax.Array | None = None,
                 draws: Draws | None = None) -> Generated:
        """Fill the masks of `tokens`.

        Args:
          params: {"backbone", "soft_mask"}; the raw scalars are read only with soft-masking.
          keys: [B] one key per row: noise is a function of (row key, number of the row's calls before, place from its
            first token), so a row's text depends neither on the rows beside it nor on its padding.
          tokens: [B L] ids, the mask where text is wanted.
          attention_mask: [B L] 1 for tokens and 0 for padding, which is neither seen nor filled.
          draws: recorded random numbers, used instead of `keys`, by a row's own calls: [most_calls(L) B L ...].
        """
        self._check(keys, tokens, attention_mask, draws)
        tokens, rows, length = jnp.asarray(tokens, jnp.int32), *tokens.shape
        attended = jnp.ones(tokens.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
        places = jnp.where(attended, jnp.cumsum(attended, -1) - 1, 1)
        layout = {} if attention_mask is None else {"positions": places, "segment_ids": attended.astype(jnp.int32)}
        fillable = (tokens == self.denoiser.mask_token_id) & attended & (jnp.arange(length) >= self.prompt_length)
        bias = self.constraints.bias(self.denoiser.head(params["backbone"]))
        rule, total, feedback = self._rule(self.blocks(length)), self.most_calls(length), None
        run = Run(self, rule, self._most_steps(rule), params, keys, draws or Draws(), fillable, fillable.sum(-1),
                  places, layout, bias)
        if self.soft_mask.on or self.trace:
            spec = dataclasses.replace(self.soft_mask, k=max(self.reads, 1))
            feedback = two_pass.empty_feedback(self.denoiser, spec, params["backbone"], tokens)
        nobody, zero = jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32)
        end = run.blocks(Carry(
            step=jnp.int32(0), tokens=tokens, feedback=feedback, known=jnp.zeros(tokens.shape, bool), finished=nobody,
            stuck=nobody, calls=zero, positions=jnp.zeros(rows, jnp.float32), filled=zero, finite=~nobody,
            history=jnp.zeros((total, *tokens.shape), jnp.int32) if self.history else None,
            trace=feeding.empty_trace(total, tokens, self.reads) if self.trace else None,
        ))  # fmt: skip
        return Generated(end.tokens, held(end.history, end.step, end.tokens), end.step, end.step, end.calls,
                         end.positions, end.filled, end.finite, end.trace)

    def _check(self, keys, tokens, attention_mask, draws):
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [B L], not {tokens.shape}.")
        if self.prompt_length >= tokens.shape[1]:
            raise ValueError(f"The first block begins at {self.prompt_length}, but there are just {tokens.shape[1]} "
                             "positions.")
        if attention_mask is not None and attention_mask.shape != tokens.shape:
            raise ValueError(f"attention_mask must be {tokens.shape} [B L] as the tokens, not {attention_mask.shape}.")
        needed = {name for name, on in (("gumbel", self.temperature > 0), ("order", self.alg_temp)) if on}
        most = self.most_calls(tokens.shape[1])
        (draws or Draws()).check(keys, most, tokens, self.denoiser.vocab_size, needed)
        answer = None if attention_mask is None else attention_mask[:, self.prompt_length :]
        feeding.check_masks(tokens[:, self.prompt_length :], answer, self.denoiser.mask_token_id)
