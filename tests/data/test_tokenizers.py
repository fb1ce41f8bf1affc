"""Tokenizers: lossless, with a mask and an end that text cannot spell, deterministic, and portable as a folder."""
import json

import numpy as np
import pytest

from softmask_jax.data import BPETokenizer, ByteTokenizer, load_tokenizer, train_bpe

TEXTS = ["def f(x):\n    return x + 1\n" * 8, "class A:\n\tpass\n" * 5, "naïve café — Zürich ☕ " * 4]
HARD = [
    "", " ", "\n", "\r\n line \r\n", "\x00\x01\x07\x1b[0m\x7f\x85", "'", "\"", "‘’“”", "'s 'll \"'", "héllo wörld",
    "日本語 العربية", "👩‍👩‍👧‍👦🏳️‍🌈", "e\u0301 \u200b\ufeff\u2028",
    "\ufffd", "a\t\t  b   \n\n\n  c", "<|endoftext|> [MASK] ▁",
    "\U0010ffff", "x" * 1000,
]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else train_bpe(TEXTS, 300)


@pytest.mark.parametrize("text", HARD)
def test_decoding_an_encoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text


def test_no_text_encodes_to_the_end_or_the_mask(tokenizer):
    ids = np.concatenate(tokenizer.encode_batch(HARD))
    assert not np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_token_id]).any()


def test_a_batch_is_encoded_like_its_texts(tokenizer):
    for ids, text in zip(tokenizer.encode_batch(HARD), HARD, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_the_mask_is_the_last_id_and_the_end_comes_before_it(tokenizer):
    assert tokenizer.mask_token_id == tokenizer.vocab_size - 1
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.vocab_size - 2


def test_masks_and_ends_stay_visible_in_decoded_text(tokenizer):
    mask, end = [tokenizer.mask_token_id], [tokenizer.eos_id]
    ids = np.concatenate([end, tokenizer.encode("ab"), mask, mask, tokenizer.encode("é"), mask, end])
    assert tokenizer.decode(ids) == "<|endoftext|>ab▁▁é▁<|endoftext|>"
    assert tokenizer.decode(ids.tolist(), mask="[MASK]", eos="") == "ab[MASK][MASK]é[MASK]"


def test_half_a_character_decodes_to_a_replacement_sign():
    assert ByteTokenizer().decode(np.array([0xC3, 257, 0xA9])) == "\ufffd▁\ufffd"


def test_an_id_outside_the_vocabulary_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=f"0..{tokenizer.vocab_size - 1}"):
        tokenizer.decode([tokenizer.vocab_size])


def test_a_saved_tokenizer_is_loaded_with_the_same_ids_and_fingerprint(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert type(loaded) is type(tokenizer) and loaded.fingerprint() == tokenizer.fingerprint()
    assert (loaded.eos_id, loaded.mask_token_id, loaded.vocab_size) == (
        tokenizer.eos_id, tokenizer.mask_token_id, tokenizer.vocab_size,
    )
    for text in HARD:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


def test_training_twice_gives_the_same_tokenizer_and_other_texts_another():
    assert train_bpe(TEXTS, 300).fingerprint() == train_bpe(iter(TEXTS), 300).fingerprint()
    assert train_bpe(TEXTS, 300).fingerprint() != train_bpe(TEXTS[:2], 300).fingerprint()


def test_bpe_fills_the_vocabulary_that_was_asked_for_or_what_the_text_allows():
    assert train_bpe(TEXTS, 280).vocab_size == 280
    assert 258 <= train_bpe(["ab"], 5000).vocab_size < 300


def test_a_bpe_vocabulary_without_room_for_the_bytes_is_an_error():
    with pytest.raises(ValueError, match="bpe_vocab_size=257"):
        train_bpe(TEXTS, 257)


def test_loading_from_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tampered_or_foreign_tokenizer_is_an_error(tmp_path):
    train_bpe(TEXTS, 300).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    original = file.read_text()
    file.write_text(original.replace('"add_prefix_space":false', '"add_prefix_space":true'))
    with pytest.raises(ValueError, match="do not belong together"):
        load_tokenizer(tmp_path)
    file.write_text(original[:100])
    with pytest.raises(ValueError, match="damaged"):
        load_tokenizer(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="damaged"):
        load_tokenizer(tmp_path)
    content = json.loads(original)
    content["added_tokens"] = []
    content["model"]["vocab"].pop("<|endoftext|>", None)
    with pytest.raises(ValueError, match="no <|endoftext|> token"):
        BPETokenizer(json.dumps(content))
