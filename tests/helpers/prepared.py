"""A corpus of a size that a test can hold, and what its preparation leaves."""
import json
from pathlib import Path

import numpy as np
import pytest

from softmask_jax.config import Texts
from softmask_jax.data import build, prepare as prepare_module, shards
from softmask_jax.data.prepare import prepare

WORDS = "mask token noise step blend weight soft hard train sample λ top draw time batch row".split()
SETTINGS = dict(source="jsonl", tokenizer="bytes", seq_len=64, validation_fraction=0.15)


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [f"{seed}.{n} {' '.join(random.choice(WORDS, random.integers(1, 80)))}" for n in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """400 documents in JSONL and small shards; tokens and parts of a size that a test can hold."""
    monkeypatch.setattr(shards, "RECORD_TOKENS", 100)
    monkeypatch.setattr(prepare_module, "RECORD_TOKENS", 100)
    monkeypatch.setattr("softmask_jax.data.shards.writer.RECORD_TOKENS", 100)
    monkeypatch.setattr(prepare_module, "MILLION", 3_000)
    paths = write_jsonl(tmp_path / "texts.jsonl", [*texts(400), "", texts(400)[7]])
    return Texts(**SETTINGS, paths=paths, cache_dir=str(tmp_path / "cache"))


def made(config: Texts, out: Path, **options):
    options = {"workers": 1, "shard_megabytes": 1} | options
    return prepare(config, str(out), **options)


def files(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return found


def all_windows(windows) -> np.ndarray:
    return windows.gather(np.arange(len(windows)))


def from_shards(config: Texts, out, **changes):
    return build(config, source="shards", paths=str(out), tokenizer="shards", **changes)


def bpe_folder(corpus: Texts, tmp_path: Path) -> Path:
    build(corpus, tokenizer="bpe", bpe_vocab_size=300).tokenizer.save(tmp_path / "bpe")
    return tmp_path / "bpe"
