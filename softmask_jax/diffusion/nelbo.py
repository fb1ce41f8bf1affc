"""The NELBO of masked diffusion (MDLM, arXiv 2406.07524, eq. 10) as an objective with soft-masking (arXiv 2510.17206)."""
import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from softmask_jax.diffusion import noise
from softmask_jax.diffusion.noise import Stream
from softmask_jax.diffusion.objective import Noisy
from softmask_jax.diffusion.soft_masking import SoftMask


@dataclasses.dataclass(frozen=True)
class Nelbo:
    """See `objective.Objective`.

    Attributes:
      soft_mask: of pass 2. noise_eps: alpha_1. t_eps: the smallest t. stratified: t over the global batch.
    """

    soft_mask: SoftMask
    noise_eps: float = 1e-3
    t_eps: float = 1e-3
    stratified: bool = True

    @classmethod
    def from_config(cls, config) -> "Nelbo":
        o = config.objective
        return cls(SoftMask.from_config(config.soft_mask), o.noise_eps, o.t_eps, o.stratified)

    @property
    def schedule(self) -> noise.LogLinear:
        return noise.LogLinear(self.noise_eps)

    def corrupt(self, batch: Mapping[str, jax.Array], root_key: jax.Array, step, *, mask_token_id: int) -> Noisy:
        """A global batch {"tokens" [B L], "rows" [B]}, its t stratified over the rows; see `draw`."""
        tokens, rows = batch["tokens"], batch["rows"]
        return self.draw(tokens, rows, len(rows), root_key, step, mask_token_id=mask_token_id)

    def draw(self, tokens, rows, n, root_key, step, *, mask_token_id: int, strata=None) -> Noisy:
        """Draw t and x_t; a row's noise depends on (root_key, step, row) alone.

        Args:
          tokens: [B L] ids. rows: [B] index of each row within the global batch.
          n: number of strata of t, an int or [B].
          strata: [B] the stratum of each row; its index by default, which is right where rows come in random order.

        Returns:
          Weights of -alpha'/(1 - alpha) / L: a row's loss is its NELBO in nats per token.
        """
        t = noise.stratified_t(
            noise.row_keys(noise.stream_key(root_key, Stream.T, step), rows),
            rows if strata is None else strata, n, self.t_eps, stratified=self.stratified,
        )  # fmt: skip
        keys = noise.row_keys(noise.stream_key(root_key, Stream.MASK, step), rows)
        return self.noisy(tokens, noise.corrupt(tokens, self.schedule.alpha(t), keys, mask_token_id), t, mask_token_id)

    def noisy(self, x0: jax.Array, xt: jax.Array, t: jax.Array, mask_token_id: int) -> Noisy:
        """x_t [B L] of x_0 at noise level t [B], with its weights."""
        masked = xt == mask_token_id
        weights = jnp.where(masked, self.schedule.loss_weight(t)[:, None] / x0.shape[1], 0.0)
        return Noisy(x0, xt, masked, t, weights)

    def coins(self, batch: Mapping[str, jax.Array], root_key: jax.Array, step, *, p_sm: float, micro_batches: int) -> jax.Array:
        """[B] bool; the rows of a micro-batch share a coin."""
        keys = noise.row_keys(noise.stream_key(root_key, Stream.COIN, step), jnp.arange(micro_batches))
        coins = jax.vmap(lambda key: noise.coin(key, p_sm))(keys)
        return jnp.tile(coins, len(batch["rows"]) // micro_batches)
