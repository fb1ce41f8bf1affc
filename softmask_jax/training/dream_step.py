"""The pure train step of Dream: its weighted cross-entropy in two passes, an adapter on a frozen base or the whole."""
import dataclasses

import jax
import jax.numpy as jnp
import optax

from softmask_jax.config import Config
from softmask_jax.diffusion import dream_loss, noise
from softmask_jax.diffusion.dream_loss import DreamLoss, Noisy
from softmask_jax.diffusion.noise import Stream
from softmask_jax.training.train_state import TrainState, whole
from softmask_jax.training.train_step import Metrics, metric_sums, update


@dataclasses.dataclass(frozen=True)
class DreamStep:
    """`step(state, batch, root_key) -> (state, Metrics)`; jit `train_step`, its state donated.

    batch: as `data.buckets` makes it; position p is of micro-batch p % micro_batches. The loss is the mean over rows,
    and every row has its own coin: how rows are grouped changes nothing but the order of sums.
    """

    denoiser: object
    tx: optax.GradientTransformationExtraArgs
    spec: DreamLoss
    p_sm: float
    micro_batches: int
    ema_decay: float
    dropout: bool = False

    def train_step(self, state: TrainState, batch: dict, root_key) -> tuple[TrainState, Metrics]:
        noisy, coins = self.draw(batch, root_key)
        keys = None
        if self.dropout:
            keys = noise.row_keys(noise.stream_key(root_key, Stream.DROPOUT, state.step), batch["rows"])
        loss, grads, sums = self.gradient(state, noisy, coins, keys)
        return update(self.tx, self.ema_decay, state, grads, loss, coins, sums)

    def draw(self, batch: dict, root_key) -> tuple[Noisy, jax.Array]:
        """The corrupted batch, and the coin of every row: [B] bool."""
        epoch = batch["epoch"] if self.spec.fresh_noise else 0
        noisy = dream_loss.corrupt(
            self.spec, batch, root_key, mask_token_id=self.denoiser.mask_token_id, epoch=epoch
        )
        if self.spec.variant == "none" or self.p_sm == 0.0:
            return noisy, jnp.zeros(batch["index"].shape, bool)
        return noisy, dream_loss.coins(root_key, batch["index"], self.p_sm, epoch)

    def gradient(self, state: TrainState, noisy: Noisy, coins: jax.Array, keys=None) -> tuple[jax.Array, dict, dict]:
        """(loss, gradient of what is trained, sums for the metrics); the first two are means over the micro-batches.

        coins: [B] bool. keys: [B], for dropout, or None.
        """
        micro = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, self.micro_batches, *x.shape[1:]), 0, 1), (noisy, coins, keys)
        )
        first = jax.tree.map(lambda x: x[0], micro)
        if self.micro_batches == 1:
            return self._gradient(state, *first)

        def accumulate(total, given):
            return jax.tree.map(jnp.add, total, self._gradient(state, *given)), None

        # From zeros on, so that the network is compiled once.
        shapes = jax.eval_shape(self._gradient, state, *first)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (loss, grads, sums), _ = jax.lax.scan(accumulate, nothing, micro)
        loss, grads = jax.tree.map(lambda x: x / self.micro_batches, (loss, grads))
        return loss, grads, sums

    def _gradient(self, state: TrainState, noisy: Noisy, coins, keys):
        """Mean loss of one micro-batch, its gradient, and sums for the metrics."""
        drop = (lambda i: None) if keys is None else lambda i: jax.vmap(lambda k: jax.random.fold_in(k, i))(keys)
        params, given, scale = whole(state.params, state.frozen), None, 1.0
        if self.spec.variant != "none" and self.p_sm > 0.0:
            given = dream_loss.feedback(self.denoiser, self.spec, params, noisy, coins.any(), dropout_keys=drop(0))
            scale = coins.astype(jnp.float32)

        def loss(trained):
            nll = dream_loss.token_nll(
                self.denoiser, self.spec, whole(trained, state.frozen), noisy, given, scale, dropout_keys=drop(1)
            )
            return (nll * noisy.weights).sum(-1).mean(), nll

        (value, nll), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return value, grads, metric_sums(params, noisy, noisy.masked, nll, given, scale)


def loss_spec(config: Config) -> DreamLoss:
    """The static part of the objective of a config."""
    o = config.objective
    return DreamLoss(
        variant=config.soft_mask.variant, k=config.soft_mask.k, noise_eps=o.noise_eps, t_min=o.t_min, t_max=o.t_max,
        t_per=o.t_per, weighting=o.weighting, cart_p=o.cart_p, supervise_pads=o.supervise_pads,
        fresh_noise=o.fresh_noise,
    )  # fmt: skip


def make(config: Config, denoiser, tx) -> DreamStep:
    return DreamStep(
        denoiser, tx, loss_spec(config), config.soft_mask.p_sm, config.train.micro_batches, config.optimizer.ema_decay,
        dropout=config.model.adapter != "none" and config.model.adapter_dropout > 0,
    )  # fmt: skip
