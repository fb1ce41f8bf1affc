"""From documents to windows: duplicates dropped, split by document, joined into one stream and wrapped.

The wrap rule is MDLM's (arXiv 2406.07524; the 169M recipe of arXiv 2510.17206): every document is followed by an EOS, a
split's documents form one stream, the stream is cut into windows of L - 2 tokens, and each window gets a BOS in front
and an EOS behind. The last incomplete window is dropped.
"""
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softmask_jax.data.cache import content_key, logger, open_stream, write_stream
from softmask_jax.data.sources import Source
from softmask_jax.data.tokenizers import Tokenizer

TRAIN, VALIDATION, DROPPED = 0, 1, 2
SPLIT_NAMES = ("train", "validation")
DIGEST_BYTES = 16
# Documents are tokenized in groups of about this size: enough for a tokenizer's threads, little to hold in memory.
ENCODE_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class SplitRule:
    """Which documents are for validation: by a `hash` of the content, `fraction` of all; or the `last` `documents`.

    `hash` keeps a document where it is when others come or go; `last` is the OpenWebText recipe. Raises ValueError for
    a rule that cannot work.
    """

    rule: str = "hash"
    fraction: float = 0.05
    documents: int = 0

    def __post_init__(self):
        if self.rule not in ("hash", "last"):
            raise ValueError(f"data.validation_rule={self.rule!r} is unknown; choose hash or last")
        if self.rule == "hash" and not 0 < self.fraction < 1:
            raise ValueError(f"data.validation_fraction={self.fraction} must lie between 0 and 1")
        if self.rule == "last" and self.documents < 1:
            raise ValueError("data.validation_rule=last needs data.validation_documents of at least 1")

    def assign(self, digests: Sequence[bytes]) -> np.ndarray:
        """int8 [n], TRAIN or VALIDATION for each distinct document. Raises ValueError when a split is empty."""
        if self.rule == "hash":
            limit = int(self.fraction * 2**64)
            splits = [VALIDATION if int.from_bytes(digest[:8], "big") < limit else TRAIN for digest in digests]
            setting = f"data.validation_fraction={self.fraction}"
        else:
            first = len(digests) - self.documents
            splits = [VALIDATION if number >= first else TRAIN for number in range(len(digests))]
            setting = f"data.validation_documents={self.documents}"
        for split in (TRAIN, VALIDATION):
            if split not in splits:
                raise ValueError(
                    f"{setting} leaves no document for {SPLIT_NAMES[split]} (of {len(digests)} distinct documents); "
                    "change it, add documents, or cut files up with data.separator"
                )
        return np.array(splits, np.int8)


@dataclass(frozen=True)
class Corpus:
    """A source whose documents are sorted into splits. `splits` [documents read]: TRAIN, VALIDATION or DROPPED."""

    source: Source
    splits: np.ndarray
    digests: tuple[bytes, ...]
    duplicates: int
    blank: int

    def documents(self, split: int) -> Iterator[str]:
        """The texts of one split, in the source's order. Raises ValueError if a text changed since the first pass."""
        kept = iter(self.digests)
        for role, document in zip(self.splits, self.source, strict=False):
            if role == DROPPED:
                continue
            if _digest(document.text) != next(kept):
                raise ValueError(f"{document.name}: changed while the corpus was being read; start again")
            if role == split:
                yield document.text

    def fingerprint(self, split: int) -> str:
        """A hash of one split's texts and their order."""
        roles = self.splits[self.splits != DROPPED]
        joined = b"".join(digest for digest, role in zip(self.digests, roles, strict=True) if role == split)
        return hashlib.sha256(joined).hexdigest()

    def count(self, split: int) -> int:
        return int(np.count_nonzero(self.splits == split))


def read_corpus(source: Source, rule: SplitRule, max_documents: int = 0) -> Corpus:
    """Reads `source` once and sorts its documents into splits; blank ones are dropped, and those that repeat another up
    to white space: they would leak from one split into the other.

    `max_documents` keeps only the first that many distinct documents (0: all). Raises ValueError when nothing is left
    or a split would be empty, and whatever the source raises.
    """
    if max_documents < 0:
        raise ValueError(f"data.max_documents={max_documents} must not be negative (0 means all)")
    seen: set[bytes] = set()
    digests: list[bytes] = []
    kept: list[bool] = []
    duplicates = blank = 0
    for document in source:
        if max_documents and len(digests) == max_documents:
            break
        digest, words = _digest(document.text), _digest(" ".join(document.text.split()))
        is_blank, is_repeated = not document.text.strip(), words in seen
        kept.append(not is_blank and not is_repeated)
        blank += is_blank
        duplicates += is_repeated and not is_blank
        if kept[-1]:
            seen.add(words)
            digests.append(digest)
    if not digests:
        raise ValueError(f"every document of data.source={source.name} is empty ({len(kept)} read); give it some text")
    splits = np.full(len(kept), DROPPED, np.int8)
    splits[np.array(kept)] = rule.assign(digests)
    return Corpus(source, splits, tuple(digests), duplicates, blank)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=DIGEST_BYTES).digest()


def token_stream(corpus: Corpus, split: int, tokenizer: Tokenizer, folder: Path) -> np.ndarray:
    """One split as token ids [tokens], uint16 or uint32, an EOS after every document; mapped from the cache `folder`.

    It is tokenized only when the cache has no whole copy. Raises OSError when the cache cannot be written.
    """
    # The texts of the split stand for source and split rule: rules that agree on them share a stream.
    key = f"{SPLIT_NAMES[split]}-" + content_key(
        stream_format=1, texts=corpus.fingerprint(split), tokenizer=tokenizer.fingerprint()
    )
    stream = open_stream(folder, key)
    if stream is None:
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        logger.info("tokenizing %d %s documents", corpus.count(split), SPLIT_NAMES[split])
        write_stream(folder, key, _encode_documents(corpus.documents(split), tokenizer), dtype)
        stream = open_stream(folder, key)
        if stream is None:
            raise OSError(f"{folder}: the token cache cannot be read back right after writing it; check the disk")
    return stream


def _encode_documents(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    end = np.array([tokenizer.eos_id], np.int32)

    def encode(group: list[str]) -> np.ndarray:
        return np.concatenate([part for ids in tokenizer.encode_batch(group) for part in (ids, end)])

    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if characters >= ENCODE_CHARACTERS:
            yield encode(group)
            group, characters = [], 0
    if group:
        yield encode(group)


class Windows:
    """A token stream seen as windows of `seq_len` ids: BOS, seq_len - 2 tokens, EOS.

    `windows[i]` is int32 [L]; `gather(indices [n])` is int32 [n L]. Raises ValueError when the stream fills no window.
    """

    def __init__(self, stream: np.ndarray, seq_len: int, bos_id: int, eos_id: int, name: str = "corpus"):
        if seq_len < 3:
            raise ValueError(f"data.seq_len={seq_len} must be at least 3: BOS, one token, EOS")
        self.seq_len, self.bos_id, self.eos_id, self.name = seq_len, bos_id, eos_id, name
        self.num_tokens = len(stream)
        count = len(stream) // (seq_len - 2)
        if not count:
            raise ValueError(
                f"the {name} split has {len(stream)} tokens, less than one window of {seq_len - 2} (data.seq_len - 2): "
                "give it more text or lower data.seq_len"
            )
        self._body = stream[: count * (seq_len - 2)].reshape(count, seq_len - 2)

    def __len__(self) -> int:
        return len(self._body)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.gather(np.array([index]))[0]

    def gather(self, indices: np.ndarray) -> np.ndarray:
        windows = np.empty((len(indices), self.seq_len), np.int32)
        windows[:, 0], windows[:, -1] = self.bos_id, self.eos_id
        windows[:, 1:-1] = self._body[indices]
        return windows
