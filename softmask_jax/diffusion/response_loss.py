"""Losses of a chat's response: the prompt is never corrupted, the noise is each example's own.

Noise depends on the root key, the epoch and the example's number, not on the step: within an epoch it is the same in
every batch, bucket and mesh. B batch, L length."""
import jax
import jax.numpy as jnp

from softmask_jax.diffusion import noise
from softmask_jax.diffusion.noise import Stream
from softmask_jax.diffusion.objective import Batch, Noisy, Objective


class ResponseLoss(Objective):
    """Base of `DreamLoss` and `LLaDALoss`, dataclasses with these settings and a method `noisy`.

    A batch is one of `data.chat.buckets`: tokens, segment_ids [B L]; prompt_lengths, lengths, real_lengths, index [B].
    """

    noise_eps: float  # a token is masked with probability (1 - noise_eps) t + noise_eps
    t_min: float  # t is uniform between t_min and t_max
    t_max: float
    supervise_pads: bool  # corrupt and score the recipe's pads
    fresh_noise: bool  # draw t, masks and coins anew in every epoch, or repeat those of the first

    def noisy(self, batch: Batch, t: jax.Array, uniforms: jax.Array, *, mask_token_id: int) -> Noisy:
        """x_t of a batch from t [B] and uniforms [B L] in [0, 1), and its weights."""
        raise NotImplementedError

    def by_row(self) -> "ResponseLoss":
        """The same loss with nothing that the rows of a batch share."""
        return self

    def epoch(self, batch: Batch):
        return batch["epoch"] if self.fresh_noise else 0

    def corrupt(self, batch: Batch, root_key: jax.Array, step, *, mask_token_id: int) -> Noisy:
        """See `draw`; the noise depends on the batch's epoch, not on the step."""
        return self.draw(batch, root_key, mask_token_id=mask_token_id, epoch=self.epoch(batch))

    def coins(self, batch: Batch, root_key: jax.Array, step, *, p_sm: float, micro_batches: int) -> jax.Array:
        """[B] bool: every example has its own coin, however rows are grouped."""
        return example_coins(root_key, batch["index"], p_sm, self.epoch(batch))

    def draw(self, batch: Batch, root_key: jax.Array, *, mask_token_id: int, t=None, epoch=0) -> Noisy:
        """Noise of a batch, its t [B] drawn or passed as `t`, and the weights of its masks. epoch: see `example_keys`."""
        tokens, index = batch["tokens"], batch["index"]
        t_keys, mask_keys = (example_keys(root_key, stream, index, epoch) for stream in (Stream.T, Stream.MASK))
        if t is None:
            t = self.t_min + (self.t_max - self.t_min) * jax.vmap(jax.random.uniform)(t_keys)
        # A key for each position: the draws do not depend on the length of the bucket.
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        uniforms = noise.keyed_noise(jax.random.uniform, mask_keys, positions)
        return self.noisy(batch, t, uniforms, mask_token_id=mask_token_id)

    def maskable(self, batch: Batch) -> jax.Array:
        """[B L] bool: the response, with its pads if they are supervised."""
        position = jnp.arange(batch["tokens"].shape[1])
        last = batch["lengths" if self.supervise_pads else "real_lengths"]
        return (position >= batch["prompt_lengths"][:, None]) & (position < last[:, None])

    def probability(self, t: jax.Array) -> jax.Array:
        """Of a mask, [B]."""
        return (1 - self.noise_eps) * t + self.noise_eps

    def validation_t(self, index: jax.Array, count: int) -> jax.Array:
        """t [B] float32 of validation examples `index` [B] of `count`: evenly spaced from t_min to t_max."""
        return jnp.linspace(self.t_min, self.t_max, count, dtype=jnp.float32)[index]

    def validation_batch(self, batch: Batch, root_key: jax.Array, count: int, *, mask_token_id: int) -> Noisy:
        """Validation examples with the same t and masks in any batch; t is spread over all `count` examples."""
        return self.draw(batch, root_key, mask_token_id=mask_token_id, t=self.validation_t(batch["index"], count))


def example_keys(root_key: jax.Array, stream: Stream, index: jax.Array, epoch=0) -> jax.Array:
    """A key [B] for each example `index` [B] in its `epoch`, counted from 0: [B], or one for all."""

    def one(number, epoch):
        return jax.random.fold_in(noise.stream_key(root_key, stream, epoch), number)

    return jax.vmap(one)(index, jnp.broadcast_to(epoch, index.shape))


def example_coins(root_key: jax.Array, index: jax.Array, p_sm: float, epoch=0) -> jax.Array:
    """[B] bool: whether each example gets two passes."""
    return noise.coin(example_keys(root_key, Stream.COIN, index, epoch), p_sm)
