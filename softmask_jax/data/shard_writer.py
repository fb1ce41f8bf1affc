"""What the workers of `prepare` do: look at a part of a source, write the shards of a range of documents.

Both are functions of their arguments and the text alone, and leave their result whole or not at all: whoever is killed
does them again and gets the same bytes.
"""
import ctypes
import dataclasses
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from softmask_jax.data.corpus import SPLIT_NAMES, Scan, checked, encode_documents, scan, token_dtype
from softmask_jax.data.documents import BadRow, Document, Source
from softmask_jax.data.shards import RECORD_TOKENS, Shard
from softmask_jax.data.storage import ELSEWHERE, Folder, file_chunks, sha256
from softmask_jax.data.tokenizers import Tokenizer
from softmask_jax.files import DISK_FULL, explained, write_atomically


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


def scan_part(job: Job, part: int) -> int:
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


def write_shards(job: Job, task: Task, progress=lambda documents, tokens: None) -> dict[str, Shard]:
    """Tokenizes a task's documents into a shard for each split that has any, and keeps their descriptions."""
    texts = checked(_items(job.source, task), task.items, task.roles, splits=(0, 1))
    writers = {}
    try:
        for split, ids in encode_documents(texts, job.tokenizer):
            if split not in writers:
                name = f"{SPLIT_NAMES[split]}-{task.number:05}.arrayrecord"
                documents = int(np.count_nonzero(task.roles == split))
                writers[split] = _Writer(job, name, documents)
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
        described = json.loads(job.shards_file(task).read_text())
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


class _Writer:
    """One ArrayRecord file of `RECORD_TOKENS` ids a record."""

    def __init__(self, job: Job, name: str, documents: int):
        from array_record.python import array_record_module

        self.temporary = job.scratch / f".{name}.{os.getpid()}.tmp"
        self._folder, self._name, self._documents, self._tokens = job.folder, name, documents, 0
        self._dtype = token_dtype(job.tokenizer).newbyteorder("<")
        self._rest = np.zeros(0, self._dtype)
        # Ids hardly compress, and windows are read at random: one record a group, as it is.
        self._file = array_record_module.ArrayRecordWriter(str(self.temporary), "group_size:1,uncompressed")

    def write(self, ids: np.ndarray) -> None:
        ids = np.concatenate([self._rest, ids.astype(self._dtype)])
        whole = len(ids) // RECORD_TOKENS * RECORD_TOKENS
        for record in ids[:whole].reshape(-1, RECORD_TOKENS):
            self._write(record)
        self._rest = ids[whole:]

    def _write(self, ids: np.ndarray) -> None:
        self._tokens += len(ids)
        self._file.write(ids.tobytes())

    def finish(self) -> Shard:
        """Raises OSError, one line, when the disk is full."""
        with explained(self._folder.path(self._name), ELSEWHERE):
            try:
                if len(self._rest):
                    self._write(self._rest)
                self._file.close()
            except RuntimeError as error:  # the library's way to say what the operating system said
                code = next((code for code in DISK_FULL if os.strerror(code) in str(error)), None)
                raise OSError(code, os.strerror(code)) if code else OSError(str(error)) from error
        size, digest = self.temporary.stat().st_size, sha256(file_chunks(self.temporary))
        self._folder.put(self.temporary, self._name)
        return Shard(self._name, self._tokens, self._documents, size, digest)


# A worker's own copy of the job, set once by `start_worker`.
_worker: dict = {}


def start_worker(job: Job, parent: int, documents, tokens) -> None:
    """Makes this process a worker: it leaves Ctrl-C to its parent and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for every core
    _worker.update(job=job, documents=documents, tokens=tokens)


def work(task: Task | int) -> tuple[Task | int, object]:
    """`scan_part` of a number, `write_shards` of a task, in a worker."""
    job = _worker["job"]
    if not isinstance(task, Task):
        return task, scan_part(job, task)

    def progress(documents: int, tokens: int) -> None:
        for counter, count in ((_worker["documents"], documents), (_worker["tokens"], tokens)):
            with counter.get_lock():
                counter.value += count

    return task, write_shards(job, task, progress)
