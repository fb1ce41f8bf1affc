"""LLaDA's samplers in tests: recorded runs as (sampler, call), and the same loop in NumPy."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.diffusion import soft_masking
from softmask_jax.samplers import BlockSampler, Constraints, Draws
from tests.golden import load, meta
from tests.helpers import llada_model
from tests.samplers.test_dream_draw import softmax

MASK, EOS, EOT = 291, 289, 297
SCALARS = soft_masking.init_scalars(scale=0.9, centre=-3, steepness=1.5)
CACHES = {"generate_with_dual_cache": "dual", "generate_with_prefix_cache": "prefix"}


@functools.cache
def compiled(sampler):
    return jax.jit(sampler)


def recorded(name: str) -> tuple[dict, dict, BlockSampler, tuple]:
    """(arrays, settings, the sampler that repeats the recorded run, its tokens, attention mask and draws)."""
    z, about = load(name), meta(name)
    more, gumbel = ((0, 0), (0, about["gen_length"])), None
    mask = np.pad(z["attention_mask"], more, constant_values=1) if "attention_mask" in z else None
    if "gumbel_uniform_k" in z:
        gumbel = -np.log(-np.log((z["gumbel_uniform_k"] + 0.5) / 65536))
    options = {name: about[name] for name in ("cfg_scale", "logits_eos_inf", "confidence_eos_eot_inf") if name in about}
    sampler = BlockSampler(
        llada_model.model(about["checkpoint"].split()[0]), alg=about["remasking"], steps=about["steps"],
        prompt_length=z["prompt"].shape[1], block_length=about["block_length"], temperature=about["temperature"],
        cache=CACHES.get(about.get("function"), "none"), threshold=about.get("threshold"), top_k=None, compat=True,
        constraints=Constraints(end_token_ids=(EOS, EOT)), **options,
    )  # fmt: skip
    draws = Draws(coins=z.get("remask_uniforms"), gumbel=gumbel)
    tokens = np.pad(z["prompt"], more, constant_values=MASK)
    return z, about, sampler, jax.tree.map(jnp.asarray, (tokens, mask, draws))


@functools.cache
def network(denoiser):
    @jax.jit
    def logits(params, x, attention_mask):
        layout = {} if attention_mask is None else {"segment_ids": attention_mask}
        hidden, head = denoiser.trunk(params["backbone"], x, **layout)[0], denoiser.head(params["backbone"])
        return jnp.matmul(hidden, head.weight.T, precision="highest")[..., : head.vocab_size]

    return logits


def soft_inputs(sampler, params, tokens, seen, ratio) -> np.ndarray:
    """Embeddings [B L D] of tokens whose masks carry the predictions `seen` [B L V], NaN where there is none."""
    table, settings = np.asarray(params["backbone"]["embed"]["table"]), sampler.soft_mask
    values, x = soft_masking.effective(params["soft_mask"]), table[tokens]
    for row, i in np.argwhere((tokens == MASK) & ~np.isnan(seen[..., 0])) if settings.on else ():
        scale = {"none": 1.0, "linear": ratio[row], "stepwise": ratio[row] > 0.5}[settings.schedule]
        p = softmax(seen[row, i])
        sure = float(values.steepness) * ((p * np.log(p + 1e-10)).sum() - float(values.centre))
        weight = scale * float(values.scale) / (1 + np.exp(-sure))
        top = np.argsort(-seen[row, i], kind="stable")[: settings.k]
        x[row, i] = (1 - weight) * x[row, i] + weight * softmax(seen[row, i][top]) @ table[top]
    return x


def decode(sampler: BlockSampler, params: dict, tokens, attention_mask=None, draws=Draws()) -> list[np.ndarray]:
    """The tokens after every network call; without a cache. Draws are by the batch's calls."""
    x, begin, compat = np.array(tokens), sampler.prompt_length, sampler.compat
    attended = np.ones(x.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    position, size, history = np.arange(x.shape[1]), sampler.block_length, []
    fillable = (x == MASK) & attended & (compat | (position >= begin))
    known, total, guided = x != MASK, fillable.sum(-1), sampler.cfg_scale > 0
    steps = (sampler.steps or 0) // -(-(x.shape[1] - begin) // size)
    ends, v = list(sampler.constraints.end_token_ids), sampler.denoiser.vocab_size
    seen = np.full((2, *x.shape, v), np.nan)
    while begin < x.shape[1]:
        end, index = min(begin + size, x.shape[1]), 0
        inside = fillable & (position >= begin) & (position < end)
        at_start = (inside & (x == MASK)).sum(-1)
        while index < (steps if sampler.grid else size):
            if not (compat and (sampler.grid or not index)) and not (inside & (x == MASK)).any():
                break
            halves = (x, np.where(known, MASK, x)) if guided else (x,)
            ratio, active = (fillable & (x == MASK)).sum(-1) / total, compat | (inside & (x == MASK)).any(-1)
            inputs = (soft_inputs(sampler, params, half, seen[i], ratio) for i, half in enumerate(halves))
            z = [np.asarray(network(sampler.denoiser)(params, x, attention_mask)) for x in inputs]
            told = fillable & (x == MASK) & (compat | (position >= begin)) & active[:, None]
            seen[0][told] = z[0][told]
            if guided:
                told = (halves[1] == MASK) & attended & active[:, None]
                seen[1][told] = z[1][told]
            y = z[1] + (sampler.cfg_scale + 1) * (z[0] - z[1]) if guided else z[0].copy()
            y[..., list(sampler.constraints.forbidden) + ends[: sampler.logits_eos_inf]] = -np.inf
            if not compat:
                y[..., MASK] = y[..., sampler.denoiser.used_vocab :] = -np.inf
            call = len(history)
            noisy = y / sampler.temperature + np.asarray(draws.gumbel[call]) if sampler.temperature else y
            drawn = noisy.argmax(-1)
            if sampler.confidence_eos_eot_inf:
                y[..., ends[compat and sampler.temperature > 0 :]] = -np.inf
            sure = np.take_along_axis(softmax(y), drawn[..., None], -1)[..., 0]
            sure = np.asarray(draws.coins[call]) if sampler.alg == "random" else sure
            for row in range(len(x)):
                reach = (position < end) & (compat | (position >= begin))
                may = np.flatnonzero(fillable[row] & (x[row] == MASK) & reach)
                count = at_start[row] // steps + (index < at_start[row] % steps) if steps else 0
                if sampler.threshold is not None:
                    count = max((sure[row, may] >= sampler.threshold).sum(), 1)
                best = may[np.argsort(-sure[row, may], kind="stable")[:count]]
                x[row, best] = drawn[row, best]
            history.append(x.copy())
            index += 1
        begin = end
    return history
