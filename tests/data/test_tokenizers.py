"""Tokenizers: a mask and an end that text cannot spell, deterministic, portable as a folder and between processes."""
import json
import pickle
import random

import numpy as np
import pytest

from softmask_jax.data import BPETokenizer, ByteTokenizer, load_tokenizer, open_tokenizer, train_bpe
from softmask_jax.data.tokenizers import DESCRIPTION, HuggingFaceTokenizer, TEXT8_TOKENS, Text8Tokenizer, hf_library

TEXTS = ["def f(x):\n    return x + 1\n" * 8, "class A:\n\tpass\n" * 5, "naïve café — Zürich ☕ " * 4]
HARD = [
    "", " ", "\n", "\r\n line \r\n", "\x00\x01\x07\x1b[0m\x7f\x85", "'", "\"", "‘’“”", "'s 'll \"'", "héllo wörld",
    "日本語 العربية", "👩‍👩‍👧‍👦🏳️‍🌈", "e\u0301 \u200b\ufeff\u2028",
    "\ufffd", "a\t\t  b   \n\n\n  c", "<|endoftext|> [MASK] ▁",
    "\U0010ffff", "x" * 1000,
]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "the", "cat", "[MASK]", "sat", "##s", "a", "[", "]", "mask", ".", "[SEP]"]


def word_pieces() -> HuggingFaceTokenizer:
    """As BERT's: BOS and EOS differ, the mask lies among the words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    library = Tokenizer(models.WordPiece({word: id_ for id_, word in enumerate(WORDS)}, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return HuggingFaceTokenizer(library.to_str(), *(WORDS.index(name) for name in ("[CLS]", "[SEP]", "[MASK]")))


MAKERS = {
    "bytes": ByteTokenizer, "bpe": lambda: train_bpe(TEXTS, 300), "text8": Text8Tokenizer, "word pieces": word_pieces,
}


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return MAKERS[request.param]()


@pytest.fixture(scope="module", params=MAKERS)
def any_tokenizer(request):
    return MAKERS[request.param]()


@pytest.mark.parametrize("text", HARD)
def test_decoding_an_encoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text


def test_no_text_encodes_to_the_end_or_the_mask(any_tokenizer):
    texts = [*HARD, "[CLS] [SEP] [BOS] [EOS] [MASK] [PAD]", "[CLS][MASK]", "a[SEP]."]
    ids = np.concatenate(any_tokenizer.encode_batch(texts))
    assert not np.isin(ids, [any_tokenizer.bos_id, any_tokenizer.eos_id, any_tokenizer.mask_token_id]).any()


def test_a_batch_is_encoded_like_its_texts(any_tokenizer):
    for ids, text in zip(any_tokenizer.encode_batch(HARD), HARD, strict=True):
        np.testing.assert_array_equal(ids, any_tokenizer.encode(text))
        assert ids.dtype == np.int32 and ids.ndim == 1
    assert any_tokenizer.encode_batch([]) == []


def test_the_mask_is_the_last_id_and_the_end_comes_before_it(tokenizer):
    assert tokenizer.mask_token_id == tokenizer.vocab_size - 1
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.vocab_size - 2


def test_masks_and_ends_stay_visible_in_decoded_text(tokenizer):
    mask, end = [tokenizer.mask_token_id], [tokenizer.eos_id]
    ids = np.concatenate([end, tokenizer.encode("ab"), mask, mask, tokenizer.encode("é"), mask, end])
    assert tokenizer.decode(ids) == "<|endoftext|>ab▁▁é▁<|endoftext|>"
    assert tokenizer.decode(ids.tolist(), mask="[MASK]", eos="") == "ab[MASK][MASK]é[MASK]"


def test_a_beginning_that_is_no_end_is_written_like_one_and_words_behind_a_mask_keep_their_space():
    words = word_pieces()
    ids = [words.bos_id, *words.encode("The cats"), words.mask_token_id, *words.encode("sat a."), words.eos_id]
    assert words.decode(ids, mask="▁", eos="|") == "|the cats▁ sat a.|"
    assert words.decode([WORDS.index("cat"), words.mask_token_id, WORDS.index("##s")]) == "cat▁s"


def test_half_a_character_decodes_to_a_replacement_sign():
    assert ByteTokenizer().decode(np.array([0xC3, 257, 0xA9])) == "\ufffd▁\ufffd"


def test_an_id_outside_the_vocabulary_is_an_error(any_tokenizer):
    with pytest.raises(ValueError, match=f"0..{any_tokenizer.vocab_size - 1}"):
        any_tokenizer.decode([any_tokenizer.vocab_size])


def test_half_a_surrogate_pair_is_one_clear_error(any_tokenizer):
    with pytest.raises(ValueError, match="^character 2 of a text is U\\+D83D, half a surrogate pair; decode .*"):
        any_tokenizer.encode_batch(["fine", "ab\ud83d"])


def test_a_saved_tokenizer_is_loaded_with_the_same_ids_and_fingerprint(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert loaded == any_tokenizer and open_tokenizer(tmp_path / "new" / "folder") == loaded
    assert loaded.describe() == any_tokenizer.describe()
    for text in HARD:
        np.testing.assert_array_equal(loaded.encode(text), any_tokenizer.encode(text))


def test_a_pickled_tokenizer_equals_itself_and_builds_its_tables_when_it_needs_them(any_tokenizer):
    any_tokenizer.encode("warm")
    copy = pickle.loads(pickle.dumps(any_tokenizer))
    assert "_library" not in vars(copy)
    assert copy == any_tokenizer and hash(copy) == hash(any_tokenizer) and copy.describe() == any_tokenizer.describe()
    for text in HARD:
        np.testing.assert_array_equal(copy.encode(text), any_tokenizer.encode(text))
    assert copy.decode(copy.encode("a cat")) == any_tokenizer.decode(any_tokenizer.encode("a cat"))


def test_different_tokenizers_are_not_equal():
    made = [make() for make in MAKERS.values()]
    assert len({tokenizer.fingerprint() for tokenizer in made}) == len(set(made)) == len(made)


def test_folders_that_earlier_versions_saved_keep_their_fingerprints(tmp_path):
    saved = {
        "bytes": (256, 257, 258, "de5b7753c8724b56231893f25623c3f9b89748b5fda7d042dcb056aeeceab2a6"),
        "bpe": (3, 4, 5, "815d3f705ff79ff70f8ab70c91114f64f1f9439b1de617c6a80a82a577aac059"),
    }
    (tmp_path / "tokenizer.json").write_text(
        '{"version":"1.0","model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2,"<|endoftext|>":3},"merges":["a b"]}}'
    )
    for kind, (end, mask, size, fingerprint) in saved.items():
        description = {"kind": kind, "bos_id": end, "eos_id": end, "mask_token_id": mask, "vocab_size": size}
        (tmp_path / DESCRIPTION).write_text(json.dumps(description | {"fingerprint": fingerprint}))
        assert load_tokenizer(tmp_path).fingerprint() == fingerprint


def test_training_twice_gives_the_same_tokenizer_and_other_texts_another():
    assert train_bpe(TEXTS, 300).fingerprint() == train_bpe(iter(TEXTS), 300).fingerprint()
    assert train_bpe(TEXTS, 300).fingerprint() != train_bpe(TEXTS[:2], 300).fingerprint()


def test_bpe_fills_the_vocabulary_that_was_asked_for_or_what_the_text_allows():
    assert train_bpe(TEXTS, 280).vocab_size == 280
    assert 258 <= train_bpe(["ab"], 5000).vocab_size < 300


def test_a_bpe_vocabulary_without_room_for_the_bytes_is_an_error():
    with pytest.raises(ValueError, match="bpe_vocab_size=257"):
        train_bpe(TEXTS, 257)


def test_text8_has_the_ids_of_mdlm_and_knows_letters_and_spaces():
    text8 = open_tokenizer("text8")
    assert (text8.bos_id, text8.eos_id, text8.mask_token_id, text8.vocab_size) == (2, 3, 4, 35)
    assert TEXT8_TOKENS[:8] == ("[CLS]", "[SEP]", "[BOS]", "[EOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
    assert text8.encode("Az b").tolist() == [8, 33, 34, 9]
    assert text8.encode("a\n1é日👍{`").tolist() == [8, *[7] * 7]
    assert text8.decode(text8.encode("all the Same text")) == "all the same text"
    assert text8.decode([2, 8, 4, 9, 7, 3], eos="|") == "|a▁b[UNK]|"


def test_text8_encodes_a_long_text_as_one_piece_and_in_pieces_alike(monkeypatch):
    text = "".join(random.Random(0).choices("abc XYZ\n9é日👍", k=10_000))
    known = {character: id_ for id_, character in enumerate(TEXT8_TOKENS)}
    expected = [known.get(character, 7) for character in text.lower()]
    assert Text8Tokenizer().encode(text).tolist() == expected
    monkeypatch.setattr("softmask_jax.data.tokenizers.TEXT8_PIECE", 7)
    assert Text8Tokenizer().encode(text).tolist() == expected


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", ["words", "word pieces", "unigram"])
def test_models_that_know_special_tokens_as_words_still_read_them_as_text(kind, special):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "</s>": 1, "<mask>": 2, "a": 3, "<": 4, "/s>": 5, "mask>": 6, "b": 7, "@": 8}
    if kind == "words":
        library = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    elif kind == "word pieces":
        library = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    else:
        library = Tokenizer(models.Unigram([(token, -1.0) for token in vocabulary], unk_id=0))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ["<unk>", "</s>", "<mask>", "@"]
    library.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    tokenizer = HuggingFaceTokenizer(library.to_str(), 1, 1, 2)
    assert tokenizer.encode("a </s> b").tolist() == [3, 4, 5, 7]
    assert tokenizer.encode("<mask> a <mask>").tolist() == [4, 6, 3, 4, 6]
    assert tokenizer.encode("a @ b").tolist() == ([3, 0, 7] if special else [3, 8, 7])
    assert tokenizer.encode("a z").tolist() == [3, 0]


def test_holes_in_the_ids_are_counted_and_decode_to_nothing():
    content = json.loads(word_pieces()._json)
    content["model"]["vocab"]["far"] = 40
    tokenizer = HuggingFaceTokenizer(json.dumps(content), 2, 13, 41)
    assert tokenizer.vocab_size == 42 and tokenizer.encode("far").tolist() == [40]
    assert tokenizer.decode([4, 30, 40, 41]) == "cat far▁"


def test_truncation_padding_and_dropout_of_a_file_are_ignored():
    content = json.loads(train_bpe(TEXTS, 300)._json)
    whole = HuggingFaceTokenizer(json.dumps(content), 256, 256, 299).encode(TEXTS[0])
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!",
    }
    content["model"]["dropout"] = 0.5
    np.testing.assert_array_equal(HuggingFaceTokenizer(json.dumps(content), 256, 256, 299).encode(TEXTS[0]), whole)


def long_texts() -> list[str]:
    draw = random.Random(1)
    words = ["a", "B2", " ", "  ", "\n", "\n\n", "\r\n", "\t", "'s", "'S", "é", "e\u0301", "\u0301", "日本", "👍", "!",
             "...\n", "7", "12345", "\u00a0", "\u2028", "\x1c", "\u180e", "_", "<|endoftext|>",
             "\u1100", "\u1161", "def f(x):"]  # fmt: skip
    return ["".join(draw.choices(words, k=3000)) for _ in range(20)] + ["x" * 5000, "日本語" * 2000, " \n" * 3000, ""]


def check_pieces(tokenizer, monkeypatch):
    """Encodes texts in many pieces, in one call and in several, and as a whole."""
    texts = long_texts()
    assert tokenizer._is_cuttable and all(len(list(tokenizer._pieces(text))) == 1 for text in texts)
    whole = tokenizer.encode_batch(texts)
    for piece, call in ((1, 2**20), (50, 200)):
        monkeypatch.setattr(hf_library, "PIECE_CHARACTERS", piece)
        monkeypatch.setattr(hf_library, "CALL_CHARACTERS", call)
        assert all(len(list(tokenizer._pieces(text))) > 20 for text in texts[:20])
        assert all("".join(tokenizer._pieces(text)) == text for text in texts)
        for found, expected in zip(tokenizer.encode_batch(texts), whole, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_a_long_text_has_the_same_ids_in_pieces(monkeypatch):
    check_pieces(train_bpe([*TEXTS, *long_texts()[:3]], 400), monkeypatch)


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "NFKC"}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
    {"pre_tokenizer": None},
    {"added_tokens": [{"id": 256, "content": "a b", "special": False, "lstrip": False, "rstrip": False}]},
])  # fmt: skip
def test_a_tokenizer_that_looks_across_spaces_encodes_long_texts_whole(change):
    content = json.loads(train_bpe(TEXTS, 300)._json)
    assert hf_library.is_cuttable(content)
    assert not hf_library.is_cuttable(content | change)


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


@pytest.mark.parametrize("damage", [
    {"kind": "words"}, {"mask_token_id": 3}, {"eos_id": "x"}, {"vocab_size": 9}, {"fingerprint": ""}, {"bos_id": -1},
    None,
])  # fmt: skip
def test_a_damaged_description_is_one_clear_error(damage, tmp_path):
    word_pieces().save(tmp_path)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps(description | damage if damage else []))
    with pytest.raises(ValueError, match="the saved tokenizer is damaged") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
