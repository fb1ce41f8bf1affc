"""Token histories of rows that come to an end token: when they stop, and when the masks behind become that token."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.diffusion.vocab.head import Head
from softmask_jax.samplers import BlockSampler, Constraints, DreamSampler
from tests.helpers.dream_denoiser import model

# E ends a text; the last token is the mask.
WORDS = "abcdefE."
# By the first token of a row: what is predicted for every position, and the order from sure to unsure.
PREDICTED = {"a": ("aEcdefa", "0123456"), "b": ("bEcEefa", "0412356"), "c": ("cacdefE", "0123456"),
             "d": ("d.Eabca", "0312456")}  # fmt: skip
ROWS = ("a......", "b......", "c......", "d..a...")
BLOCKS = {"block_length": 3, "prompt_length": 1, "cache": "none"}


def denoiser():
    logits = np.zeros((len(PREDICTED), 7, len(WORDS)), np.float32)
    for row, (words, order) in enumerate(PREDICTED.values()):
        for position, rank in enumerate(order):
            logits[row, position, WORDS.index(words[position])] = 9 - int(rank)
    return dataclasses.replace(
        model(), embed=lambda backbone, tokens: jnp.asarray(logits)[tokens[:, 0]],
        trunk=lambda backbone, x, cache=None: (x, cache), mask_token_id=len(WORDS) - 1, vocab_size=len(WORDS),
        head=lambda backbone: Head(jnp.eye(len(WORDS)), None, len(WORDS), len(WORDS) - 1, False))  # fmt: skip


# The histories are those that version 890e5e4 recorded.
@pytest.mark.parametrize("sampler, options, history, tokens, calls", [
    (DreamSampler, {"tokens_per_step": 1},
     ["aE..... b.c.... ca..... d.Ea...", "aE..... b.cE... cac.... d.Eab..", "aE..... b.cEe.. cacd... d.Eabc.",
      "aE..... bEcEe.. cacde.. d.Eabca", "aE..... bEcEe.. cacdef. d.Eabca", "aE..... bEcEe.. cacdefE d.Eabca",
      "aE..... bEcEe.. cacdefE d.Eabca"], "aEEEEEE bEcEeEE cacdefE d.Eabca", [1, 4, 6, 5]),
    (DreamSampler, {"steps": 6},
     ["a...... b...... c...... d..a...", "aE..... b.c.... ca..... d..a...", "aE..... b.cE... cac.... d.Ea...",
      "aE..... b.cEe.. cacd... d.Ea...", "aE..... bEcEe.. cacde.. d.Ea...", "aE..... bEcEe.. cacdefE d.Eabca"],
     "aEEEEEE bEcEeEE cacdefE d.Eabca", [2, 5, 6, 6]),
    (BlockSampler, BLOCKS | {"tokens_per_step": 1, "full_call": "rule"},
     ["aEEEEEE b.c.... ca..... d.Ea...", "aEEEEEE b.cE... cac.... d.EaEEE", "aEEEEEE bEcEEEE cacd... d.EaEEE",
      "aEEEEEE bEcEEEE cacde.. d.EaEEE", "aEEEEEE bEcEEEE cacdef. d.EaEEE", "aEEEEEE bEcEEEE cacdefE d.EaEEE"],
     "aEEEEEE bEcEEEE cacdefE d.EaEEE", [1, 3, 6, 2]),
    (BlockSampler, BLOCKS | {"steps": 6, "full_call": "rule"},
     ["a...... b...... c...... d..a...", "aEEEEEE b.c.... ca..... d..a...", "aEEEEEE bEcEEEE cacd... d.EaEEE",
      "aEEEEEE bEcEEEE cacd... d.EaEEE", "aEEEEEE bEcEEEE cacde.. d.EaEEE", "aEEEEEE bEcEEEE cacdefE d.EaEEE"],
     "aEEEEEE bEcEEEE cacdefE d.EaEEE", [2, 3, 6, 3]),
], ids=["a token a step", "time grid", "blocks, a token a step", "blocks, time grid"])  # fmt: skip
def test_masks_behind_an_end_token_become_it_in_blocks_at_once_and_without_blocks_in_the_result(
    sampler, options, history, tokens, calls,
):  # fmt: skip
    ends = Constraints(end_token_ids=(WORDS.index("E"),))
    run = sampler(denoiser(), alg="maskgit_plus", top_k=None, stop_at_end=True, constraints=ends, **options)
    masked = jnp.asarray([[WORDS.index(word) for word in row] for row in ROWS])
    out = jax.jit(run)({"backbone": {}, "soft_mask": {}}, None, masked)

    def text(ids) -> str:
        return " ".join("".join(WORDS[i] for i in row) for row in np.asarray(ids))

    assert [text(step) for step in out.history] == history
    assert text(out.tokens) == tokens and out.row_calls.tolist() == calls
