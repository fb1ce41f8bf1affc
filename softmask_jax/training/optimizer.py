"""AdamW with a learning rate for each group of parameters (arXiv 2510.17206); clipping over all of them; EMA."""
import jax
import jax.numpy as jnp
import optax

from softmask_jax.config import Optimizer
from softmask_jax.diffusion.soft_masking import PROJECTION

GROUPS = ("backbone", "soft_mask")


def learning_rate(peak: float, config: Optimizer, steps: int) -> optax.Schedule:
    """peak * n / warmup_steps for the n-th update, counted from 0 (the first is null), then constant or cosine."""

    def schedule(count):
        warm = jnp.minimum(1.0, count / max(config.warmup_steps, 1)) if config.warmup_steps else 1.0
        if config.schedule == "constant":
            return peak * warm
        done = jnp.clip((count - config.warmup_steps) / max(steps - config.warmup_steps, 1), 0.0, 1.0)
        return peak * warm * 0.5 * (1.0 + jnp.cos(jnp.pi * done))

    return schedule


def labels(params: dict) -> dict:
    """The group of every parameter: the key at the top, but a projection beside the soft-masking scalars learns as the
    network's weights do. ValueError names the parameters of no group."""
    tree = jax.tree_util
    paths = tree.tree_map_with_path(lambda path, _: tree.keystr(path, simple=True, separator="/"), params)
    groups = {path: path.split("/")[0] for path in jax.tree.leaves(paths)}
    groups |= {path: "backbone" for path in groups if path == f"soft_mask/{PROJECTION}"}
    if unmatched := [path for path, group in groups.items() if group not in GROUPS]:
        raise ValueError(f"No optimizer group ({', '.join(GROUPS)}) has {', '.join(unmatched)}.")
    return jax.tree.map(groups.get, paths)


def make(config: Optimizer, steps: int) -> optax.GradientTransformationExtraArgs:
    """The whole update; with `update(..., soft_masked=False)` (no gradient) the soft-masking scalars and their Adam
    state stay: PyTorch skips such a parameter, and stale momentum would move it."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    adam_with_decay = optax.chain(adam, optax.add_decayed_weights(config.weight_decay))
    scalars = optax.conditionally_mask(adam, lambda step, soft_masked, **_: soft_masked, forward_extra_args=True)
    peaks = {"backbone": config.learning_rate, "soft_mask": config.sm_learning_rate}
    rates = {name: optax.scale_by_learning_rate(learning_rate(peak, config, steps)) for name, peak in peaks.items()}
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition({"backbone": adam_with_decay, "soft_mask": scalars}, labels),
        optax.partition(rates, labels),
    )


def ema_update(ema, values, updates: jax.Array, decay: float):
    """ema <- d ema + (1 - d) values with d = min(decay, (1 + n) / (10 + n)), n updates done, counted from 1."""
    n = updates.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + n) / (10.0 + n))
    return jax.tree.map(lambda old, new: old - (1.0 - d) * (old - new), ema, values)
