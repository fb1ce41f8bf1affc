"""Dream's sampler where several tokens are committed at once, and where tokens end or must not appear."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.samplers import Constraints, DreamSampler, SoftMask, diffusion_generate
from tests.golden import load, meta
from tests.helpers.dream_denoiser import PAD, logits, model, params, unequal_rows
from tests.helpers.dream_model import MASK, VOCAB
from tests.samplers.test_dream_draw import softmax, sorted_filter

SOFT = SoftMask("topk", 3)
PARALLEL = (
    "dream_generate/fastdllm_parallel_nocache_thr0.25.npz",
    "dream_generate/fastdllm_parallel_nocache_thr0.9.npz",
)


@pytest.mark.parametrize("name", PARALLEL)
def test_a_threshold_commits_what_the_recorded_one_commits(name):
    z, about = load(name), meta(name)
    out = diffusion_generate(model(), params(), z["prompt"], max_new_tokens=about["max_new_tokens"], pad_token_id=PAD,
                             alg=about["alg"], steps=about["steps"], threshold=about["threshold"])
    calls = int(out.calls)
    assert calls == about["forwards"] == int(out.row_calls[0])
    np.testing.assert_array_equal(out.history[:calls], z["history"])
    np.testing.assert_array_equal(out.tokens, z["final"])
    assert out.tokens_per_call[0] == pytest.approx(about["max_new_tokens"] / calls)


@functools.cache
def filled(**options):
    """Rows with 16, 11 and 4 masks."""
    sampler = DreamSampler(model(), suppress_mask=True, trace=True, **options)
    return jax.jit(sampler)(params(), None, jnp.asarray(unequal_rows()))


def test_a_number_of_tokens_a_step_needs_as_many_calls_as_it_takes():
    out = filled(alg="maskgit_plus", tokens_per_step=3)
    np.testing.assert_array_equal(out.row_calls, [6, 4, 2])
    assert int(out.calls) == int(out.steps) == 6 and not np.any(np.asarray(out.tokens) == MASK)


@pytest.mark.parametrize("options", [{"alg": "confidence_threshold", "threshold": 0.02, "steps": None},
                                     {"alg": "confidence_factor", "factor": 2.05}], ids=lambda options: options["alg"])
def test_parallel_decoding_takes_every_mask_that_is_sure_enough_and_one_at_least(options):
    out = filled(**options)
    seen = np.concatenate([np.asarray(out.trace.tokens)[: int(out.steps)], out.tokens[None]])
    for before, after in zip(seen, seen[1:]):
        p = softmax(sorted_filter(suppressed(before), None, 50)).max(-1)
        for row in range(3):
            masked = before[row] == MASK
            sure = np.sort(p[row][masked])[::-1]
            if options["alg"] == "confidence_threshold":
                count = (sure >= options["threshold"]).sum()
            else:
                ranks = np.arange(1, len(sure) + 1)
                count = max((n for n in ranks if (n + 1) * (1 - sure[n - 1]) < options["factor"]), default=0)
            taken = masked & (after[row] != MASK)
            assert taken.sum() == min(max(count, 1), masked.sum())
            assert not taken.any() or p[row][taken].min() >= sure[taken.sum() - 1]
    assert int(out.calls) < 16


def suppressed(tokens) -> np.ndarray:
    y = np.asarray(logits(model().embed(params()["backbone"], jnp.asarray(tokens))))
    return np.where(np.arange(VOCAB) == MASK, -np.inf, y)


@pytest.mark.parametrize("options", [{"alg": "confidence_threshold"}, {"alg": "maskgit_plus", "tokens_per_step": 2}],
                         ids=lambda options: options["alg"])  # fmt: skip
def test_masks_that_are_predicted_take_no_tokens_place_but_on_the_grid(options):
    def head(backbone):
        # The mask is predicted here and there, and more surely than any token.
        likely = jnp.zeros(backbone["head"]["weight"].shape[0]).at[MASK].set(4.0)
        return dataclasses.replace(model().head(backbone), bias=likely)

    out = jax.jit(DreamSampler(dataclasses.replace(model(), head=head), **options, steps=None))(params(), None, unequal_rows())
    at_start, left = ((tokens == MASK).sum(-1) for tokens in (unequal_rows(), np.asarray(out.tokens)))
    np.testing.assert_array_equal(out.filled, at_start - left)
    # Every call but the last one commits something; that one finds that nothing but masks is predicted.
    assert 0 < left.sum() < at_start.sum() - 3 and np.all(np.asarray(out.row_calls) <= out.filled + (left > 0))


def test_a_mask_that_begins_a_row_is_filled_the_same_behind_padding():
    row = np.array([[MASK, 9, MASK, MASK, 17]])
    fill = jax.jit(DreamSampler(model(), SOFT, steps=3, alg="entropy", suppress_mask=True, history=False))
    alone = np.asarray(fill(params(), None, row).tokens)
    padded = np.pad(row, ((0, 0), (4, 0)), constant_values=PAD)
    np.testing.assert_array_equal(fill(params(), None, padded, (np.arange(9) >= 4)[None]).tokens[:, 4:], alone)


def test_a_row_stops_at_an_end_token_with_nothing_masked_before_it():
    plain = filled(alg="entropy", steps=16)
    first = np.asarray(plain.history)[:, 0]
    # The token that stands first in the answer ends it, from the step on that commits it.
    end = int(plain.tokens[0, 4])
    shorter = filled(alg="entropy", steps=16, stop_at_end=True, constraints=Constraints(end_token_ids=(end,)))
    stops = int(np.argmax((first == end)[:, 4:].any(-1) & (first[:, 4] != MASK)))
    assert int(shorter.row_calls[0]) <= stops + 1 < int(plain.row_calls[0]) or stops == 15
    answer = np.asarray(shorter.tokens[0, 4:])
    np.testing.assert_array_equal(answer[: list(answer).index(end)], np.asarray(plain.tokens[0, 4:])[: list(answer).index(end)])
    assert not np.any(answer == MASK) and int(shorter.filled[0]) <= 16


def test_forbidden_tokens_are_never_drawn_and_a_penalty_makes_ends_rarer():
    common = tuple(int(i) for i in np.unique(np.asarray(filled(alg="entropy", steps=16).tokens)[:, 9:]))
    out = filled(alg="entropy", steps=16, constraints=Constraints(forbidden=common))
    new = unequal_rows() == MASK
    assert not np.isin(np.asarray(out.tokens)[new], common).any()
    fewer = filled(alg="entropy", steps=16, constraints=Constraints(end_token_ids=common, end_penalty=2.0))
    assert np.isin(np.asarray(fewer.tokens)[new], common).sum() < new.sum()
