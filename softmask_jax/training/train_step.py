"""The train step of every objective: two passes with soft-masking (arXiv 2510.17206, Algorithm 1).

Draw t, x_t and the coins of the global batch; per micro-batch run pass 1 under `lax.cond`, outside the gradient, and
differentiate pass 2; then update once. Pass 2 is compiled once: rows with a single pass have lambda 0."""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from softmask_jax.config import Config
from softmask_jax.diffusion import noise, soft_masking, two_pass
from softmask_jax.diffusion.noise import Stream
from softmask_jax.diffusion.objective import Noisy, Objective
from softmask_jax.distributed import sharding
from softmask_jax.models import families
from softmask_jax.models.denoiser import Denoiser
from softmask_jax.training import optimizer, train_state
from softmask_jax.training.train_state import TrainState, whole

BINS = 10  # of t and of lambda


class Metrics(NamedTuple):
    """Metrics of one step, on the device."""

    loss: jax.Array  # [] of the objective
    grad_norm: jax.Array  # [] before clipping
    masked: jax.Array  # [] masked positions
    two_pass: jax.Array  # [] share of rows with two passes
    xent_sum: jax.Array  # [BINS] unweighted cross-entropy of masked positions, by t
    xent_count: jax.Array  # [BINS]
    lambda_sum: jax.Array  # [] over masked positions of rows with two passes
    lambda_hist: jax.Array  # [BINS] counts over [0, 1]
    top_k_hits: jax.Array  # [] masked positions whose true token is among pass 1's top-k
    fed_back: jax.Array  # [] masked positions of rows with two passes
    finite: jax.Array  # [] bool: loss and gradients


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """Algorithm 1 of the paper; jit `train_step`, its state donated."""

    denoiser: Denoiser
    tx: optax.GradientTransformationExtraArgs
    objective: Objective
    p_sm: float  # probability of two passes
    micro_batches: int  # batch position p is in micro-batch p % micro_batches; gradients are their mean
    ema_decay: float

    def train_step(self, state: TrainState, batch: dict, root_key, coins=None) -> tuple[TrainState, Metrics]:
        """One update of the state. coins: [B] bool, or None to draw them."""
        noisy = self.objective.corrupt(batch, root_key, state.step, mask_token_id=self.denoiser.mask_token_id)
        coins = self._coins(batch, root_key, state.step) if coins is None else jnp.asarray(coins, bool)
        dropout_keys = None
        if self.denoiser.dropout:
            dropout_keys = noise.row_keys(noise.stream_key(root_key, Stream.DROPOUT, state.step), batch["rows"])
        (loss, grads), sums = self.accumulate(state, noisy, coins, dropout_keys)
        return update(self.tx, self.ema_decay, state, grads, loss, coins, sums)

    def _coins(self, batch: dict, root_key, step) -> jax.Array:
        if not self.two_passes:
            return jnp.zeros(len(batch["tokens"]), bool)
        return self.objective.coins(batch, root_key, step, p_sm=self.p_sm, micro_batches=self.micro_batches)

    @property
    def two_passes(self) -> bool:
        """Whether any row ever gets a second pass."""
        return self.objective.soft_mask.on and self.p_sm > 0.0

    def accumulate(self, state: TrainState, noisy: Noisy, coins, dropout_keys=None):
        """((loss, gradient), sums for the metrics): means, and sums, of `gradient` over the micro-batches.

        The mesh's data axes are mapped by hand: a device's gradients stay its own until they are summed, once a step.
        The compiler would sum them in every micro-batch, and a table's gradient once for each of its reads.

        One sum over both axes: for several slices the TPU compiler makes a reduce-scatter within each, an all-reduce of
        a device's part across them and an all-gather within. Two sums would send every device's whole gradient."""
        # Strided: each device keeps its rows. The loaders' order makes micro-batches independent of the host count.
        rows = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, self.micro_batches, *x.shape[1:]), 0, 1), (noisy, coins, dropout_keys)
        )
        any_coin, mesh = rows[1].any(1), self.denoiser.mesh
        axes = sharding.DATA_AXES
        if mesh is None or all(mesh.shape[axis] == 1 for axis in axes):
            return self._accumulate(state, any_coin, rows)

        def own(*args):
            mean, sums = self._accumulate(*args)
            return jax.lax.pmean(mean, axes), jax.lax.psum(sums, axes)

        # check_vma=False: the gradients of replicated parameters would be summed where they are computed.
        in_specs = P(), P(), P(None, axes)
        (loss, grads), sums = jax.shard_map(
            own, mesh=mesh, in_specs=in_specs, out_specs=P(), axis_names=set(axes), check_vma=False
        )(state, any_coin, rows)
        # With the parameters' layout, so that the updated state keeps its own and replaces the old one in place.
        names, _ = train_state.split(self.denoiser.axes, self.denoiser.frozen)
        layout = sharding.param_shardings(mesh, names, grads)
        return (loss, jax.lax.with_sharding_constraint(grads, layout)), sums

    def _accumulate(self, state: TrainState, any_coin, rows):
        """`accumulate` over one device's rows (noisy, coins, dropout_keys), leaves [micro_batches, rows, ...]."""
        gradient = jax.jit(self.gradient)  # traced once
        first = jax.tree.map(lambda x: x[0], (any_coin, *rows))
        if self.micro_batches == 1:
            return gradient(state, *first)

        def add(total, micro_batch):
            return jax.tree.map(jnp.add, total, gradient(state, *micro_batch)), None

        # Start from zeros: the network is compiled once.
        shapes = jax.eval_shape(gradient, state, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (mean, sums), _ = jax.lax.scan(add, zeros, (any_coin, *rows))
        return jax.tree.map(lambda x: x / self.micro_batches, mean), sums

    def gradient(self, state: TrainState, any_coin, noisy: Noisy, coins, dropout_keys=None):
        """((loss, its gradient), sums for the metrics) of one micro-batch; the loss is a mean over rows.
        any_coin: whether one of the micro-batch's rows, on any device, has two passes."""
        params, soft_mask = whole(state.params, state.frozen), self.objective.soft_mask
        feedback, scale = None, 1.0
        if self.two_passes:
            # Pass 1; skipped where no row of the micro-batch needs it.
            keys = pass_keys(dropout_keys, 0)
            pass_1 = two_pass.feedback_if(any_coin, self.denoiser, soft_mask, params, noisy, dropout_keys=keys)
            feedback, scale = jax.lax.stop_gradient(pass_1), coins.astype(jnp.float32)

        def loss(trained):
            merged, keys = whole(trained, state.frozen), pass_keys(dropout_keys, 1)
            nll = two_pass.token_nll(self.denoiser, soft_mask, merged, noisy, feedback, scale, dropout_keys=keys)
            return (noisy.weights * nll).sum(-1).mean(), nll

        (value, nll), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return (value, grads), metric_sums(params, noisy, nll, feedback, scale)


def pass_keys(dropout_keys: jax.Array | None, number: int) -> jax.Array | None:
    """[B] keys of a pass from those of the rows."""
    return None if dropout_keys is None else jax.vmap(lambda key: jax.random.fold_in(key, number))(dropout_keys)


def update(tx, ema_decay: float, state: TrainState, grads, loss, coins, sums: dict) -> tuple[TrainState, Metrics]:
    """One optimiser update; sums: of `metric_sums` over all micro-batches."""
    grad_norm = optax.global_norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, soft_masked=coins.any())
    params = optax.apply_updates(state.params, updates)
    ema = optimizer.ema_update(state.ema, params["backbone"], state.step + 1, ema_decay)
    share, finite = coins.mean(dtype=jnp.float32), jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    metrics = Metrics(loss=loss, grad_norm=grad_norm, two_pass=share, finite=finite, **sums)
    return TrainState(state.step + 1, params, ema, opt_state, state.frozen), metrics


def metric_sums(params: dict, noisy: Noisy, nll, feedback, scale) -> dict:
    """Sums for `Metrics` of one micro-batch. nll: [B L], 0 at known tokens; scale: [B] coins that multiply lambda."""
    count = noisy.masked.sum(-1, dtype=jnp.float32)
    bins = jnp.clip((noisy.t * BINS).astype(jnp.int32), 0, BINS - 1)
    sums = {
        "masked": count.sum(),
        "xent_sum": jnp.zeros(BINS).at[bins].add(nll.sum(-1)),
        "xent_count": jnp.zeros(BINS).at[bins].add(count),
    }
    if feedback is None:
        zeros = dict.fromkeys(("lambda_sum", "top_k_hits", "fed_back"), jnp.zeros(()))
        return sums | zeros | {"lambda_hist": jnp.zeros(BINS)}
    weight = jnp.where(noisy.masked, scale[:, None], 0.0)
    lam = soft_masking.mix_weight(feedback.neg_entropy, soft_masking.effective(params["soft_mask"]))
    hits = (feedback.token_ids == noisy.x0[..., None]).any(-1)
    at = jnp.clip((lam * BINS).astype(jnp.int32), 0, BINS - 1)
    return sums | {
        "lambda_sum": (lam * weight).sum(),
        "lambda_hist": (jax.nn.one_hot(at, BINS) * weight[..., None]).sum((0, 1)),
        "top_k_hits": (hits * weight).sum(),
        "fed_back": weight.sum(),
    }


def make(config: Config, denoiser: Denoiser, tx) -> TrainStep:
    """The train step of a config's family."""
    objective, train = families.of(config.model.kind).objective(config), config.train
    return TrainStep(denoiser, tx, objective, config.soft_mask.p_sm, train.micro_batches, config.optimizer.ema_decay)
