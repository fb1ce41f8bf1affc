"""What the workers of `prepare` do: look at a part of a source, write the shards of a range of documents.

Both are functions of their arguments and the text alone, and leave their result whole or not at all: whoever is killed
does them again and gets the same bytes.
"""
import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from softmask_jax.data.shards import RECORD_TOKENS, Shard
from softmask_jax.data.sources.corpus import SPLIT_NAMES, Scan, checked, encode_documents, scan, token_dtype
from softmask_jax.data.sources.documents import BadRow, Document, Source
from softmask_jax.data.sources.storage import ELSEWHERE, Folder, file_chunks, sha256
from softmask_jax.data.tokenizers import Tokenizer
from softmask_jax.io.files import DISK_FULL, explained, write_atomically


Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Task:
    """A range of a source's items: from item `skip` of `part` on, `items` [n] ITEM, their `roles` [n]."""

    number: int
    part: int
    skip: int
    items: np.ndarray
    roles: np.ndarray


@dataclasses.dataclass(frozen=True)
class Job:
    """What all tasks of one preparation share. `scratch`: a folder on this machine for what is not finished."""

    source: Source
    scratch: Path
    folder: Folder
    tokenizer: Tokenizer | None = None

    def scan_file(self, part: int) -> Path:
        return self.scratch / f"scan-{part:05}.npz"

    def shards_file(self, task: int) -> Path:
        return self.scratch / f"shards-{task:05}.json"


def scan_part(job: Job, part: int, progress: Progress) -> int:
    """Scans a part and keeps what it found; the number of its items."""
    found = scan(job.source.read(part))
    buffer = io.BytesIO()
    np.savez(buffer, items=found.items, bad=np.array(found.bad, str))
    write_atomically(job.scan_file(part), [buffer.getvalue()], elsewhere=ELSEWHERE)
    return len(found.items)


def read_scan(job: Job, part: int) -> Scan | None:
    """What `scan_part` kept; None if it did not finish."""
    try:
        with np.load(job.scan_file(part), allow_pickle=False) as found:
            return Scan(found["items"], tuple(map(str, found["bad"])))
    except FileNotFoundError:
        return None


def write_shards(job: Job, task: Task, progress: Progress) -> dict[str, Shard]:
    """Tokenizes a task's documents into a shard for each split that has any, and keeps their descriptions.

    progress(documents, tokens) is told what was written since the last time.
    """
    texts = checked(_items(job.source, task), task.items, task.roles, splits=(0, 1))
    writers = {}
    try:
        for split, ids in encode_documents(texts, job.tokenizer):
            if split not in writers:
                name = f"{SPLIT_NAMES[split]}-{task.number:05}.arrayrecord"
                documents = int(np.count_nonzero(task.roles == split))
                writers[split] = _Shard(job, name, documents)
            writers[split].write(ids)
            progress(int(np.count_nonzero(ids == job.tokenizer.eos_id)), len(ids))
        shards = {SPLIT_NAMES[split]: writer.finish() for split, writer in sorted(writers.items())}
    finally:
        for writer in writers.values():
            writer.temporary.unlink(missing_ok=True)
    keep_shards(job, task.number, shards)
    return shards


def keep_shards(job: Job, task: int, shards: dict[str, Shard]) -> None:
    """Remembers that the shards of a task are finished."""
    described = json.dumps({split: dataclasses.asdict(shard) for split, shard in shards.items()})
    write_atomically(job.shards_file(task), described, elsewhere=ELSEWHERE)


def read_shards(job: Job, task: int) -> dict[str, Shard] | None:
    """What `keep_shards` wrote; None if the task did not finish, or one of its shards is not there any more."""
    try:
        described = json.loads(job.shards_file(task).read_text("utf-8"))
    except FileNotFoundError:
        return None
    shards = {split: Shard(**shard) for split, shard in described.items()}
    whole = all(job.folder.size(shard.name) == shard.bytes for shard in shards.values())
    return shards if whole else None


def _items(source: Source, task: Task) -> Iterator[Document | BadRow]:
    left, skip = len(task.items), task.skip
    for part in range(task.part, source.num_parts()):
        for item in source.read(part):
            if skip:
                skip -= 1
                continue
            if not left:
                return
            left -= 1
            yield item


class RecordFile:
    """An ArrayRecord file of token ids, `RECORD_TOKENS` a record; `tokens` counts them."""

    def __init__(self, path: Path, dtype: np.dtype):
        from array_record.python import array_record_module

        # Ids hardly compress, and windows are read at random: one record a group, as it is.
        self._file = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        self._dtype, self.tokens = np.dtype(dtype).newbyteorder("<"), 0
        self._rest = np.zeros(0, self._dtype)

    def write(self, ids: np.ndarray) -> None:
        """Raises OSError when the disk is full."""
        self.tokens += len(ids)
        ids = np.concatenate([self._rest, ids.astype(self._dtype)])
        whole = len(ids) // RECORD_TOKENS * RECORD_TOKENS
        with _system_errors():
            for record in ids[:whole].reshape(-1, RECORD_TOKENS):
                self._file.write(record.tobytes())
        self._rest = ids[whole:]

    def close(self) -> None:
        """Raises OSError when the disk is full."""
        with _system_errors():
            if len(self._rest):
                self._file.write(self._rest.tobytes())
            self._file.close()


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """What the operating system said, which ArrayRecord passes on as the text of a RuntimeError, as an OSError."""
    try:
        yield
    except RuntimeError as error:
        code = next((code for code in DISK_FULL if os.strerror(code) in str(error)), None)
        raise OSError(code, os.strerror(code)) if code else OSError(str(error)) from error


class _Shard:
    """A shard that is being written."""

    def __init__(self, job: Job, name: str, documents: int):
        self._folder, self._name, self._documents = job.folder, name, documents
        self.temporary = job.scratch / f".{name}.{os.getpid()}.tmp"
        self._records = RecordFile(self.temporary, token_dtype(job.tokenizer))

    def write(self, ids: np.ndarray) -> None:
        """Raises OSError, one line, when the disk is full."""
        with explained(self._folder.path(self._name), ELSEWHERE):
            self._records.write(ids)

    def finish(self) -> Shard:
        """Raises OSError, one line, when the disk is full."""
        with explained(self._folder.path(self._name), ELSEWHERE):
            self._records.close()
        size, digest = self.temporary.stat().st_size, sha256(file_chunks(self.temporary))
        self._folder.put(self.temporary, self._name)
        return Shard(self._name, self._records.tokens, self._documents, size, digest)
