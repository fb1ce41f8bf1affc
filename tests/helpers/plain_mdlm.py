"""MDLM's samplers as a plain loop."""
import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.diffusion import soft_masking
from softmask_jax.samplers import MDLMSampler
from tests.helpers import golden_model


def dense_loop(part: MDLMSampler, params, tokens, gumbel) -> np.ndarray:
    """The sampler in a Python loop over steps with dense predictions and q(x_s) of the papers: tokens [B L]."""
    model, mask, variant = part.denoiser, golden_model.MASK, part.soft_mask.variant
    table = np.asarray(model.embedding(params["backbone"]), np.float64)
    head = model.head(params["backbone"])
    weight, bias = (np.asarray(x, np.float64)[: golden_model.VOCAB] for x in (head.weight, head.bias))
    trunk = jax.jit(lambda x: model.trunk(params["backbone"], x)[0])
    scalars = jax.tree.map(float, soft_masking.effective(params["soft_mask"]))
    times, dt = np.linspace(1, part.eps, part.steps + 1).astype(np.float32), (1 - part.eps) / part.steps
    rates = part.transition(times[:-1], dt)
    tokens, before, state, confidence = np.array(tokens), None, None, np.zeros(tokens.shape)

    def predict():
        nonlocal state
        masked = tokens == mask
        x = table[tokens]
        if before is not None and variant != "none":
            log_p = np.where(before == -np.inf, -1e30, before)
            shares = np.exp(log_p)
            if variant == "full":
                shares = np.exp(log_p / scalars.temperature)
                shares /= shares.sum(-1, keepdims=True)
            entropy = -(shares * np.log(shares + 1e-10)).sum(-1)
            lam = scalars.scale / (1 + np.exp(-scalars.steepness * (-entropy - scalars.centre)))
            if variant == "topk":
                least = np.sort(shares, -1)[..., -part.soft_mask.k, None]
                shares = np.where(shares >= least, shares, 0)
                shares /= shares.sum(-1, keepdims=True)
            lam = np.where(masked, lam, 0)[..., None]
            if variant == "hidden":
                x = x + lam * (state @ np.asarray(params["soft_mask"]["projection"], np.float64))
            else:
                x = (1 - lam) * x + lam * (shares @ table[: golden_model.VOCAB])
        state = np.asarray(trunk(jnp.asarray(x, jnp.float32)), np.float64)
        z = state @ weight.T + bias
        z[..., mask] = -np.inf
        z = np.where(masked[..., None], z, np.where(np.arange(z.shape[-1]) == tokens[..., None], 0, -np.inf))
        z -= z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    for step in range(part.steps):
        before = predict()
        masked, p = tokens == mask, np.exp(before)
        if part.nucleus_p < 1:
            order = np.argsort(-p, -1)
            kept = np.cumsum(np.take_along_axis(p, order, -1), -1) <= part.nucleus_p
            kept[..., 0] = True
            keep = np.zeros(p.shape, bool)
            np.put_along_axis(keep, order, kept, -1)
            p = np.where(keep, p, 0)
            p /= p.sum(-1, keepdims=True)
        remask, take, stay = (np.broadcast_to(np.float64(rate[step]), tokens.shape) for rate in rates)
        if part.transition.by_confidence and not masked.all():
            share = np.where(masked, 0, np.exp(-confidence))
            remask = remask * share / share.sum(-1, keepdims=True).clip(1e-30)
        elif part.transition.by_confidence:
            remask = np.zeros(tokens.shape)
        q = p * np.where(masked, take, 1 - remask)[..., None]
        q[..., mask] = np.where(masked, stay, remask)
        with np.errstate(divide="ignore"):
            after = (np.log(q) + gumbel[step]).argmax(-1)
        new = masked & (after != mask)
        confidence[new] = np.take_along_axis(p, after[..., None], -1)[..., 0][new]
        tokens = after
    return np.where(tokens == mask, predict().argmax(-1), tokens)
