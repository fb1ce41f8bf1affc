"""From documents to token streams: duplicates dropped, split by document, joined with an EOS after each.

The wrap rule is MDLM's (arXiv 2406.07524; the 169M recipe of arXiv 2510.17206): every document is followed by an EOS
and a split's documents form one stream, which `windows.py` cuts up.
"""
import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softmask_jax.data.shards.cache import content_key, logger, open_stream, write_stream
from softmask_jax.data.sources import BadRow, Document, Source
from softmask_jax.data.tokenizers import Tokenizer

TRAIN, VALIDATION, DROPPED = 0, 1, 2
SPLIT_NAMES = ("train", "validation")
GOOD, BLANK, BAD = 0, 1, 2
# What sorting needs of an item of a source; about 40 bytes a document, however long its text.
ITEM = np.dtype([("digest", "u1", 16), ("words", "u1", 16), ("characters", "<i8"), ("kind", "i1")])
ROW = struct.Struct("<32sqb")
EXAMPLES = 3
# Documents are tokenized in groups of about this size: enough for a tokenizer's threads, little to hold in memory.
ENCODE_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class SplitRule:
    """Which documents are for validation: by a `hash` of the content, `fraction` of all; the `last` `documents`; or
    those of other `paths`, a source of its own.

    `hash` keeps a document where it is when others come or go; `last` is the OpenWebText recipe. Raises ValueError for
    a rule that cannot work.
    """

    rule: str = "hash"
    fraction: float = 0.05
    documents: int = 0

    def __post_init__(self):
        if self.rule not in ("hash", "last", "paths"):
            raise ValueError(f"data.validation_rule={self.rule!r} is unknown; choose hash, last or paths")
        if self.rule == "hash" and not 0 < self.fraction < 1:
            raise ValueError(f"data.validation_fraction={self.fraction} must lie between 0 and 1")
        if self.rule == "last" and self.documents < 1:
            raise ValueError("data.validation_rule=last needs data.validation_documents of at least 1")

    def assign(self, digests: np.ndarray, for_validation: np.ndarray) -> np.ndarray:
        """int8 [n], TRAIN or VALIDATION for each distinct document, of digests [n 16] uint8; `for_validation` [n] bool
        tells those of the rule `paths`. Raises ValueError when a split is empty."""
        other = ""
        if self.rule == "hash":
            other = "set data.validation_rule=last and data.validation_documents, "
            head = np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0]
            splits = np.where(head < np.uint64(int(self.fraction * 2**64)), VALIDATION, TRAIN)
            setting = f"data.validation_fraction={self.fraction}"
        elif self.rule == "last":
            splits = np.where(np.arange(len(digests)) >= len(digests) - self.documents, VALIDATION, TRAIN)
            setting = f"data.validation_documents={self.documents}"
        else:
            splits = np.where(for_validation, VALIDATION, TRAIN)
            setting = "data.validation_paths"
        for split in (TRAIN, VALIDATION):
            if not (splits == split).any():
                raise ValueError(
                    f"{setting} leaves no document for {SPLIT_NAMES[split]} (of {len(digests)} distinct documents); "
                    f"change it, {other}add documents, or cut files up with data.separator"
                )
        return splits.astype(np.int8)


@dataclass(frozen=True)
class Scan:
    """One part of a source at a glance: `items` [n] ITEM in order, and what is wrong with the first few bad rows."""

    items: np.ndarray
    bad: tuple[str, ...] = ()


def scan(items: Iterable[Document | BadRow]) -> Scan:
    """Reads the items of a part once."""
    rows, bad = bytearray(), []
    for item in items:
        try:
            if isinstance(item, BadRow):
                raise ValueError(item.reason)
            words = " ".join(item.text.split())
            digests, characters, kind = _digest(item.text) + _digest(words), len(item.text), GOOD if words else BLANK
        except ValueError as error:  # of text, too: a JSON string may hold half a surrogate pair
            digests, characters, kind = bytes(32), 0, BAD
            if len(bad) < EXAMPLES:
                bad.append(f"{item.name} {error}")
        rows += ROW.pack(digests, characters, kind)
    return Scan(np.frombuffer(bytes(rows), ITEM), tuple(bad))


@dataclass(frozen=True)
class Corpus:
    """A source whose documents are sorted into splits.

    `items` [n] ITEM in the source's order and their `roles` int8 [n]: TRAIN, VALIDATION or DROPPED; more may follow
    in the source, unread. `bad`: examples of bad rows.
    """

    source: Source
    items: np.ndarray
    roles: np.ndarray
    bad: tuple[str, ...]
    duplicates: int

    @property
    def blank(self) -> int:
        return int(np.count_nonzero(self.items["kind"] == BLANK))

    @property
    def bad_rows(self) -> int:
        return int(np.count_nonzero(self.items["kind"] == BAD))

    def documents(self, split: int) -> Iterator[str]:
        """The texts of one split, in the source's order. Raises ValueError if a text changed since the first pass."""
        return (text for _, text in self.texts((split,)))

    def texts(self, splits: tuple[int, ...]) -> Iterator[tuple[int, str]]:
        """(split, text) of the documents of `splits`; as `documents`."""
        return checked(self.source, self.items, self.roles, splits)

    def fingerprint(self, split: int) -> str:
        """A hash of one split's texts and their order."""
        return hashlib.sha256(self.items["digest"][self.roles == split].tobytes()).hexdigest()

    def count(self, split: int) -> int:
        return int(np.count_nonzero(self.roles == split))

    def stream(self, split: int, tokenizer: Tokenizer, folder: Path) -> np.ndarray:
        """`token_stream` of this corpus."""
        return token_stream(self, split, tokenizer, folder)


def checked(
    items: Iterable[Document | BadRow], expected: np.ndarray, roles: np.ndarray, splits: tuple[int, ...]
) -> Iterator[tuple[int, str]]:
    """(split, text) of the items that belong to `splits`.

    Raises ValueError where an item that is not dropped differs from its `expected` [n] ITEM.
    """
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
class Joined:
    """Sources one behind the other, as one."""

    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        return self.sources[0].name

    def identity(self) -> str:
        return " + ".join(source.identity() for source in self.sources)

    def num_parts(self) -> int:
        return sum(source.num_parts() for source in self.sources)

    def read(self, part: int) -> Iterator[Document | BadRow]:
        for source in self.sources:
            if part < source.num_parts():
                return source.read(part)
            part -= source.num_parts()
        raise IndexError(part)

    def __iter__(self) -> Iterator[Document | BadRow]:
        return (item for source in self.sources for item in source)


def joined(source: Source, validation_source: Source | None) -> Source:
    """`source` with the one that holds its validation split behind it, if there is one."""
    return source if validation_source is None else Joined((source, validation_source))


def read_corpus(
    source: Source, rule: SplitRule, max_documents: int = 0, *, validation_source: Source | None = None
) -> Corpus:
    """Reads `source` once and sorts its documents into splits; see `sort_documents`."""
    scans, whole = [], joined(source, validation_source)
    for part in range(whole.num_parts()):
        scans.append(scan(whole.read(part)))
        if max_documents and validation_source is None and enough(scans, max_documents):
            break
    return sort_documents(source, scans, rule, max_documents, validation_source=validation_source)


def sort_documents(
    source: Source, scans: list[Scan], rule: SplitRule, max_documents: int = 0, *,
    validation_source: Source | None = None,
) -> Corpus:  # fmt: skip
    """A corpus from the scans of a source's first parts, those of `validation_source` behind those of `source`.

    Blank documents and bad rows are dropped, and documents that repeat another up to white space: they would leak from
    one split into the other. `max_documents` keeps only the first that many distinct documents (0: all) of either
    source. Raises ValueError when nothing is left or a split would be empty.
    """
    if max_documents < 0:
        raise ValueError(f"data.max_documents={max_documents} must not be negative (0 means all)")
    items = np.concatenate([found.items for found in scans])
    bad = tuple(line for found in scans for line in found.bad)[:EXAMPLES]
    distinct = kept = _first_of_each(items)
    if not len(distinct):
        why = f", for example {bad[0]}" if bad else ""
        raise ValueError(
            f"no document of data.source={source.name} has text ({len(items)} read, {np.sum(items['kind'] == BAD)} of "
            f"them bad rows{why}); give it some"
        )
    own = sum(len(found.items) for found in scans[: source.num_parts()])
    if max_documents:
        kept = np.concatenate([part[:max_documents] for part in (kept[kept < own], kept[kept >= own])])
        if validation_source is None:  # the corpus ends here
            items = items[: kept[-1] + 1]
            distinct = kept
    roles = np.full(len(items), DROPPED, np.int8)
    roles[kept] = rule.assign(items["digest"][kept], kept >= own)
    duplicates = int(np.count_nonzero(items["kind"] == GOOD)) - len(distinct)
    return Corpus(joined(source, validation_source), items, roles, bad, duplicates)


def enough(scans: list[Scan], max_documents: int) -> bool:
    """Whether so many distinct documents were found."""
    return len(_first_of_each(np.concatenate([found.items for found in scans]))) >= max_documents


def _first_of_each(items: np.ndarray) -> np.ndarray:
    """int64 [m], ascending: where documents with text stand that no earlier one equals up to white space."""
    good = np.flatnonzero(items["kind"] == GOOD)
    low, high = np.ascontiguousarray(items["words"][good]).view(np.uint64).reshape(-1, 2).T
    order = np.lexsort((low, high))  # stable: of equal ones the first comes first
    low, high = low[order], high[order]
    first = np.ones(len(good), bool)
    first[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    return np.sort(good[order[first]])


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


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
        logger.info("tokenizing %d %s documents", corpus.count(split), SPLIT_NAMES[split])
        tokens = (ids for _, ids in encode_documents(corpus.texts((split,)), tokenizer))
        write_stream(folder, key, tokens, token_dtype(tokenizer))
        stream = open_stream(folder, key)
        if stream is None:
            raise OSError(f"{folder}: the token cache cannot be read back right after writing it; check the disk")
    return stream


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def encode_documents(texts: Iterable[tuple[int, str]], tokenizer: Tokenizer) -> Iterator[tuple[int, np.ndarray]]:
    """(split, ids int32 [n]) of groups of (split, text), an EOS after every document; the order holds within a split.
    """
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
