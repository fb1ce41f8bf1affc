"""Texts to batches of token ids: `build` opens sources, tokenizers and the corpus that the pipeline reads by index.

JAX is not imported before batches are made.
"""
import dataclasses
import hashlib
import math
import platform
from pathlib import Path

from softmask_jax.config import Texts
from softmask_jax.data.pipeline import Batches, batches, validation_batches
from softmask_jax.data.shards import PreparedCorpus
from softmask_jax.data.shards.cache import cache_folder, content_key, logger
from softmask_jax.data.sources import BadRow, Document, FileSource, Source, make_source
from softmask_jax.data.sources.corpus import (
    SPLIT_NAMES, TRAIN, VALIDATION, Corpus, SplitRule, read_corpus, token_stream,
)
from softmask_jax.data.tokenizers import (
    BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, open_tokenizer, train_bpe,
)
from softmask_jax.data.windows import Mixture, Windows
from softmask_jax.io.files import split_paths

__all__ = [
    "BPETokenizer", "BadRow", "Batches", "ByteTokenizer", "Corpus", "Data", "Document", "FileSource",
    "Mixture", "PreparedCorpus", "Source", "SplitRule", "Tokenizer", "Windows", "batches", "build", "load_tokenizer",
    "make_source", "open_tokenizer", "read_corpus", "token_stream", "train_bpe", "validation_batches",
]


@dataclasses.dataclass(frozen=True)
class Data:
    """A corpus ready for training. `info` is JSON-able: counts, and `fingerprint`, a hash of all that a run sees."""

    tokenizer: Tokenizer
    train: Windows | Mixture
    validation: Windows | Mixture
    info: dict


def build(config: Texts = Texts(), **overrides) -> Data:
    """Read, split, tokenize (or take from the cache, or from shards) and wrap the corpus that `config` describes.

    `overrides` replace keys of `config`. Raises ValueError, FileNotFoundError or another OSError, each one line with a
    remedy.
    """
    config = dataclasses.replace(config, **overrides)
    folder = cache_folder(config.cache_dir)
    parts = mixture_parts(config)
    corpora = [open_corpus(part, folder) for _, part in parts]
    tokenizer = make_tokenizer(config, corpora, folder)
    windows, bos_id, eos_id = [], tokenizer.bos_id, tokenizer.eos_id
    for split in (TRAIN, VALIDATION):
        streams = [corpus.stream(split, tokenizer, folder) for corpus in corpora]
        wrapped = [Windows(stream, config.seq_len, bos_id, eos_id, SPLIT_NAMES[split]) for stream in streams]
        windows.append(Mixture(wrapped, [weight for weight, _ in parts]) if len(parts) > 1 else wrapped[0])
    return Data(tokenizer, *windows, _describe(config, parts, corpora, tokenizer, windows))


def mixture_parts(config: Texts) -> list[tuple[float, Texts]]:
    """Weight and config of each corpus of a mixture, such as `0.7 jsonl:a.jsonl; 0.3 stdlib`; others are one corpus.

    Repeats are removed within a corpus, not across; under the rule `hash` identical texts share a split.
    Raises ValueError.
    """
    if config.source != "mixture":
        return [(1.0, config)]
    if config.validation_rule == "paths":
        raise ValueError("data.source=mixture has no data.validation_paths: split each corpus by hash or last")
    text = config.paths if isinstance(config.paths, str) else ";".join(config.paths)
    parts = []
    for entry in split_paths(text, ";"):
        weight, _, where = entry.partition(" ")
        kind, _, paths = where.strip().partition(":")
        try:
            share = float(weight)
        except ValueError:
            share = math.nan
        if not (math.isfinite(share) and share > 0 and kind) or kind == "mixture":
            form = "`WEIGHT KIND:PATHS`, such as `0.7 jsonl:web/*.jsonl`, with a positive weight"
            raise ValueError(f"data.paths: {entry!r} is not of the form {form}")
        parts.append((share, dataclasses.replace(config, source=kind, paths=paths)))
    if not parts:
        raise ValueError("data.source=mixture needs data.paths such as `0.7 jsonl:web/*.jsonl; 0.3 stdlib`")
    return parts


def open_corpus(config: Texts, folder: Path) -> Corpus | PreparedCorpus:
    """The documents of one source, sorted into splits. Raises ValueError or OSError."""
    if config.source == "shards":
        return PreparedCorpus(config.paths, folder)
    source, validation_source = sources_of(config)
    corpus = read_corpus(source, rule_of(config), config.max_documents, validation_source=validation_source)
    if corpus.bad:
        logger.warning(
            "%d bad rows of data.source=%s are left out, for example %s", corpus.bad_rows, source.name, corpus.bad[0]
        )
    return corpus


def sources_of(config: Texts) -> tuple[Source, Source | None]:
    """The source, and that of its validation documents, if it is another."""
    options = {"separator": config.separator, "text_key": config.text_key, "detokenizer": config.detokenizer}
    source = make_source(config.source, config.paths, **options)
    if (config.validation_rule == "paths") != bool(config.validation_paths):
        raise ValueError("data.validation_paths and data.validation_rule='paths' belong together: give both or neither")
    if config.validation_rule != "paths":
        return source, None
    return source, make_source(config.source, config.validation_paths, **options)


def rule_of(config: Texts) -> SplitRule:
    return SplitRule(config.validation_rule, config.validation_fraction, config.validation_documents)


def make_tokenizer(config: Texts, corpora: list[Corpus | PreparedCorpus], folder: Path) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names. Raises ValueError or OSError."""
    if config.tokenizer == "bpe":
        return _cached_bpe(corpora, config.bpe_vocab_size, folder)
    if config.tokenizer == "shards":
        prepared = [corpus for corpus in corpora if isinstance(corpus, PreparedCorpus)]
        if not prepared:
            raise ValueError("data.tokenizer=shards is for data.source=shards; name a tokenizer")
        return prepared[0].tokenizer()
    # By default, the hub's files stay where other programs find them too.
    return open_tokenizer(config.tokenizer, folder if config.cache_dir else None)


def _cached_bpe(corpora: list[Corpus | PreparedCorpus], vocab_size: int, folder: Path) -> BPETokenizer:
    import tokenizers

    texts = [corpus for corpus in corpora if isinstance(corpus, Corpus)]
    if len(texts) < len(corpora):
        raise ValueError("data.tokenizer=bpe needs text, which shards do not hold; give --config.data.tokenizer=shards")
    # Merges learned from validation text would flatter the validation loss.
    prints = [corpus.fingerprint(TRAIN) for corpus in texts]
    prints = prints if len(prints) > 1 else prints[0]
    key = content_key(bpe_format=1, texts=prints, vocab_size=vocab_size, library=tokenizers.__version__)
    saved = folder / f"bpe-{key}"
    try:
        return load_tokenizer(saved)
    except FileNotFoundError:
        logger.info("training a BPE of %d tokens on %d documents", vocab_size, sum(c.count(TRAIN) for c in texts))
    except ValueError as error:
        logger.warning("%s; training it again", error)
    tokenizer = train_bpe((text for corpus in texts for text in corpus.documents(TRAIN)), vocab_size)
    tokenizer.save(saved)
    return tokenizer


def _describe(config: Texts, parts, corpora, tokenizer: Tokenizer, windows: list[Windows | Mixture]) -> dict:
    prints = [config.seq_len, tokenizer.fingerprint()]
    for (weight, _), corpus in zip(parts, corpora, strict=True):
        prints += [weight] * (len(parts) > 1) + [corpus.fingerprint(TRAIN), corpus.fingerprint(VALIDATION)]
    info = {
        "source": config.source,
        "fingerprint": hashlib.sha256("\n".join(map(str, prints)).encode()).hexdigest(),
        "tokenizer": config.tokenizer,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "seq_len": config.seq_len,
        "duplicate_documents": sum(corpus.duplicates for corpus in corpora),
        "blank_documents": sum(corpus.blank for corpus in corpora),
        "bad_rows": sum(corpus.bad_rows for corpus in corpora),
    }
    if config.source == "stdlib":
        info["python"] = platform.python_version()
    for split, split_windows in zip((TRAIN, VALIDATION), windows, strict=True):
        info[f"{SPLIT_NAMES[split]}_documents"] = sum(corpus.count(split) for corpus in corpora)
        info[f"{SPLIT_NAMES[split]}_tokens"] = split_windows.num_tokens
        info[f"{SPLIT_NAMES[split]}_windows"] = len(split_windows)
    return info
