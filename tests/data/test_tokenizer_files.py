"""Tokenizers from others' files and the hub: the special ids are what the files say, and damage is named."""
import json
import sys
from pathlib import Path

import pytest

from softmask_jax.data import open_tokenizer
from softmask_jax.data.tokenizers import DESCRIPTION, HuggingFaceTokenizer
from softmask_jax.data.tokenizers.hub import download_tokenizer
from softmask_jax.data.tokenizers.ranks import ALPHABET
from tests.data.test_tokenizers import word_pieces


def write_vocabulary(folder: Path, vocabulary: dict, merges: list[str], config: dict | None = None):
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def ids(tokenizer) -> tuple[int, int, int, int]:
    return tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_token_id, tokenizer.vocab_size


def words_json(*words: str) -> str:
    model = {"type": "WordLevel", "vocab": {word: id_ for id_, word in enumerate(words)}, "unk_token": words[0]}
    return json.dumps({"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model})


@pytest.mark.parametrize("words, config, tokens_map, expected", [
    (["u", "</s>", "<s>"], {}, {}, (2, 1, 3, 4)),
    (["u", "<eos>", "</s>", "<mask>", "[MASK]"], {}, {}, (2, 2, 3, 5)),
    (["u", "[SEP]", "[MASK]", "[CLS]"], {}, {}, (3, 1, 2, 4)),
    (["u", "<|endoftext|>", "<s>", "</s>"], {}, {}, (1, 1, 4, 5)),
    (["u", "<|endoftext|>", "<s>", "</s>"], {"eos_token": "</s>"}, {}, (2, 3, 4, 5)),
    (["u", "A", "B", "C"], {"cls_token": "A", "sep_token": "B", "mask_token": {"content": "C"}}, {}, (1, 2, 3, 4)),
    (["u", "A", "B", "C"], {"cls_token": "A", "sep_token": "B"}, {"bos_token": "C", "eos_token": "u"}, (3, 0, 4, 5)),
    (["u", "A", "B", "C"], {"eos_token": "A", "bos_token": None}, {"eos_token": "B"}, (1, 1, 4, 5)),
])  # fmt: skip
def test_special_ids_are_what_neighbours_name_or_the_first_known_names(words, config, tokens_map, expected, tmp_path):
    (tmp_path / "tokenizer.json").write_text(words_json(*words))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens_map))
    assert ids(open_tokenizer(tmp_path)) == ids(open_tokenizer(tmp_path / "tokenizer.json")) == expected


def test_a_file_of_another_name_has_no_neighbours(tmp_path):
    (tmp_path / "mine.json").write_text(words_json("u", "A", "</s>"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "A"}')
    assert open_tokenizer(str(tmp_path / "mine.json")).eos_id == 2


def test_berts_ids_are_found_in_its_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text(word_pieces().files()["tokenizer.json"])
    bert = open_tokenizer(tmp_path)
    assert bert == word_pieces() and ids(bert) == (2, 13, 5, 14)


def small_vocabulary() -> dict[str, int]:
    return {token: id_ for id_, token in enumerate([*ALPHABET, "ab", "abc", "<s>", "</s>", "<mask>", "<other>"])}


def test_other_vocabularies_split_like_gpt2s_have_their_own_special_tokens(tmp_path):
    added = {"261": {"content": "<other>", "special": False}, "300": {"content": "<far>", "special": True}}
    config = {"tokenizer_class": "RobertaTokenizerFast", "added_tokens_decoder": added, "add_prefix_space": True}
    write_vocabulary(tmp_path, small_vocabulary(), ["a b", "ab c"], config)
    tokenizer = open_tokenizer(tmp_path)
    assert ids(tokenizer) == (258, 259, 260, 301)
    assert tokenizer.encode("abc<s><other>").tolist() == [32, 257, *b"<s>", 261]
    assert tokenizer.decode([257, 260, 300]) == "abc▁<far>"


def damaged(folder: Path, name: str):
    """Writes a folder of one small vocabulary with one fault."""
    vocabulary, merges, config = small_vocabulary(), ["a b", "ab c"], {}
    if name == "foreign merges":
        merges = ["a b", "b d"]
    if name == "merge of three":
        merges = ["a b", "a b c"]
    if name == "too few merges":
        vocabulary |= {f"ab{letter}": 300 + place for place, letter in enumerate(ALPHABET)}
    if name == "no bytes":
        vocabulary = {"a": 0, "b": 1, "</s>": 2}
    if name == "an id twice":
        vocabulary["<s>"] = 3
    if name == "unknown class":
        config = {"tokenizer_class": "CLIPTokenizer"}
    if name == "no such token":
        config = {"eos_token": "<gone>"}
    if name == "one token for two":
        config = {"eos_token": "<mask>"}
    if name == "no token":
        config = {"eos_token": 3}
    if name == "added twice":
        config = {"added_tokens_decoder": {"5": {"content": "<far>"}}}
    if name == "added damaged":
        config = {"added_tokens_decoder": {"5": "<far>"}}
    if name == "no end":
        vocabulary = {token: id_ for token, id_ in vocabulary.items() if "s>" not in token}
    write_vocabulary(folder, vocabulary, merges, config)
    if name == "vocabulary no JSON":
        (folder / "vocab.json").write_text('{"a": 0')
    if name == "vocabulary a list":
        (folder / "vocab.json").write_text("[]")
    if name == "not text":
        (folder / "merges.txt").write_bytes(b"a b\n\xff\xff")


@pytest.mark.parametrize("name, message", [
    ("foreign merges", r"merges.txt: line 3 \('b d'\) does not merge tokens of vocab.json"),
    ("merge of three", "line 3 .* does not merge"), ("too few merges", "255 tokens of vocab.json come from no merge"),
    ("no bytes", "no byte-level vocabulary .254 bytes"), ("an id twice", "an id of its own"),
    ("unknown class", "how a CLIPTokenizer splits text"), ("no such token", "eos_token is '<gone>'"),
    ("one token for two", "the mask is also BOS or EOS"), ("no token", "eos_token=3 .* is no token"),
    ("added twice", "has the id of another"), ("added damaged", "added_tokens_decoder is damaged"),
    ("no end", "no token ends a text"), ("vocabulary no JSON", "vocab.json: not JSON"),
    ("vocabulary a list", "no JSON object but a list"), ("not text", "merges.txt: not UTF-8 text"),
])  # fmt: skip
def test_a_damaged_folder_is_one_clear_error(name, message, tmp_path):
    damaged(tmp_path, name)
    with pytest.raises(ValueError, match=message) as caught:
        open_tokenizer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", "null", '{"model": {}}', '{"version": "1.0", "model": {"type": "BPE"}}',
])  # fmt: skip
def test_a_json_file_of_another_shape_is_one_clear_error(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json: not a Hugging Face tokenizer.json") as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_paths_without_a_tokenizer_are_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing' does not exist; choose bytes, bpe or text8, hf://owner/name"):
        open_tokenizer(tmp_path / "missing")
    with pytest.raises(ValueError, match="data.tokenizer='words' is unknown; choose bytes, bpe or text8"):
        open_tokenizer("words")
    with pytest.raises(FileNotFoundError, match="no tokenizer here; give tokenizer.json, or vocab.json and"):
        open_tokenizer(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="no tokenizer; give a tokenizer.json"):
        open_tokenizer(tmp_path / "a.txt")


def test_a_tokenizer_on_the_hub_is_its_small_files(monkeypatch, tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text(word_pieces().files()["tokenizer.json"])
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    def download(name, **options):
        calls.append((name, options))
        return str(tmp_path / "words")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert open_tokenizer("hf://owner/name") == word_pieces()
    assert open_tokenizer("hf://owner/name@v1", tmp_path) == word_pieces()
    (name, options), (_, others) = calls
    assert name == "owner/name" and options["revision"] is None and options["cache_dir"] is None
    assert set(options["allow_patterns"]) == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
        "merges.txt",
    }
    assert others["revision"] == "v1" and others["cache_dir"] == str(tmp_path / "hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="^data.tokenizer=hf://owner/name: .*no tokenizer here"):
        open_tokenizer("hf://owner/name")


def test_a_hub_out_of_reach_is_one_clear_error(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def download(name, **options):
        raise RuntimeError("cannot find the files\nand there is no connection")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(OSError, match="hf://owner/name cannot be downloaded .cannot find the files.; check") as caught:
        open_tokenizer("hf://owner/name")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="needs huggingface_hub; pip install 'softmask_jax\\[hub\\]'"):
        open_tokenizer("hf://owner/name")


@pytest.mark.parametrize("spec", ["hf://", "hf://a/b/c", "hf://a b", "hf://owner/../x"])
def test_what_is_no_name_on_the_hub_is_not_asked_for(spec):
    with pytest.raises(ValueError, match="is no name on the hub; write hf://owner/name"):
        download_tokenizer(spec)


def test_a_saved_folder_goes_before_the_files_in_it(tmp_path):
    words = word_pieces()
    HuggingFaceTokenizer(words.files()["tokenizer.json"], 3, 4, 14).save(tmp_path)
    assert ids(open_tokenizer(tmp_path / "tokenizer.json")) == ids(open_tokenizer(tmp_path)) == (3, 4, 14, 15)
    (tmp_path / DESCRIPTION).unlink()
    assert open_tokenizer(tmp_path) == words
