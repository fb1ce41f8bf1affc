"""The NELBO of masked diffusion (MDLM, arXiv 2406.07524, eq. 10) with soft-masking (arXiv 2510.17206)."""
import dataclasses

import jax
import jax.numpy as jnp

from softmask_jax.diffusion import noise
from softmask_jax.diffusion.noise import Stream
from softmask_jax.diffusion.objective import Batch, Noisy, Objective
from softmask_jax.diffusion.soft_masking import SoftMask


@dataclasses.dataclass(frozen=True)
class Nelbo(Objective):
    """The NELBO, in nats per token."""

    soft_mask: SoftMask  # of pass 2
    noise_eps: float = 1e-3  # alpha_1
    t_eps: float = 1e-3  # the smallest t
    stratified: bool = True  # stratify t over the global batch

    @property
    def schedule(self) -> noise.LogLinear:
        return noise.LogLinear(self.noise_eps)

    def corrupt(self, batch: Batch, root_key: jax.Array, step, *, mask_token_id: int) -> Noisy:
        """A global batch {"tokens" [B L], "rows" [B]}, its t stratified over the rows; see `draw`."""
        tokens, rows = batch["tokens"], batch["rows"]
        return self.draw(tokens, rows, len(rows), root_key, step, mask_token_id=mask_token_id)

    def draw(self, tokens, rows, n, root_key, step, *, mask_token_id: int, strata=None) -> Noisy:
        """Draw t and x_t of tokens [B L]; noise depends on (root_key, step, row) alone, rows [B] in the global batch.

        n: number of strata of t, an int or [B]. strata: [B], by default the rows, right for rows in random order."""
        t_keys, mask_keys = (noise.row_keys(noise.stream_key(root_key, stream, step), rows)
                             for stream in (Stream.T, Stream.MASK))
        strata = rows if strata is None else strata
        t = noise.stratified_t(t_keys, strata, n, self.t_eps, stratified=self.stratified)
        uniforms = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]))(mask_keys)
        xt = noise.corrupt(tokens, self.schedule.alpha(t), uniforms, mask_token_id)
        return self.noisy(tokens, xt, t, mask_token_id)

    def noisy(self, x0: jax.Array, xt: jax.Array, t: jax.Array, mask_token_id: int) -> Noisy:
        """x_t [B L] of x_0 at noise level t [B]; weights -alpha' / (1 - alpha) / L at masks."""
        masked = xt == mask_token_id
        weights = jnp.where(masked, self.schedule.loss_weight(t)[:, None] / x0.shape[1], 0.0)
        return Noisy(x0, xt, masked, t, weights)

    def coins(self, batch: Batch, root_key: jax.Array, step, *, p_sm: float, micro_batches: int) -> jax.Array:
        """[B] bool; the rows of a micro-batch share a coin."""
        return noise.shared_coins(root_key, step, len(batch["rows"]), p_sm=p_sm, micro_batches=micro_batches)
