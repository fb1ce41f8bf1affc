"""A denoising made up for tests of the viewer: given tokens, re-masking, exchanged tokens, a step without a call."""
import numpy as np

from softmask_jax.data.tokenizers.base import Tokenizer
from softmask_jax.samplers.result import Generated, Trace

STEPS, LENGTH, K = 6, 40, 3
HOSTILE = "</script><img src=x onerror=document.title='owned'>"
WORDS = (
    *(f" word{i}" for i in range(20)), "\n", "        ", HOSTILE, "<!--", "\u202e", "\t", "\u00e9", "\u4e2d", "&amp;", "a" * 80, "\u0301",
)  # fmt: skip


class WordTokenizer(Tokenizer):
    """A word an id, then end and mask."""

    kind = "words"
    bos_id = eos_id = len(WORDS)
    mask_token_id = len(WORDS) + 1
    vocab_size = len(WORDS) + 2

    def _decode_run(self, run: np.ndarray, follows_mask: bool) -> str:
        return "".join(WORDS[id_] for id_ in run.tolist())

    def fingerprint(self) -> str:
        return "words"


MASK = WordTokenizer.mask_token_id


def generated(*, rows: int = 2, steps: int = STEPS, length: int = LENGTH, k: int = K, spare: int = 2, soft: bool = True,
              largest: float = 0.3, given: int = 4, vocabulary: int = len(WORDS), mask: int = MASK) -> Generated:  # fmt: skip
    """What a sampler may return that could have made `spare` steps more.

    Position `given` is re-masked in step 3 (as of 1) and position given + 1 exchanged for another token in step 4; the
    network isn't called in step 2. Every word is used.
    """
    rng = np.random.default_rng(0)
    final = rng.permuted(np.tile(np.resize(np.arange(vocabulary), length), (rows, 1)), axis=1).astype(np.int32)
    when = rng.integers(1, steps + 1, (rows, length))  # the step that commits a position
    when[:, :given], when[:, given : given + 2] = 0, 1
    seen = np.stack([np.where(when <= frame, final, mask) for frame in range(steps + 1)]).astype(np.int32)
    if steps >= 5:
        seen[3, :, given] = mask
        seen[:4, :, given + 1] = np.where(seen[:4, :, given + 1] == mask, mask, (seen[:4, :, given + 1] + 1) % vocabulary)
    made = steps + spare
    masked = seen[:-1] == mask
    weight = np.zeros((made, rows, length), np.float32)
    weight[1:steps] = np.where(masked[1:], rng.uniform(0, largest, (steps - 1, rows, length)), 0) if soft else 0
    shares = np.sort(rng.dirichlet(np.ones(k), (made, rows, length)).astype(np.float32))[..., ::-1]
    neg_entropy = np.zeros((made, rows, length), np.float32)
    neg_entropy[:steps] = np.where(masked, -rng.uniform(0, 3, masked.shape), 0)
    tokens = np.concatenate([seen[:-1], np.repeat(seen[-1:], spare, 0)])
    called = np.arange(made) != 1
    calls = np.int32(called[:steps].sum())
    return Generated(
        tokens=seen[-1], history=None, steps=np.int32(steps), calls=calls, row_calls=np.full(rows, calls),
        positions=np.full(rows, length * calls, np.float32), filled=(seen[0] == mask).sum(1), finite=np.ones(rows, bool),
        trace=Trace(tokens, called, weight, rng.integers(0, vocabulary, shares.shape, np.int32), shares, neg_entropy),
    )  # fmt: skip
