"""The recorded GPT-2 with a tokenizer whose texts spell ids, shared by the tests of scoring."""
import json
import shutil
from pathlib import Path

import numpy as np

from tests.golden import FOLDER, load

VOCAB, EOS = 96, 95


def folder(at: Path, name: str = "tiny") -> Path:
    """A copy of a recorded checkpoint; its tokenizer reads "t7 t0" as 7, 0, and `<|endoftext|>` as 95."""
    shutil.copytree(FOLDER / "gpt2" / name, at)
    words = {f"t{id_}": id_ for id_ in range(EOS)} | {"<|endoftext|>": EOS}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": None,
        "added_tokens": [{"id": EOS, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True}],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
    }  # fmt: skip
    (at / "tokenizer.json").write_text(json.dumps(tokenizer))
    return at


def text(ids) -> str:
    """What the tokenizer of `folder` reads as these ids."""
    return " ".join("<|endoftext|>" if id_ == EOS else f"t{id_}" for id_ in ids)


def recorded(name: str = "tiny") -> dict[str, np.ndarray]:
    """Of `transformers`: tokens [4 24], their lengths, nll [4 23], hidden [4 24 32], and which tokens count [4 23]."""
    return load({"tiny": "gpt2/tiny.npz", "half_sharded": "gpt2/half_sharded.npz"}[name])


def texts(found: dict[str, np.ndarray]) -> list[str]:
    return [text(row[:length]) for row, length in zip(found["tokens"], found["lengths"], strict=True)]
