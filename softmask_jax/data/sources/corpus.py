"""Documents to token streams: duplicates dropped, split by document, joined with an EOS after each."""
import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softmask_jax.data.shards.cache import content_key, logger, open_stream, write_stream
from softmask_jax.data.sources.documents import BadRow, Document, Source
from softmask_jax.data.tokenizers import Tokenizer

TRAIN, VALIDATION, DROPPED = 0, 1, 2
SPLIT_NAMES = ("train", "validation")
GOOD, BLANK, BAD = 0, 1, 2
# What sorting needs of an item: about 40 bytes a document.
ITEM = np.dtype([("digest", "u1", 16), ("words", "u1", 16), ("characters", "<i8"), ("kind", "i1")])
ROW = struct.Struct("<32sqb")
EXAMPLES = 3
# Documents that are tokenized at once: enough for a tokenizer's threads, little memory.
ENCODE_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class SplitRule:
    """Choice of the validation documents. Raises ValueError for impossible rules."""

    rule: str = "hash"  # hash of the content: stable as documents come and go | last: OpenWebText's recipe | paths
    fraction: float = 0.05  # of `hash`
    documents: int = 0  # of `last`

    def __post_init__(self):
        if self.rule not in ("hash", "last", "paths"):
            raise ValueError(f"data.validation_rule={self.rule!r} is unknown; choose hash, last or paths")
        if self.rule == "hash" and not 0 < self.fraction < 1:
            raise ValueError(f"data.validation_fraction={self.fraction} must lie between 0 and 1")
        if self.rule == "last" and self.documents < 1:
            raise ValueError("data.validation_rule=last needs data.validation_documents of at least 1")

    def assign(self, digests: np.ndarray, for_validation: np.ndarray) -> np.ndarray:
        """int8 [n] TRAIN or VALIDATION. digests: uint8 [n 16]; for_validation: bool [n], for the rule `paths`.
        Raises ValueError when a split is empty."""
        setting, other = "data.validation_paths", ""
        if self.rule == "hash":
            setting = f"data.validation_fraction={self.fraction}"
            other = "set data.validation_rule=last and data.validation_documents, "
            head = np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0]
            for_validation = head < np.uint64(int(self.fraction * 2**64))
        elif self.rule == "last":
            setting = f"data.validation_documents={self.documents}"
            for_validation = np.arange(len(digests)) >= len(digests) - self.documents
        for split, is_empty in enumerate((np.all(for_validation), not np.any(for_validation))):
            if is_empty:
                reason = f"leaves no document for {SPLIT_NAMES[split]} (of {len(digests)} distinct documents)"
                remedy = f"change it, {other}add documents, or cut files up with data.separator"
                raise ValueError(f"{setting} {reason}; {remedy}")
        return np.where(for_validation, VALIDATION, TRAIN).astype(np.int8)


@dataclass(frozen=True)
class Scan:
    """Items [n] ITEM of a part of a source, in order, and the problems of the first few bad rows."""

    items: np.ndarray
    bad: tuple[str, ...] = ()


def scan(items: Iterable[Document | BadRow]) -> Scan:
    """Read the items of a part once."""
    rows, bad = bytearray(), []
    for item in items:
        try:
            if isinstance(item, BadRow):
                raise ValueError(item.reason)
            words = " ".join(item.text.split())
            rows += ROW.pack(_digest(item.text) + _digest(words), len(item.text), GOOD if words else BLANK)
        except ValueError as error:  # also of text: a JSON string may hold half a surrogate pair
            rows += ROW.pack(bytes(32), 0, BAD)
            if len(bad) < EXAMPLES:
                bad.append(f"{item.name} {error}")
    return Scan(np.frombuffer(bytes(rows), ITEM), tuple(bad))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


@dataclass(frozen=True)
class Corpus:
    """A source whose documents are sorted into splits."""

    source: Source
    items: np.ndarray  # [n] ITEM, the first of the source, in order
    roles: np.ndarray  # int8 [n]: TRAIN, VALIDATION or DROPPED
    bad: tuple[str, ...]  # examples of bad rows
    duplicates: int

    @property
    def blank(self) -> int:
        return int(np.count_nonzero(self.items["kind"] == BLANK))

    @property
    def bad_rows(self) -> int:
        return int(np.count_nonzero(self.items["kind"] == BAD))

    def documents(self, split: int) -> Iterator[str]:
        """Texts of one split in the source's order. Raises ValueError if a text has changed since the first pass."""
        return (text for _, text in checked(self.source, self.items, self.roles, (split,)))

    def fingerprint(self, split: int) -> str:
        """A hash of one split's texts and their order."""
        return hashlib.sha256(self.items["digest"][self.roles == split].tobytes()).hexdigest()

    def count(self, split: int) -> int:
        return int(np.count_nonzero(self.roles == split))

    def stream(self, split: int, tokenizer: Tokenizer, folder: Path) -> np.ndarray:
        """Token ids [tokens] of a split, uint16 or uint32, an EOS after every document, cached in `folder`."""
        # Sources and split rules with the same texts share a stream.
        texts = content_key(stream_format=1, texts=self.fingerprint(split), tokenizer=tokenizer.fingerprint())
        key = f"{SPLIT_NAMES[split]}-{texts}"
        if (stream := open_stream(folder, key)) is not None:
            return stream
        logger.info("tokenizing %d %s documents", self.count(split), SPLIT_NAMES[split])
        documents = ((split, text) for text in self.documents(split))
        write_stream(folder, key, (ids for _, ids in encode_documents(documents, tokenizer)), token_dtype(tokenizer))
        if (stream := open_stream(folder, key)) is None:
            raise OSError(f"{folder}: the token cache cannot be read back right after writing it; check the disk")
        return stream


def checked(
    items: Iterable[Document | BadRow], expected: np.ndarray, roles: np.ndarray, splits: tuple[int, ...]
) -> Iterator[tuple[int, str]]:
    """(split, text) of the items of `splits`. ValueError where a kept item differs from `expected` [n] ITEM."""
    read = 0
    for read, (role, was, item) in enumerate(zip(roles, expected, items, strict=False), 1):
        if role == DROPPED:
            continue
        if isinstance(item, BadRow) or _digest(item.text) != was["digest"].tobytes():
            raise ValueError(f"{item.name}: changed while the corpus was being read; start again")
        if role in splits:
            yield int(role), item.text
    if read < len(roles) and (roles[read:] != DROPPED).any():
        raise ValueError(f"{len(roles) - read} documents went away while the corpus was being read; start again")


@dataclass(frozen=True)
class SplitSource(Source):
    """Documents for training, followed by those of another source for validation."""

    train: Source
    validation: Source

    @property
    def name(self) -> str:
        return self.train.name

    def identity(self) -> str:
        return f"{self.train.identity()} + {self.validation.identity()}"

    def num_parts(self) -> int:
        return self.train.num_parts() + self.validation.num_parts()

    def read(self, part: int) -> Iterator[Document | BadRow]:
        own = self.train.num_parts()
        return self.train.read(part) if part < own else self.validation.read(part - own)


def read_corpus(source: Source, rule: SplitRule, max_documents: int = 0) -> Corpus:
    """Read `source` once and sort its documents into splits; see `sort_documents`."""
    scans = []
    for part in range(source.num_parts()):
        scans.append(scan(source.read(part)))
        if enough(source, scans, max_documents):
            break
    return sort_documents(source, scans, rule, max_documents)


def sort_documents(source: Source, scans: list[Scan], rule: SplitRule, max_documents: int = 0) -> Corpus:
    """A corpus from the scans of a source's first parts. Raises ValueError for a split without documents.

    Drops blank documents, bad rows and repeats up to white space, which would leak between splits. max_documents:
    number of distinct documents kept, for each half of a `SplitSource` (0: all)."""
    if max_documents < 0:
        raise ValueError(f"data.max_documents={max_documents} must not be negative (0 means all)")
    items = np.concatenate([part.items for part in scans])
    bad = tuple(line for part in scans for line in part.bad)[:EXAMPLES]
    distinct = chosen = _first_of_each(items)
    if not len(distinct):
        example = f", for example {bad[0]}" if bad else ""
        counts = f"{len(items)} read, {np.sum(items['kind'] == BAD)} of them bad rows{example}"
        raise ValueError(f"no document of data.source={source.name} has text ({counts}); give it some")
    is_split = isinstance(source, SplitSource)
    own_parts = source.train.num_parts() if is_split else len(scans)
    own = sum(len(part.items) for part in scans[:own_parts])
    if max_documents:
        chosen = np.concatenate([part[:max_documents] for part in (chosen[chosen < own], chosen[chosen >= own])])
        if not is_split:  # the corpus ends here
            items, distinct = items[: chosen[-1] + 1], chosen
    roles = np.full(len(items), DROPPED, np.int8)
    roles[chosen] = rule.assign(items["digest"][chosen], chosen >= own)
    return Corpus(source, items, roles, bad, duplicates=int(np.count_nonzero(items["kind"] == GOOD)) - len(distinct))


def enough(source: Source, scans: list[Scan], max_documents: int) -> bool:
    """Whether the scans of the first parts hold all documents of a corpus of `max_documents`."""
    if not max_documents or isinstance(source, SplitSource):
        return False
    return len(_first_of_each(np.concatenate([part.items for part in scans]))) >= max_documents


def _first_of_each(items: np.ndarray) -> np.ndarray:
    """int64 [m], ascending: positions of documents that are not blank and repeat no earlier one up to white space."""
    good = np.flatnonzero(items["kind"] == GOOD)
    _, first = np.unique(items["words"][good].view("V16").ravel(), return_index=True)
    return good[np.sort(first)]


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def encode_documents(texts: Iterable[tuple[int, str]], tokenizer: Tokenizer) -> Iterator[tuple[int, np.ndarray]]:
    """(split, ids int32 [n]) of groups of (split, text), an EOS after every document, in order within a split."""
    end = np.array([tokenizer.eos_id], np.int32)
    groups: dict[int, list[str]] = {}
    characters = 0

    def encode() -> Iterator[tuple[int, np.ndarray]]:
        for split, group in groups.items():
            yield split, np.concatenate([part for ids in tokenizer.encode_batch(group) for part in (ids, end)])
        groups.clear()

    for split, text in texts:
        groups.setdefault(split, []).append(text)
        characters += len(text)
        if characters >= ENCODE_CHARACTERS:
            yield from encode()
            characters = 0
    yield from encode()
