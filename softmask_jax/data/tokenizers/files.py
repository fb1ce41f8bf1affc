"""Tokenizers from other projects' files: `tokenizer.json`, GPT-2's and Qwen's vocabulary and merges, Qwen's ranks."""
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from softmask_jax.data.tokenizers.base import DESCRIPTION
from softmask_jax.data.tokenizers.hf_library import HuggingFaceTokenizer, QWEN_PATTERN, open_library
from softmask_jax.data.tokenizers.ranks import ALPHABET, read_ranks
from softmask_jax.data.tokenizers.specials import (
    BOS_NAMES, CONFIG_FILE, EOS_NAMES, MAP_FILE, MASK_NAMES, OTHER_NAMES, QWEN_IDS, QWEN_RANKS, QWEN_TOOL_CALLS,
    named_tokens, read_json, read_text, special_ids,
)

JSON_FILE = "tokenizer.json"
VOCABULARY_FILES = ("vocab.json", "encoder.json")
MERGES_FILES = ("merges.txt", "vocab.bpe")
TEMPLATE_FILE = "chat_template.jinja"
# Files of a tokenizer on the hub, and its chat template.
HUB_FILES = (JSON_FILE, CONFIG_FILE, MAP_FILE, TEMPLATE_FILE, VOCABULARY_FILES[0], MERGES_FILES[0])

GPT2_CLASSES = ("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "CodeGenTokenizer")
QWEN_CLASSES = ("Qwen2Tokenizer", "DreamTokenizer")
# Token and whether it is special, by id.
QWEN_ADDED = {id_: (token, token not in QWEN_TOOL_CALLS) for token, id_ in QWEN_IDS.items()}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
QWEN_STEP = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
QWEN_STEPS = {"type": "Sequence", "pretokenizers": [QWEN_STEP, BYTE_LEVEL]}
QWEN_SPLIT = {"normalizer": {"type": "NFC"}, "pre_tokenizer": QWEN_STEPS}


def read_tokenizer(path: Path) -> HuggingFaceTokenizer:
    """The tokenizer in a `tokenizer.json`, a `*.tiktoken` file or a folder. Raises FileNotFoundError or ValueError."""
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".json":
        # Other file names may be unrelated to their neighbours.
        return _read_tokenizer_json(path, named_tokens(path.parent) if path.name == JSON_FILE else {})
    if path.suffix == ".tiktoken":
        return _byte_level_bpe(path, *read_ranks(path), QWEN_ADDED, QWEN_SPLIT, {})
    raise ValueError(f"{path}: no tokenizer; give a {JSON_FILE}, a *.tiktoken file or a folder that holds one")


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has a vocabulary, complete or not; configs and templates alone are no tokenizer."""
    names = (DESCRIPTION, JSON_FILE, *VOCABULARY_FILES, *MERGES_FILES)
    return any((folder / name).is_file() for name in names) or any(folder.glob("*.tiktoken"))


def _read_folder(folder: Path) -> HuggingFaceTokenizer:
    def first_of(names: Iterable[str]) -> Path | None:
        return next((folder / name for name in names if (folder / name).is_file()), None)

    if first_of([JSON_FILE]):
        return _read_tokenizer_json(folder / JSON_FILE, named_tokens(folder))
    vocabulary, merges = first_of(VOCABULARY_FILES), first_of(MERGES_FILES)
    if vocabulary and merges:
        return _read_vocabulary_and_merges(vocabulary, merges)
    ranks = list(folder.glob("*.tiktoken"))
    if len(ranks) == 1:
        return read_tokenizer(ranks[0])
    files = f"{JSON_FILE}, or vocab.json and merges.txt (encoder.json and vocab.bpe), or one *.tiktoken file"
    raise FileNotFoundError(f"{folder}: no tokenizer here; give {files}")


def _read_tokenizer_json(path: Path, named: Mapping[str, str]) -> HuggingFaceTokenizer:
    text = read_text(path)
    try:
        return HuggingFaceTokenizer(text, *special_ids(open_library(text).get_vocab(with_added_tokens=True), named))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_vocabulary_and_merges(path: Path, merges_path: Path) -> HuggingFaceTokenizer:
    vocabulary, named = read_json(path), named_tokens(path.parent)
    ids = list(vocabulary.values())
    if not all(type(id_) is int and id_ >= 0 for id_ in ids) or len(set(ids)) != len(ids):
        raise ValueError(f"{path}: a vocabulary gives each token an id of its own; get the file anew")
    if missing := sum(letter not in vocabulary for letter in ALPHABET):
        raise ValueError(f"{path}: no byte-level vocabulary ({missing} bytes are missing); give a {JSON_FILE}")
    merges = _read_merges(merges_path, path.name, vocabulary)
    config = read_json(path.parent / CONFIG_FILE, optional=True)
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    try:
        tokens = (config.get("added_tokens_decoder") or {}).items()
        added = {int(id_): (str(token["content"]), bool(token.get("special"))) for id_, token in tokens}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path.parent / CONFIG_FILE}: added_tokens_decoder is damaged; get the file anew") from None
    if kind in QWEN_CLASSES or (not kind and len(vocabulary) == QWEN_RANKS):
        return _byte_level_bpe(path, vocabulary, merges, QWEN_ADDED | added, QWEN_SPLIT, named)
    if kind and kind not in GPT2_CLASSES:
        raise ValueError(f"{path}: how a {kind} splits text is not in these files; give its {JSON_FILE}")
    known = {*EOS_NAMES, *BOS_NAMES, *MASK_NAMES, *OTHER_NAMES, *named.values()} & vocabulary.keys()
    step = BYTE_LEVEL | {"add_prefix_space": bool(config.get("add_prefix_space")), "use_regex": True}
    split = {"normalizer": None, "pre_tokenizer": step}
    added = {vocabulary[token]: (token, True) for token in known} | added
    return _byte_level_bpe(path, vocabulary, merges, added, split, named)


def _read_merges(path: Path, vocabulary_name: str, vocabulary: Mapping[str, int]) -> list[str]:
    merges, made = [], set(ALPHABET)
    for number, line in enumerate(read_text(path).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not {*parts, "".join(parts)} <= vocabulary.keys():
            reason = f"line {number} ({line[:40]!r}) does not merge tokens of {vocabulary_name} into another"
            raise ValueError(f"{path}: {reason}; give both files of the same tokenizer")
        merges.append(line)
        made.add("".join(parts))
    # Special tokens and RoBERTa's three fillers are never merged; an incomplete file leaves out many more.
    unmade = sum(token not in made and not token.startswith(("<", "[")) for token in vocabulary)
    if unmade > 16:
        reason = f"{unmade} tokens of {vocabulary_name} come from no merge"
        raise ValueError(f"{path}: {reason}; the file is incomplete or of another tokenizer, get it anew")
    return merges


def _byte_level_bpe(
    path: Path, vocabulary: Mapping[str, int], merges: list[str], added: Mapping[int, tuple[str, bool]],
    split: Mapping[str, dict | None], named: Mapping[str, str],
) -> HuggingFaceTokenizer:  # fmt: skip
    """`added`: token and whether it is special, by id. `split`: normalizer and pre-tokenizer. `path`: for errors."""
    # Also in the model's vocabulary, where ids may have gaps.
    vocabulary = dict(vocabulary) | {token: id_ for id_, (token, _) in added.items()}
    if len(set(vocabulary.values())) != len(vocabulary):
        raise ValueError(f"{path}: an added token of {CONFIG_FILE} has the id of another; get both files anew")
    try:
        ids = special_ids(vocabulary, named)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = sorted(added.items())
    added_tokens = [{"id": id_, "content": token, **flags, "special": special} for id_, (token, special) in tokens]
    # Not written by the library, whose versions differ: fingerprints hash this text.
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens, **split,
        "post_processor": None, "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }  # fmt: skip
    return HuggingFaceTokenizer(json.dumps(content, ensure_ascii=False), *ids)
