"""Masks over which a likelihood is averaged, and their weights; without JAX, for the command line."""
import math

import numpy as np

# Masks of one batch of LLaDA's reference, whose sizes are spread evenly.
BATCH = 16


def masks(count: int, draws: int, seed: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks over `count` tokens [D count] bool, none empty, and weights of their summed log-probabilities [D]: all
    2^count - 1 sets, which is exact, if `draws` allows; else `draws` sets of stratified sizes."""
    if count <= draws.bit_length() and 2**count - 1 <= draws:
        masked = (np.arange(1, 2**count)[:, None] >> np.arange(count)) & 1 == 1
        sizes = masked.sum(1)
        return masked, np.array([1 / (size * math.comb(count, size)) for size in sizes.tolist()])
    random = np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64)))
    shares = (np.arange(draws) + random.random()) / draws
    sizes = np.minimum((shares * count).astype(np.int64), count - 1) + 1
    ranks = random.random((draws, count)).argsort(1).argsort(1)
    return ranks < sizes[:, None], count / (sizes * draws)


def llada_masks(count: int, draws: int, seed: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """As `masks`, drawn as LLaDA's reference does, in batches of at most `BATCH`; a single one over a single token."""
    draws = 1 if count == 1 else draws
    batch = math.gcd(draws, BATCH)
    random = np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64)))
    first = random.integers(1, count + 1, draws // batch)
    return spread_masks(first, random.permuted(np.tile(np.arange(count), (len(first), batch, 1)), axis=-1))


def spread_masks(first: np.ndarray, orders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks [N * b n] bool and their weights [N * b] of LLaDA's reference: in each of N batches row j masks
    first [N] + j n / b tokens, counted round after n, and orders [N b n] says which ones."""
    _, batch, count = orders.shape
    # As torch.linspace, which steps from both ends, in float32: halves are rounded to even.
    first, index = np.asarray(first)[:, None], np.arange(batch, dtype=np.float32)
    first, last = (x.astype(np.float32) for x in (first, first + (batch - 1) * (count / batch)))
    step = (last - first) / np.float32(max(batch - 1, 1))
    sizes = np.where(index < batch // 2, first + step * index, last - step * (batch - 1 - index))
    sizes = (np.round(sizes).astype(np.int64) - 1) % count + 1
    masked = np.take_along_axis(np.arange(count) < sizes[..., None], orders, -1)
    return masked.reshape(-1, count), (count / sizes / sizes.size).reshape(-1)
