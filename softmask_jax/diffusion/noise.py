"""Masked diffusion's forward process (MDLM, arXiv 2406.07524) and the keyed noise behind every random choice.

Every draw depends on fold_in(root, stream, step, global row) alone: a row gets the same noise on any number of devices,
in any split into micro-batches and after a resume."""
import dataclasses
import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.config.jax_settings import checked_key


class Stream(enum.IntEnum):
    """What a key is for. Values are part of every recorded run: never renumber, only append."""

    T = 0
    MASK = 1
    COIN = 2
    DROPOUT = 3
    SAMPLE = 4
    LENGTH = 5


def stream_key(root_key: jax.Array, stream: Stream, step: jax.Array | int) -> jax.Array:
    """The key of one stream at one step (int or traced). ValueError for a root key of another implementation."""
    return jax.random.fold_in(jax.random.fold_in(checked_key(root_key), int(stream)), step)


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """One key per row: rows [B] int32, positions in the global batch, to keys [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def keyed_noise(law: Callable[[jax.Array], jax.Array], keys: jax.Array, positions: jax.Array, *,
                stream: int | None = None) -> jax.Array:
    """law(key) -> [...] at every position: on any batch, length and device a function of (row key, stream, position).

    keys [B] and positions [B L] give [B L ...], positions [B] give [B ...]. stream separates uses of the same keys."""
    if stream is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, stream)

    def at(key, position):
        return law(jax.random.fold_in(key, position))

    return jax.vmap(at if positions.ndim == 1 else jax.vmap(at, (None, 0)))(keys, positions)


def coin(key: jax.Array, p: jax.Array | float) -> jax.Array:
    """True with probability p (p = 0 never, p = 1 always): a scalar for one key, [B] for row keys [B]."""
    if key.ndim:
        return jax.vmap(coin, in_axes=(0, None))(key, p)
    return jax.random.uniform(key) < p


def shared_coins(root_key: jax.Array, step, rows: int, *, p_sm: float, micro_batches: int) -> jax.Array:
    """[rows] bool of a global batch: the rows of a micro-batch, every `micro_batches`-th one, share a coin."""
    keys = row_keys(stream_key(root_key, Stream.COIN, step), jnp.arange(micro_batches))
    return jnp.tile(coin(keys, p_sm), rows // micro_batches)


@dataclasses.dataclass(frozen=True)
class LogLinear:
    """alpha_t = 1 - (1 - eps) t for t in [0, 1], so that -log alpha_t goes up log-linearly and alpha_1 = eps."""

    eps: float = 1e-3

    def __post_init__(self):
        if not 0 <= self.eps < 1:
            raise ValueError(f"the noise schedule's eps must lie in [0, 1), got {self.eps}")

    def alpha(self, t: jax.Array) -> jax.Array:
        """Probability that a token is still itself at time t."""
        return 1 - (1 - self.eps) * t

    def loss_weight(self, t: jax.Array) -> jax.Array:
        """-alpha' / (1 - alpha), the NELBO's weight: exactly 1 / t here, without the cancellation in 1 - alpha."""
        return 1 / t


def stratified_t(keys: jax.Array, rows: jax.Array, n: int, t_eps: float = 1e-3, *,
                 stratified: bool = True) -> jax.Array:
    """Times [B] float32 in [t_eps, 1]: row i of the global batch of n draws from the i-th of n equal strata, which
    lowers the variance of the loss; stratified=False: from the whole range. keys [B]: of rows [B] int32."""
    uniforms = jax.vmap(jax.random.uniform)(keys)
    if stratified:
        uniforms = (uniforms + (rows % n).astype(jnp.float32)) / n
    return (1 - t_eps) * uniforms + t_eps


def corrupt(tokens: jax.Array, alpha_t: jax.Array, uniforms: jax.Array, mask_token_id: int) -> jax.Array:
    """x_t [B L] from x_0 = tokens [B L]: masked where uniforms [B L] in [0, 1) fall below 1 - alpha_t [B]."""
    return jnp.where(uniforms < 1 - alpha_t[:, None], jnp.asarray(mask_token_id, tokens.dtype), tokens)


def sampling_times(steps: int, eps: float = 1e-5) -> np.ndarray:
    """The samplers' time grid, from 1 down to eps in `steps` equal steps: [steps + 1] float32."""
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, got {steps}")
    # On the host, rounded once from float64: the same to the last bit on every device.
    return np.linspace(1.0, eps, steps + 1).astype(np.float32)
