"""Soft-masking's feedback from dense logits."""
import jax
import jax.numpy as jnp

from softmask_jax.diffusion.soft_masking import Feedback


def feedback_from_logits(logits: jax.Array, k: int) -> Feedback:
    """The feedback of dense logits [B L V]."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    top_logits, token_ids = jax.lax.top_k(logits, k)
    neg_entropy = jnp.sum(jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p), axis=-1)
    return Feedback(token_ids.astype(jnp.int32), top_logits, neg_entropy)
