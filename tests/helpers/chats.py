"""Conversations, and a small tokenizer with Qwen's special tokens under their own ids."""
import json
from pathlib import Path

from softmask_jax.data.tokenizers import open_tokenizer
from softmask_jax.data.tokenizers.ranks import ALPHABET
from softmask_jax.data.tokenizers.specials import QWEN_IDS

START, END, CALL = (QWEN_IDS[token] for token in ("<|im_start|>", "<|im_end|>", "<tool_call>"))
PAD, MASK = 151643, 151666


def write_tokenizer(folder: Path, **config) -> Path:
    """Bytes as Qwen's letters, without merges, in a folder such as Qwen's; `config` goes into tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({letter: id_ for id_, letter in enumerate(ALPHABET)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"} | config))
    return folder


def tokenizer(folder: Path):
    return open_tokenizer(write_tokenizer(folder))


def chat(*contents: str, system: str = "") -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return [{"role": "system", "content": system}] * bool(system) + turns


def write_chats(path: Path, chats, key: str = "messages") -> str:
    """A JSON Lines file; returns the source that it is."""
    path.write_text("".join(json.dumps({key: messages}) + "\n" for messages in chats))
    return f"jsonl:{path}"
