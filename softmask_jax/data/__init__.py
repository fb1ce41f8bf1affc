"""Text in, batches of token ids out: sources, tokenizers, the wrapped corpus and the index-based pipeline.

`build` is the front door. Nothing here imports JAX until batches are asked for.
"""
import dataclasses
import hashlib
import platform
from collections.abc import Iterable
from pathlib import Path

from softmask_jax.data.cache import cache_folder, content_key, logger
from softmask_jax.data.corpus import (
    SPLIT_NAMES, TRAIN, VALIDATION, Corpus, SplitRule, Windows, read_corpus, token_stream,
)
from softmask_jax.data.pipeline import Batches, batches, validation_batches
from softmask_jax.data.sources import Document, FileSource, Source, make_source
from softmask_jax.data.tokenizers import (
    BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe,
)

__all__ = [
    "BPETokenizer", "Batches", "ByteTokenizer", "Corpus", "Data", "DataConfig", "Document", "FileSource", "Source",
    "SplitRule", "Tokenizer", "Windows", "batches", "build", "load_tokenizer", "make_source", "read_corpus",
    "token_stream", "train_bpe", "validation_batches",
]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What `build` reads. `paths`: globs, comma-separated or a sequence. `separator` cuts files into documents.

    `max_documents` keeps the first that many distinct documents (0: all). `prefetch` is for `batches`.
    """

    source: str = "stdlib"
    paths: str | Iterable[str] = ""
    text_key: str = "text"
    separator: str = ""
    detokenizer: str = ""
    tokenizer: str = "bytes"
    bpe_vocab_size: int = 4096
    seq_len: int = 1024
    validation_rule: str = "hash"
    validation_fraction: float = 0.05
    validation_documents: int = 0
    validation_paths: str | Iterable[str] = ""
    max_documents: int = 0
    cache_dir: str = ""
    prefetch: int = 2


@dataclasses.dataclass(frozen=True)
class Data:
    """A corpus ready for training. `info` is JSON-able: counts, and `fingerprint`, a hash of all that a run sees."""

    tokenizer: Tokenizer
    train: Windows
    validation: Windows
    info: dict


def build(config: object | None = None, **overrides) -> Data:
    """Reads, splits, tokenizes (or takes from the cache) and wraps the corpus that `config` describes.

    `config` is anything with fields of `DataConfig`'s names; those it lacks keep their defaults, others are ignored;
    `overrides` go on top. Raises ValueError, FileNotFoundError or another OSError, each one line that says what to do.
    """
    fields = [field.name for field in dataclasses.fields(DataConfig)]
    given = {name: getattr(config, name) for name in fields if hasattr(config, name)}
    if config is not None and not given:
        raise TypeError(f"a data config has fields such as {fields[0]} and {fields[1]}; got {type(config).__name__}")
    config = DataConfig(**given | overrides)
    rule = SplitRule(config.validation_rule, config.validation_fraction, config.validation_documents)
    folder = cache_folder(config.cache_dir)
    corpus = read_corpus(make_source(config.source, config.paths, config.separator), rule, config.max_documents)
    tokenizer = _make_tokenizer(config, corpus, folder)
    windows = []
    for split in (TRAIN, VALIDATION):
        stream = token_stream(corpus, split, tokenizer, folder)
        windows.append(Windows(stream, config.seq_len, tokenizer.bos_id, tokenizer.eos_id, SPLIT_NAMES[split]))
    return Data(tokenizer, *windows, _describe(config, corpus, tokenizer, windows))


def _make_tokenizer(config: DataConfig, corpus: Corpus, folder: Path) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "bpe":
        return _cached_bpe(corpus, config.bpe_vocab_size, folder)
    if Path(config.tokenizer).is_dir():
        return load_tokenizer(config.tokenizer)
    raise ValueError(f"data.tokenizer={config.tokenizer!r} is unknown; choose bytes, bpe or a saved tokenizer's folder")


def _cached_bpe(corpus: Corpus, vocab_size: int, folder: Path) -> BPETokenizer:
    import tokenizers

    # Trained on the training split alone: merges learned from validation text would flatter the validation loss.
    key = content_key(
        bpe_format=1, texts=corpus.fingerprint(TRAIN), vocab_size=vocab_size, library=tokenizers.__version__
    )
    saved = folder / f"bpe-{key}"
    try:
        return load_tokenizer(saved)
    except FileNotFoundError:
        logger.info("training a BPE of %d tokens on %d documents", vocab_size, corpus.count(TRAIN))
    except ValueError as error:
        logger.warning("%s; training it again", error)
    tokenizer = train_bpe(corpus.documents(TRAIN), vocab_size)
    tokenizer.save(saved)
    return tokenizer


def _describe(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer, windows: list[Windows]) -> dict:
    parts = [config.seq_len, tokenizer.fingerprint(), corpus.fingerprint(TRAIN), corpus.fingerprint(VALIDATION)]
    info = {
        "source": config.source,
        "fingerprint": hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest(),
        "tokenizer": config.tokenizer,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "seq_len": config.seq_len,
        "duplicate_documents": corpus.duplicates,
        "blank_documents": corpus.blank,
    }
    if config.source == "stdlib":
        info["python"] = platform.python_version()
    for split, split_windows in zip((TRAIN, VALIDATION), windows, strict=True):
        info[f"{SPLIT_NAMES[split]}_documents"] = corpus.count(split)
        info[f"{SPLIT_NAMES[split]}_tokens"] = split_windows.num_tokens
        info[f"{SPLIT_NAMES[split]}_windows"] = len(split_windows)
    return info
