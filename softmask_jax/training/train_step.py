"""The pure train step and the pure validation step.

One train step: draw t and x_t for the global batch; for every micro-batch throw the coin, run pass 1 under `lax.cond`
outside the gradient, take the gradient of pass 2, add up; then one optimiser update. Pass 2 is compiled once: on
single-pass steps lambda is multiplied by the coin's 0.
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from softmask_jax.config import Config
from softmask_jax.diffusion import nelbo as objective, noise, soft_masking
from softmask_jax.diffusion.noise import Stream
from softmask_jax.training import optimizer
from softmask_jax.training.train_state import TrainState, whole

T_BINS = 10
LAMBDA_BINS = 10


class Metrics(NamedTuple):
    """Of one step, on the device. Sums over masked positions are divided by their counts where they are read."""

    loss: jax.Array  # [] nats per token, the NELBO
    grad_norm: jax.Array  # [] before clipping
    masked: jax.Array  # [] masked positions
    two_pass: jax.Array  # [] share of micro-batches with two passes
    xent_sum: jax.Array  # [T_BINS] unweighted cross-entropy of masked positions, by t
    xent_count: jax.Array  # [T_BINS]
    lambda_sum: jax.Array  # [] over masked positions of two-pass micro-batches
    lambda_hist: jax.Array  # [LAMBDA_BINS] counts over [0, 1]
    top_k_hits: jax.Array  # [] masked positions whose true token is among pass 1's top-k
    fed_back: jax.Array  # [] masked positions of two-pass micro-batches
    finite: jax.Array  # [] bool: loss and gradients


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """`step(state, batch, root_key, coins=None) -> (state, Metrics)`; jit `train_step`, its state donated.

    batch: {"tokens": [B L] int32, "rows": [B] int32}; position p is of micro-batch p % micro_batches.
    coins: [micro_batches] bool, or None to draw them.
    """

    denoiser: object
    tx: optax.GradientTransformationExtraArgs
    spec: objective.Nelbo
    p_sm: float
    micro_batches: int
    dropout: bool
    ema_decay: float

    def __call__(self, *args, **kwargs):
        return self.train_step(*args, **kwargs)

    def train_step(self, state: TrainState, batch: dict, root_key, coins=None) -> tuple[TrainState, Metrics]:
        batch_size, length = batch["tokens"].shape
        noisy = objective.corrupt(
            self.spec, batch["tokens"], batch["rows"], batch_size, root_key, state.step,
            mask_token_id=self.denoiser.mask_token_id,
        )  # fmt: skip
        dropout = noise.row_keys(noise.stream_key(root_key, Stream.DROPOUT, state.step), batch["rows"])
        coins = self._coins(root_key, state.step) if coins is None else jnp.asarray(coins, bool)
        # Neighbouring positions go to different micro-batches, so each device keeps its own rows. `data.batches` orders
        # them such that the row numbers of a micro-batch don't depend on the number of hosts.
        micro = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, self.micro_batches, *x.shape[1:]), 0, 1), (noisy, dropout)
        )

        def accumulate(total, given):
            noisy, dropout, coin = given
            return jax.tree.map(jnp.add, total, self._gradient(state, noisy, dropout, coin)), None

        first, rest = jax.tree.map(lambda x: x[0], (*micro, coins)), jax.tree.map(lambda x: x[1:], (*micro, coins))
        total = self._gradient(state, *first)
        if self.micro_batches > 1:
            total, _ = jax.lax.scan(accumulate, total, rest)
        grads, sums = total
        grads = jax.tree.map(lambda g: g / self.micro_batches, grads)
        loss = sums.pop("nelbo") / (batch_size * length)
        return update(self.tx, self.ema_decay, state, grads, loss, coins, sums)

    def _coins(self, root_key, step):
        if self.spec.variant == "none" or self.p_sm == 0.0:
            return jnp.zeros(self.micro_batches, bool)
        keys = noise.row_keys(noise.stream_key(root_key, Stream.COIN, step), jnp.arange(self.micro_batches))
        return jax.vmap(lambda key: noise.coin(key, self.p_sm))(keys)

    def _gradient(self, state: TrainState, noisy: objective.Corrupted, dropout, coin):
        """Gradient of the mean NELBO of one micro-batch, and sums for the metrics."""
        tokens, params = noisy.noisy, whole(state.params, state.frozen)
        keys = (lambda i: jax.vmap(lambda key: jax.random.fold_in(key, i))(dropout)) if self.dropout else lambda i: None
        given, scale = None, 1.0
        if self.spec.variant != "none" and self.p_sm > 0.0:
            given = jax.lax.cond(
                coin,
                lambda: objective.pass_1(self.denoiser, self.spec, params, tokens, dropout_keys=keys(0)),
                lambda: objective.empty_feedback(self.denoiser, self.spec, params["backbone"], tokens),
            )
            scale = coin.astype(jnp.float32)

        def loss(trained):
            nll = objective.token_nll(
                self.denoiser, self.spec, whole(trained, state.frozen), noisy, given, scale, dropout_keys=keys(1)
            )
            nelbo = (nll.sum(-1) * noisy.weight).sum()
            return nelbo / tokens.size, (nelbo, nll)

        (_, (nelbo, nll)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        masked = tokens == self.denoiser.mask_token_id
        return grads, {"nelbo": nelbo} | metric_sums(params, noisy, masked, nll, given, scale)


def update(tx, ema_decay: float, state: TrainState, grads, loss, coins, sums: dict) -> tuple[TrainState, Metrics]:
    """One optimiser update; coins: bool, of micro-batches or rows, sums: of `metric_sums` over all micro-batches."""
    grad_norm = optax.global_norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, soft_masked=coins.any())
    params = optax.apply_updates(state.params, updates)
    ema = optimizer.ema_update(state.ema, params["backbone"], state.step + 1, ema_decay)
    metrics = Metrics(
        loss=loss, grad_norm=grad_norm, two_pass=coins.mean(dtype=jnp.float32),
        finite=jnp.isfinite(loss) & jnp.isfinite(grad_norm), **sums,
    )  # fmt: skip
    return TrainState(state.step + 1, params, ema, opt_state, state.frozen), metrics


def metric_sums(params: dict, noisy, masked, nll, given, scale) -> dict:
    """Sums for `Metrics` of one micro-batch.

    Args:
      noisy: with x_0 `tokens` [B L] and `t` [B]. masked: [B L] bool. nll: [B L], 0 where there is no mask.
      given, scale: what was fed back, or None, and the coin, a scalar or [B].
    """
    count = masked.sum(-1, dtype=jnp.float32)
    bins = jnp.clip((noisy.t * T_BINS).astype(jnp.int32), 0, T_BINS - 1)
    sums = {
        "masked": count.sum(),
        "xent_sum": jnp.zeros(T_BINS).at[bins].add(nll.sum(-1)),
        "xent_count": jnp.zeros(T_BINS).at[bins].add(count),
    }
    if given is None:
        zero = jnp.zeros(())
        return sums | {
            "lambda_sum": zero, "lambda_hist": jnp.zeros(LAMBDA_BINS), "top_k_hits": zero, "fed_back": zero
        }  # fmt: skip
    scale = jnp.asarray(scale, jnp.float32)
    weight = jnp.where(masked, scale[:, None] if scale.ndim else scale, 0.0)
    lam = soft_masking.mix_weight(given.neg_entropy, soft_masking.effective(params["soft_mask"]))
    hits = (given.token_ids == noisy.tokens[..., None]).any(-1)
    at = jnp.clip((lam * LAMBDA_BINS).astype(jnp.int32), 0, LAMBDA_BINS - 1)
    return sums | {
        "lambda_sum": (lam * weight).sum(),
        "lambda_hist": (jax.nn.one_hot(at, LAMBDA_BINS) * weight[..., None]).sum((0, 1)),
        "top_k_hits": (hits * weight).sum(),
        "fed_back": weight.sum(),
    }


def nelbo_spec(config: Config) -> objective.Nelbo:
    return objective.Nelbo(
        variant=config.soft_mask.variant,
        k=config.soft_mask.k,
        noise_eps=config.objective.noise_eps,
        t_eps=config.objective.t_eps,
        stratified=config.objective.stratified,
    )


def make(config: Config, denoiser, tx) -> TrainStep:
    return TrainStep(
        denoiser, tx, nelbo_spec(config), config.soft_mask.p_sm, config.train.micro_batches,
        config.model.dropout > 0, config.optimizer.ema_decay,
    )  # fmt: skip
