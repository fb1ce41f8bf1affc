"""The page that plays a denoising: what it holds, and that it can be trusted with any text."""
import html
import json
import re
from unittest import mock

import numpy as np
import pytest

from softmask_jax import config
from softmask_jax.data import ByteTokenizer, train_bpe
from softmask_jax.data.tokenizers.hf_library import HuggingFaceTokenizer
from softmask_jax.report import viewer
from softmask_jax.report.viewer_pieces import BYTES, ORDINARY, Pieces, SPECIAL, visible
from softmask_jax.training import trajectory
from tests.helpers.crafted_trace import HOSTILE, K, LENGTH, MASK, STEPS, WORDS, WordTokenizer, generated

WORDS_OF = WordTokenizer()


def page_of(made, tokenizer=WORDS_OF, **options) -> str:
    return viewer.trajectory_page(made, tokenizer, mask_token_id=options.pop("mask_token_id", MASK), **options)


def content(page: str) -> dict:
    return json.loads(re.search('<script type="application/json" id="trace">(.*?)</script>', page)[1])


def replayed(data: dict, row: int) -> np.ndarray:
    """[S+1 L] ids, as the page's script makes them of the changes."""
    ids = np.array([piece[0] for piece in data["pieces"]] + [MASK])  # -1 is the mask
    frames = [np.array(data["rows"][row]["start"])]
    for change in data["rows"][row]["changes"]:
        frames.append(frames[-1].copy())
        frames[-1][change[::2]] = change[1::2]
    return ids[np.stack(frames)]


def test_the_frames_are_the_tokens_of_the_trace_up_to_the_last_step_that_was_made():
    made = generated(spare=3)
    data = content(page_of(made, rows=(0, 1)))
    for row in (0, 1):
        frames = replayed(data, row)
        assert frames.shape == (STEPS + 1, LENGTH)
        np.testing.assert_array_equal(frames[:-1], made.trace.tokens[:STEPS, row])
        np.testing.assert_array_equal(frames[-1], made.tokens[row])
        assert data["rows"][row]["called"] == [1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("largest", [0.9, 3e-5])
def test_what_masks_carry_is_kept_however_small_lambda_is(largest):
    made = generated(largest=largest)
    data, trace = content(page_of(made)), made.trace
    assert data["unit"] * data["parts"] == pytest.approx(trace.weight[:, 0].max())
    ids = np.array([piece[0] for piece in data["pieces"]] + [MASK])
    assert data["rows"][0]["masks"][0] == []
    for frame in range(1, STEPS):
        at = np.flatnonzero(trace.tokens[frame, 0] == MASK)
        masks = np.reshape(data["rows"][0]["masks"][frame], (len(at), 2 + 2 * K))
        np.testing.assert_allclose(masks[:, 0] * data["unit"], trace.weight[frame, 0, at], rtol=0, atol=largest / 1e4)
        np.testing.assert_array_equal(ids[masks[:, 2::2]], trace.token_ids[frame, 0, at])
        np.testing.assert_allclose(masks[:, 3::2] / 1000, trace.shares[frame, 0, at], rtol=0, atol=5.1e-4)
        predicted = trace.tokens[frame - 1, 0, at] == MASK
        np.testing.assert_array_equal(masks[:, 1] < 0, ~predicted)
        entropy = -trace.neg_entropy[frame - 1, 0, at][predicted]
        np.testing.assert_allclose(masks[predicted, 1] / 1000, entropy, rtol=0, atol=5.1e-4)


def test_a_mask_among_the_candidates_stays_a_mask():
    made = generated()
    made.trace.token_ids[2, 0, :, 0] = MASK
    data = content(page_of(made))
    assert set(data["rows"][0]["masks"][2][2 :: 2 + 2 * K]) == {-1} and MASK not in [piece[0] for piece in data["pieces"]]


def test_padding_is_left_out():
    made, attention_mask = generated(), np.ones((2, LENGTH), np.int32)
    attention_mask[1, :3] = attention_mask[1, -2:] = 0
    data = content(page_of(made, rows=(1, 0), attention_mask=attention_mask))
    np.testing.assert_array_equal(replayed(data, 0)[-1], made.tokens[1, 3:-2])
    assert len(data["rows"][1]["start"]) == LENGTH
    with pytest.raises(ValueError, match="shape of the tokens"):
        page_of(made, attention_mask=attention_mask[:, 1:])


def test_the_curves_are_means_over_the_masks_of_a_step_and_counts_of_what_it_did():
    made = generated()
    row = viewer.row_of(made, 1, mask_token_id=MASK)
    before, after = row.tokens[2], row.tokens[3]
    assert row.mean(row.entropy)[2] == pytest.approx(-made.trace.neg_entropy[2, 1, before == MASK].mean())
    assert row.mean(row.weight)[2] == pytest.approx(made.trace.weight[2, 1, before == MASK].mean())
    counts = row.counts()
    assert counts["committed"][2] == ((before == MASK) & (after != MASK)).sum()
    assert counts["re-masked"].tolist() == [0, 0, 1, 0, 0, 0] and counts["changed"].tolist() == [0, 0, 0, 1, 0, 0]
    page = page_of(made, rows=(0, 1))
    for name in ("Mean entropy", "Mean \u03bb", "Tokens per step", "Masks left", "Network calls so far"):
        for place in (1, 2):
            assert f"<figcaption>{name}, sample {place}</figcaption>" in page
    assert "re-masked in this step" in page and "changed in this step" in page and "> given</li>" in page


def test_a_page_of_plain_masks_says_so_and_has_no_curve_of_lambda():
    page = page_of(generated(soft=False, given=0, steps=4))
    assert "\u03bb is 0 throughout" in page and "<figcaption>Mean \u03bb" not in page and content(page)["unit"] == 0
    assert "> given</li>" not in page and "re-masked in this step" not in page and 'id="inside">' in page


def test_a_row_that_has_nothing_to_fill_is_a_row_all_the_same():
    made = generated()
    made.trace.tokens[:, 0] = made.tokens[0]
    made.trace.weight[:, 0] = 0
    assert content(page_of(made))["rows"][0]["masks"] == [[]] * STEPS


def test_one_step_is_enough():
    data = content(page_of(generated(steps=1, spare=0)))
    assert len(data["rows"][0]["changes"]) == 1 and data["rows"][0]["masks"] == [[]]


def test_hostile_text_stays_text():
    page = page_of(generated(), rows=(0, 1), title=HOSTILE, facts={HOSTILE: HOSTILE, "steps": 6}, note=HOSTILE)
    assert "<img" not in page and page.count("</script>") == 3 and "<!--" not in page
    assert page.count(html.escape(HOSTILE)) >= 5
    assert HOSTILE in [piece[1] for piece in content(page)["pieces"]]


def test_a_row_whose_logits_were_not_finite_is_shown_with_a_warning():
    made = generated()
    made.finite[1] = False
    made.trace.shares[2:, 1], made.trace.weight[2:, 1], made.trace.neg_entropy[2:, 1] = np.nan, np.inf, np.nan
    page = page_of(made, rows=(0, 1))
    assert "Sample 2: a logit was not finite" in page and "Sample 1: a logit" not in page
    assert not re.search("NaN|Infinity", json.dumps(content(page)))


def test_what_cannot_be_shown_is_said():
    made = generated()
    for wrong, said in (
        (dict(made=made._replace(trace=None)), "trace=True"),
        (dict(made=made._replace(steps=np.int32(0))), "made no step"),
        (dict(rows=(2,)), "no row 2: 2 were made"),
        (dict(rows=(-1,)), "no row -1"),
        (dict(rows=()), "1 to 8 rows, not 0"),
        (dict(rows=(0,) * 9), "1 to 8 rows, not 9"),
    ):
        with pytest.raises(ValueError, match=said):
            page_of(**{"made": made} | wrong)


def test_a_long_text_of_many_steps_stays_a_page_that_can_be_mailed():
    made = generated(rows=1, steps=128, length=1024, vocabulary=50_000, mask=50_000)
    rows = [viewer.row_of(made, 0, mask_token_id=50_000)]
    size = len(json.dumps(viewer.encoded(rows, ByteTokenizer()), separators=(",", ":")))
    assert 1.5e6 < size < 5e6


def test_pieces_show_spaces_line_ends_and_what_cannot_be_seen():
    pieces = Pieces(WORDS_OF)
    shown = {word: pieces(id_) for id_, word in enumerate(WORDS)}
    assert shown[" word3"] == (" word3", ORDINARY) and shown["        "] == ("        ", ORDINARY)
    assert shown["\n"][0] == "\u21b5\n" and shown["\t"][0] == "\u21e5\t" and shown["\u202e"][0] == "\u27e8U+202E\u27e9"
    assert shown["\u0301"][0] == "\u25cc\u0301" and shown["\u4e2d"][0] == "\u4e2d"
    assert pieces(WORDS_OF.eos_id) == ("<|endoftext|>", SPECIAL) and pieces(10_000) == ("#10000", SPECIAL)
    assert visible("a\r\x00\u200b") == "a\u240d\u27e8U+0000\u27e9\u27e8U+200B\u27e9"


def test_pieces_of_characters_are_shown_as_bytes():
    plain = Pieces(ByteTokenizer())
    assert plain(0x41) == ("A", ORDINARY) and plain(0xC3) == ("C3", BYTES) and plain(256)[1] == SPECIAL
    tokenizer = train_bpe(["\u4e2d\u6587 text \U0001f600"] * 3, 300)
    pieces = Pieces(tokenizer)
    found = [pieces(id_) for id_ in range(tokenizer.vocab_size)]
    assert ("\u4e2d", ORDINARY) in found and (" text", ORDINARY) in found and found[tokenizer.eos_id][1] == SPECIAL
    parts = [text for text, kind in found if kind == BYTES]
    assert len(parts) >= 128 and any(" " in part for part in parts) and all(re.fullmatch("[0-9A-F]{2}( [0-9A-F]{2})*", part) for part in parts)
    assert not any("\ufffd" in text for text, _ in found)


def test_words_of_metaspace_keep_their_space_and_byte_fallback_is_told():
    vocabulary = {"<unk>": 0, "\u2581the": 1, "ing": 2, "<0xE2>": 3, "</s>": 4}
    decoders = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]  # fmt: skip
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>", "byte_fallback": True}
    special = {"id": 4, "content": "</s>", "special": True}
    flags = {name: False for name in ("single_word", "lstrip", "rstrip", "normalized")}
    saved = {"version": "1.0", "model": model, "added_tokens": [special | flags],
             "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False},
             "decoder": {"type": "Sequence", "decoders": decoders}}  # fmt: skip
    pieces = Pieces(HuggingFaceTokenizer(json.dumps(saved), 4, 4, 5))
    assert pieces(1) == (" the", ORDINARY) and pieces(2) == ("ing", ORDINARY)
    assert pieces(3) == ("E2", BYTES) and pieces(4) == ("</s>", SPECIAL)


def test_a_page_of_a_finished_run_that_fails_is_a_line_not_an_error(tmp_path, capsys):
    task = mock.Mock(config=config.Config())
    task.denoised.side_effect = MemoryError("no room")
    trajectory.write(mock.Mock(path=tmp_path), task, mock.Mock(step=3))
    assert capsys.readouterr().out == "Warning: no trajectory.html was written (no room).\n"


def test_results_by_name_are_of_one_row():
    with pytest.raises(ValueError, match="one row of each"):
        page_of({"plain masks": generated(), "soft masks": generated()}, rows=(0, 1))
