"""Block decoding as a loop in NumPy, a row at a time and without padding: a small Dream that keeps keys and values."""
import functools
from typing import NamedTuple

import numpy as np

from softmask_jax.diffusion import soft_masking
from softmask_jax.samplers.blocks import BlockSampler
from softmask_jax.samplers.commit import unmask_shares
from tests.helpers import dream_model
from tests.helpers.dream_model import LAYERS, MASK, VOCAB
from tests.samplers.test_dream_draw import softmax, sorted_filter


@functools.cache
def weights():
    import jax

    return jax.tree.map(np.asarray, dream_model.params())


def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + dream_model.config().norm_eps) * scale


def rotated(x, positions):
    config = dream_model.config()
    angles = positions[:, None] * config.rope_base ** (-np.arange(0, config.head_width, 2) / config.head_width)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    low, high = np.split(x, 2, -1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


def forward(x, start: int, kept: list | None):
    """Embeddings [S D] of the positions from `start` on -> (hidden [S D], keys and values of every layer)."""
    config, layers, keeping = dream_model.config(), weights()["layers"], []
    positions, group = start + np.arange(len(x)), config.num_heads // config.num_kv_heads
    for i in range(LAYERS):
        def apply(name, y):
            leaves = layers[name]
            return y @ leaves["kernel"][i] + (leaves["bias"][i] if "bias" in leaves else 0)

        inside = norm(x, layers["attn_norm"]["scale"][i])
        q, k, v = (apply(name, inside).reshape(len(x), -1, config.head_width) for name in "qkv")
        q, k = rotated(q, positions), rotated(k, positions)
        if kept is not None:
            keys, values = (whole.copy() for whole in kept[i])
            keys[positions], values[positions] = k, v
            k, v = keys, values
        keeping.append((k, v))
        k, v = k.repeat(group, 1), v.repeat(group, 1)
        weight = softmax(np.einsum("skd,lkd->ksl", q, k) / np.sqrt(config.head_width))
        x = x + apply("o", np.einsum("ksl,lkd->skd", weight, v).reshape(len(x), -1))
        inside = norm(x, layers["mlp_norm"]["scale"][i])
        gate = apply("gate", inside)
        x = x + apply("down", gate / (1 + np.exp(-gate)) * apply("up", inside))
    return norm(x, weights()["final_norm"]["scale"]), keeping


def soft_inputs(sampler: BlockSampler, scalars: dict, row, logits, ratio: float):
    """Embeddings [L D] of a row whose masks carry the predictions logits [L V], NaN where there is none."""
    table = weights()["embed"]["table"]
    x = table[row].copy()
    settings, values = sampler.soft_mask, soft_masking.effective(scalars)
    if not settings.on:
        return x
    scale = {"none": 1.0, "linear": ratio, "stepwise": float(ratio > 0.5)}[settings.schedule]
    for i in np.flatnonzero((row == MASK) & ~np.isnan(logits[:, 0])):
        p = softmax(logits[i])
        sure = float(values.steepness) * ((p * np.log(p + 1e-10)).sum() - float(values.centre))
        weight = scale * float(values.scale) / (1 + np.exp(-sure))
        top = np.argsort(-logits[i], kind="stable")[: settings.k]
        x[i] = (1 - weight) * x[i] + weight * softmax(logits[i][top]) @ table[top]
    return x


class Plain(NamedTuple):
    tokens: np.ndarray
    history: list
    positions: int
    filled: int


def count_of(sampler: BlockSampler, sure, index: int, blocks: int) -> int:
    """How many of the confidences, highest first, are committed."""
    if sampler.alg == "confidence_threshold":
        return max((sure >= sampler.threshold).sum(), 1)
    if sampler.alg == "confidence_factor":
        fits = [n for n in range(1, len(sure) + 1) if (n + 1) * (1 - sure[n - 1]) < sampler.factor]
        return max([n for n in fits if fits[:n] == list(range(1, n + 1))], default=1)
    if sampler.tokens_per_step:
        return sampler.tokens_per_step
    return int(np.float32(len(sure)) * unmask_shares(sampler.steps // blocks, sampler.eps)[index])


def decode(sampler: BlockSampler, scalars: dict, row, pads: int = 0, gumbel=None, order=None, mask_bias=0.0) -> Plain:
    """One row [L] behind `pads` pads; gumbel [T L V] and order [T L] by call. Needs nothing of the sampler but options.

    mask_bias: added to the logit of the mask.
    """
    row, prompt = np.array(row[pads:]), sampler.prompt_length - pads
    length, size = len(row), sampler.block_length
    blocks = -(-(length - prompt) // size)
    grid = sampler.alg in ("maskgit_plus", "topk_margin", "entropy") and not sampler.tokens_per_step
    most = sampler.steps // blocks if grid else size + 1
    fillable = (row == MASK) & (np.arange(length) >= prompt)
    total, history, positions, filled, logits = fillable.sum(), [], 0, 0, np.full((length, VOCAB), np.nan)

    def finished(begin) -> bool:
        ends = np.flatnonzero(np.isin(row, sampler.constraints.end_token_ids if sampler.stop_at_end else ()) & fillable)
        if len(ends) and not (row[begin : ends[0]] == MASK).any():
            behind = (row == MASK) & fillable & (np.arange(length) > ends[0])
            row[behind] = row[ends[0]]
            return True
        return False

    for begin in range(prompt, length, size):
        end, kept, before = min(begin + size, length), None, None
        for index in range(most):
            masks = begin + np.flatnonzero(row[begin:end] == MASK)
            if not len(masks) or finished(begin):
                break
            low, high = 0, length
            if kept is not None and sampler.cache != "none":
                low, high = begin, end if sampler.cache == "dual" else length
            ratio = ((row == MASK) & fillable).sum() / total
            hidden, keeping = forward(soft_inputs(sampler, scalars, row, logits, ratio)[low:high], low,
                                      None if low == 0 and high == length else kept)
            shifted = np.concatenate([hidden[:1], hidden[:-1]])
            if kept is None:
                kept, before = keeping, shifted[begin]
            elif sampler.cache != "none" and not sampler.compat:
                shifted[0] = before
            seen = np.full((length, VOCAB), -np.inf)
            seen[low:high] = (shifted @ weights()["head"]["weight"].T)[:, :VOCAB]
            seen[:, MASK] += mask_bias
            at, call = masks, len(history)
            first = index == 0 and sampler.full_call == "first" and not (grid and most == 1)
            if first:
                at = masks[:1]
            y = seen[at].copy()
            if sampler.suppress_mask:
                y[:, MASK] = -np.inf
            y = sorted_filter(y[None] / (sampler.temperature or 1), sampler.top_p, sampler.top_k)[0]
            drawn = (y + gumbel[call, at + pads] if sampler.temperature else y).argmax(-1)
            p = softmax(y)
            top = np.sort(p, -1)
            alg = "entropy" if grid and sampler.compat else sampler.alg
            sure = {"topk_margin": top[:, -1] - top[:, -2], "entropy": (p * np.log(p + 1e-10)).sum(-1)}.get(
                alg, p[np.arange(len(at)), drawn])
            if not grid:
                at, drawn, sure = (z[drawn != MASK] for z in (at, drawn, sure))
            by = sure / sampler.alg_temp + order[call, at + pads] if sampler.alg_temp else sure
            count = 1 if first else count_of(sampler, -np.sort(-sure), index, blocks)
            chosen = np.argsort(-by, kind="stable")[:count]
            # What the masks carry into the next call, those of this block that were predicted and later ones.
            told = (row == MASK) & fillable & (np.arange(length) >= max(low, begin)) & (np.arange(length) < high)
            logits[told] = seen[told]
            row[at[chosen]] = drawn[chosen]
            # A short last block is computed together with what lies before it.
            positions += size if (low, high) == (begin, end) else high - low
            filled += (drawn[chosen] != MASK).sum()
            finished(begin)
            history.append(row.copy())
            if not grid and not first and not len(chosen):
                break
        if finished(end):
            if history:
                history[-1] = row.copy()
            break
    return Plain(row, history, positions, filled)
