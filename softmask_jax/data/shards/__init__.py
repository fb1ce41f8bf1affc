"""Folders of `softmask_jax.data.prepare`: `manifest.json`, `tokenizer/` and token streams in ArrayRecord shards.

A stream is the records of a split's shards, in the manifest's order: little-endian ids, uint16 or uint32,
`RECORD_TOKENS` a record (fewer only in the last of a shard)."""
import bisect
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from softmask_jax.data.shards.cache import content_key
from softmask_jax.data.sources.corpus import SPLIT_NAMES
from softmask_jax.data.sources.storage import Folder
from softmask_jax.data.tokenizers import Tokenizer, load_tokenizer
from softmask_jax.data.tokenizers.base import hash_of
from softmask_jax.io.files import one_line, split_paths

MANIFEST = "manifest.json"
FORMAT = 1
CHECKSUM = "checksum"
RECORD_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a split and its digest."""

    name: str
    tokens: int
    documents: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a prepared corpus."""

    documents: int
    tokens: int
    fingerprint: str  # as `Corpus.fingerprint`
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Description of a prepared folder. `settings`: everything that decides its bytes."""

    settings: dict
    dtype: str
    tokenizer: str
    vocab_size: int
    eos_id: int
    duplicate_documents: int
    blank_documents: int
    bad_rows: int
    splits: dict[str, Split]

    @property
    def shards(self) -> list[Shard]:
        return [shard for split in self.splits.values() for shard in split.shards]

    def to_json(self) -> bytes:
        values = {"format": FORMAT} | dataclasses.asdict(self)
        return (json.dumps(values | {CHECKSUM: content_key(**values)}, indent=1) + "\n").encode()


def read_manifest(folder: Folder) -> Manifest:
    """Manifest of a prepared folder. FileNotFoundError for an unfinished one, ValueError for a damaged manifest."""
    try:
        values = json.loads(folder.read(MANIFEST))
        if values.pop(CHECKSUM, None) not in (None, content_key(**values)):
            raise ValueError("its checksum is wrong")
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}; prepare it with this version")
        splits = values.pop("splits")
        if set(splits) != set(SPLIT_NAMES):
            raise ValueError(f"it has the splits {', '.join(splits)}")
        for name, split in splits.items():
            shards = tuple(Shard(**shard) for shard in split.pop("shards"))
            for key in ("tokens", "documents"):
                if sum(getattr(shard, key) for shard in shards) != split[key]:
                    raise ValueError(f"the {key} of the {name} shards do not add up")
            splits[name] = Split(shards=shards, **split)
        return Manifest(splits=splits, **values)
    except FileNotFoundError:
        command = f"`python -m softmask_jax.data.prepare --out={folder} ...` makes one, or finishes it"
        raise FileNotFoundError(f"{folder}: no prepared corpus here ({MANIFEST} is missing); {command}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        path = folder.path(MANIFEST)
        raise ValueError(f"{path} is damaged ({error}); prepare the corpus anew in another folder") from error


class ShardStream:
    """A token stream over ArrayRecord `files`, those of `shards`, read at random. Raises OSError for damaged ones."""

    def __init__(self, files: Sequence[Path], shards: Sequence[Shard], dtype: str):
        self._files, self._dtype = [str(file) for file in files], np.dtype(dtype).newbyteorder("<")
        self._first = [0, *itertools.accumulate(shard.tokens for shard in shards)]
        self._readers = {}

    def __len__(self) -> int:
        return self._first[-1]

    def spans(self, starts: np.ndarray, length: int) -> np.ndarray:
        """[n length] ids of the spans that begin at `starts` [n]."""
        out = np.empty((len(starts), length), np.int32)
        # By shard and record: offset in the record, and the slice of `out` to fill.
        pieces: dict[int, dict[int, list]] = {}
        for row, token in zip(out, np.asarray(starts).tolist(), strict=True):
            while len(row):
                number = bisect.bisect_right(self._first, token) - 1
                record, offset = divmod(token - self._first[number], RECORD_TOKENS)
                count = min(len(row), RECORD_TOKENS - offset, self._first[number + 1] - token)
                pieces.setdefault(number, {}).setdefault(record, []).append((offset, row[:count]))
                token, row = token + count, row[count:]
        for number, records in pieces.items():
            for content, parts in zip(self._read(number, list(records)), records.values(), strict=True):
                ids = np.frombuffer(content, self._dtype)
                for offset, part in parts:
                    part[:] = ids[offset : offset + len(part)]
        return out

    def _read(self, number: int, records: list[int]) -> Sequence[bytes]:
        from array_record.python import array_record_module

        file = self._files[number]
        try:
            if number not in self._readers:
                # Windows are drawn at random: reading ahead would be useless.
                self._readers[number] = array_record_module.ArrayRecordReader(file, "readahead_buffer_size:0")
            return self._readers[number].read(records)
        except Exception as error:  # the library raises whatever its C++ status says
            command = f"`python -m softmask_jax.data.prepare --verify --out={Path(file).parent}`"
            raise OSError(f"{file}: cannot be read ({one_line(error)}); {command} names damaged shards") from error

    def __getstate__(self):
        return self.__dict__ | {"_readers": {}}


class PreparedCorpus:
    """Prepared folders joined into a corpus; remote ones are copied into `cache` when a stream is opened.
    FileNotFoundError or ValueError for an unfinished corpus, different tokenizers or a repeated shard."""

    def __init__(self, paths: str | Sequence[str], cache: Path):
        paths = split_paths(paths, ",") if isinstance(paths, str) else paths
        self.folders = [Folder(path) for path in paths if path.strip()]
        if not self.folders:
            raise ValueError("data.source=shards needs data.paths: a folder that softmask_jax.data.prepare made")
        self.manifests = [read_manifest(folder) for folder in self.folders]
        self._cache, seen = cache, {}
        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            if manifest.tokenizer != self.manifests[0].tokenizer:
                raise ValueError(f"{folder} and {self.folders[0]} have different tokenizers; prepare one anew")
            for shard in manifest.shards:
                path = folder.path(shard.name)
                if twice := seen.get(shard.sha256):
                    raise ValueError(f"{path} and {twice} are the same shard; take one of them out of data.paths")
                seen[shard.sha256] = path
        counts = [(m.duplicate_documents, m.blank_documents, m.bad_rows) for m in self.manifests]
        self.duplicates, self.blank, self.bad_rows = map(sum, zip(*counts, strict=True))

    def _splits(self, split: int) -> list[Split]:
        return [manifest.splits[SPLIT_NAMES[split]] for manifest in self.manifests]

    def count(self, split: int) -> int:
        return sum(part.documents for part in self._splits(split))

    def fingerprint(self, split: int) -> str:
        """A single folder has the fingerprint of its texts: a run may continue from either."""
        first, *others = (part.fingerprint for part in self._splits(split))
        return hash_of(first, *others) if others else first

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the shards."""
        return load_tokenizer(open_tokenizer_folder(self.folders[0], self._cache))

    def stream(self, split: int, tokenizer: Tokenizer, folder: Path) -> ShardStream:
        """Token stream of a split. ValueError for another tokenizer than the shards', or a shard of another size."""
        if tokenizer.fingerprint() != self.manifests[0].tokenizer:
            reason = "was prepared with another tokenizer than data.tokenizer names: its ids mean other tokens"
            remedy = "give --config.data.tokenizer=shards, or prepare the text with yours"
            raise ValueError(f"{self.folders[0]} {reason}; {remedy}")
        files, shards = [], []
        for folder, part in zip(self.folders, self._splits(split), strict=True):
            for shard in part.shards:
                if wrong := folder.wrong_size(shard.name, shard.bytes):
                    path = folder.path(shard.name)
                    raise ValueError(f"{path} {wrong}; delete it if it is there and run the prepare command again")
                # By content: shards are padded, so that another corpus at this address often has the same sizes.
                files.append(folder.local(shard.name, mirror(folder, self._cache) / shard.sha256[:16]))
                shards.append(shard)
        return ShardStream(files, shards, self.manifests[0].dtype)


def mirror(folder: Folder, cache: Path) -> Path:
    """The local folder for copies of a remote folder's files."""
    return cache / f"mirror-{content_key(url=folder.url)}"


def open_tokenizer_folder(folder: Folder, cache: Path) -> Path:
    """A local path of the tokenizer of a prepared folder."""
    inner = Folder(folder.path("tokenizer"))
    if not inner.is_remote:
        return Path(folder.url) / "tokenizer"
    target = mirror(folder, cache) / "tokenizer"
    for name in inner.names():  # fetched each time: small, and another tokenizer's files may have the same sizes
        inner.fetch(name, target / name)
    return target
