"""Texts to batches of token ids. `build` opens corpus and tokenizer; JAX is imported with the first batches only."""
import dataclasses
import math
import platform
from pathlib import Path

from softmask_jax.config import Texts
from softmask_jax.data.pipeline import Batches, batches, validation_batches
from softmask_jax.data.shards import PreparedCorpus
from softmask_jax.data.shards.cache import cache_folder, content_key, logger
from softmask_jax.data.sources import BadRow, Document, FileSource, Source, make_source
from softmask_jax.data.sources.corpus import (
    SPLIT_NAMES, TRAIN, VALIDATION, Corpus, SplitRule, SplitSource, read_corpus,
)
from softmask_jax.data.tokenizers import (
    BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, open_tokenizer, train_bpe,
)
from softmask_jax.data.tokenizers.base import hash_of
from softmask_jax.data.windows import Mixture, Windows
from softmask_jax.io.files import split_paths

__all__ = [
    "BPETokenizer", "BadRow", "Batches", "ByteTokenizer", "Corpus", "Data", "Document", "FileSource",
    "Mixture", "PreparedCorpus", "Source", "SplitRule", "Tokenizer", "Windows", "batches", "build", "load_tokenizer",
    "make_source", "open_tokenizer", "read_corpus", "train_bpe", "validation_batches",
]


@dataclasses.dataclass(frozen=True)
class Data:
    """A corpus ready for training. `info` is JSON-able: counts, and `fingerprint`, a hash of all that a run sees."""

    tokenizer: Tokenizer
    train: Windows | Mixture
    validation: Windows | Mixture
    info: dict


def build(config: Texts = Texts(), **overrides) -> Data:
    """The corpus of `config` with `overrides`. Raises ValueError, ImportError or OSError, one line with a remedy."""
    config = dataclasses.replace(config, **overrides)
    folder = cache_folder(config.cache_dir)
    parts = mixture_parts(config)
    corpora = [open_corpus(part, folder) for _, part in parts]
    tokenizer = make_tokenizer(config, corpora, folder)
    weights, windows = [weight for weight, _ in parts], []
    for split, name in enumerate(SPLIT_NAMES):
        streams = [corpus.stream(split, tokenizer, folder) for corpus in corpora]
        wrapped = [Windows(stream, config.seq_len, tokenizer.bos_id, tokenizer.eos_id, name) for stream in streams]
        windows.append(Mixture(wrapped, weights) if len(parts) > 1 else wrapped[0])
    return Data(tokenizer, *windows, _describe(config, weights, corpora, tokenizer, windows))


def mixture_parts(config: Texts) -> list[tuple[float, Texts]]:
    """Weight and config of each corpus of a mixture such as `0.7 jsonl:a.jsonl; 0.3 stdlib`, or of a single one.
    Duplicates are dropped within a corpus only; under the rule `hash` they share a split."""
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
        if not 0 < share < math.inf or kind in ("", "mixture"):
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
    source = source_of(config)
    corpus = read_corpus(source, rule_of(config), config.max_documents)
    if corpus.bad:
        rows = f"{corpus.bad_rows} bad rows of data.source={source.name}"
        logger.warning("%s are left out, for example %s", rows, corpus.bad[0])
    return corpus


def source_of(config: Texts) -> Source:
    """The source, with that of the validation documents under the rule `paths`."""
    options = {"separator": config.separator, "text_key": config.text_key, "detokenizer": config.detokenizer}
    source = make_source(config.source, config.paths, **options)
    if (config.validation_rule == "paths") != bool(config.validation_paths):
        raise ValueError("data.validation_paths and data.validation_rule='paths' belong together: give both or neither")
    paths = config.validation_paths
    return SplitSource(source, make_source(config.source, paths, **options)) if paths else source


def rule_of(config: Texts) -> SplitRule:
    return SplitRule(config.validation_rule, config.validation_fraction, config.validation_documents)


def make_tokenizer(config: Texts, corpora: list[Corpus | PreparedCorpus], folder: Path) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names. Raises ValueError or OSError."""
    if config.tokenizer == "bpe":
        return _cached_bpe(corpora, config.bpe_vocab_size, folder)
    if config.tokenizer == "shards":
        for corpus in corpora:
            if isinstance(corpus, PreparedCorpus):
                return corpus.tokenizer()
        raise ValueError("data.tokenizer=shards is for data.source=shards; name a tokenizer")
    # By default, the hub's files stay where other programs find them too.
    return open_tokenizer(config.tokenizer, folder if config.cache_dir else None)


def _cached_bpe(corpora: list[Corpus | PreparedCorpus], vocab_size: int, folder: Path) -> BPETokenizer:
    import tokenizers

    if any(isinstance(corpus, PreparedCorpus) for corpus in corpora):
        raise ValueError("data.tokenizer=bpe needs text, which shards do not hold; give --config.data.tokenizer=shards")
    # Merges learned from validation text would flatter the validation loss.
    prints = [corpus.fingerprint(TRAIN) for corpus in corpora]
    texts = prints if len(prints) > 1 else prints[0]
    key = content_key(bpe_format=1, texts=texts, vocab_size=vocab_size, library=tokenizers.__version__)
    saved = folder / f"bpe-{key}"
    try:
        return load_tokenizer(saved)
    except FileNotFoundError:
        logger.info("training a BPE of %d tokens on %d documents", vocab_size, sum(c.count(TRAIN) for c in corpora))
    except ValueError as error:
        logger.warning("%s; training it again", error)
    tokenizer = train_bpe((text for corpus in corpora for text in corpus.documents(TRAIN)), vocab_size)
    tokenizer.save(saved)
    return tokenizer


def _describe(config: Texts, weights, corpora, tokenizer: Tokenizer, windows: list[Windows | Mixture]) -> dict:
    prints = [config.seq_len, tokenizer.fingerprint()]
    for weight, corpus in zip(weights, corpora, strict=True):
        prints += [weight] * (len(weights) > 1) + [corpus.fingerprint(TRAIN), corpus.fingerprint(VALIDATION)]
    info = {
        "source": config.source,
        "fingerprint": hash_of(*prints),
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
    for split, name in enumerate(SPLIT_NAMES):
        info[f"{name}_documents"] = sum(corpus.count(split) for corpus in corpora)
        info[f"{name}_tokens"] = windows[split].num_tokens
        info[f"{name}_windows"] = len(windows[split])
    return info
