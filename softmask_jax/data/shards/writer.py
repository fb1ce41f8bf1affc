"""Workers of `prepare`, deterministic and atomic: rerunning a killed worker gives identical bytes."""
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from softmask_jax.data.shards import RECORD_TOKENS, Shard
from softmask_jax.data.sources.corpus import SPLIT_NAMES, Scan, checked, encode_documents, scan, token_dtype
from softmask_jax.data.sources.documents import BadRow, Document, Source
from softmask_jax.data.sources.storage import ELSEWHERE, Folder
from softmask_jax.data.tokenizers import Tokenizer
from softmask_jax.io.files import DISK_FULL, explained, write_atomically

Progress = Callable[[int, int], None]  # called with numbers of further documents and tokens


@dataclasses.dataclass(frozen=True)
class Task:
    """A range of a source's items from item `skip` of `part` on: `items` [n] ITEM and their `roles` [n]."""

    number: int
    part: int
    skip: int
    items: np.ndarray
    roles: np.ndarray


@dataclasses.dataclass(frozen=True)
class Job:
    """Shared by all tasks of a preparation. `scratch`: a local folder for unfinished work."""

    source: Source
    scratch: Path
    folder: Folder
    tokenizer: Tokenizer | None = None

    def scan_file(self, part: int) -> Path:
        return self.scratch / f"scan-{part:05}.npz"

    def shards_file(self, task: int) -> Path:
        return self.scratch / f"shards-{task:05}.json"


def scan_part(job: Job, part: int, progress: Progress) -> int:
    """Scan a part and save the result; returns the number of its items."""
    result = scan(job.source.read(part))
    buffer = io.BytesIO()
    np.savez(buffer, items=result.items, bad=np.array(result.bad, str))
    write_atomically(job.scan_file(part), [buffer.getvalue()], elsewhere=ELSEWHERE)
    return len(result.items)


def read_scan(job: Job, part: int) -> Scan | None:
    """The result of `scan_part`; None if it did not finish."""
    try:
        with np.load(job.scan_file(part), allow_pickle=False) as saved:
            return Scan(saved["items"], tuple(map(str, saved["bad"])))
    except FileNotFoundError:
        return None


def write_shards(job: Job, task: Task, progress: Progress) -> dict[str, Shard]:
    """Tokenize a task's documents into one shard for each split; save descriptions. OSError when the disk is full."""
    texts = checked(_items(job.source, task), task.items, task.roles, splits=(0, 1))
    dtype, pid = token_dtype(job.tokenizer), os.getpid()
    names = [f"{split}-{task.number:05}.arrayrecord" for split in SPLIT_NAMES]
    temporaries = [job.scratch / f".{name}.{pid}.tmp" for name in names]
    files: dict[int, RecordFile] = {}
    shards: dict[str, Shard] = {}
    try:
        for split, ids in encode_documents(texts, job.tokenizer):
            if split not in files:
                files[split] = RecordFile(temporaries[split], dtype)
            with explained(job.folder.path(names[split]), ELSEWHERE):
                files[split].write(ids)
            progress(int(np.count_nonzero(ids == job.tokenizer.eos_id)), len(ids))
        for split, file in sorted(files.items()):
            with explained(job.folder.path(names[split]), ELSEWHERE):
                file.close()
            documents, size = int(np.count_nonzero(task.roles == split)), temporaries[split].stat().st_size
            with open(temporaries[split], "rb") as written:
                digest = hashlib.file_digest(written, "sha256").hexdigest()
            job.folder.put(temporaries[split], names[split])
            shards[SPLIT_NAMES[split]] = Shard(names[split], file.tokens, documents, size, digest)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    keep_shards(job, task.number, shards)
    return shards


def keep_shards(job: Job, task: int, shards: dict[str, Shard]) -> None:
    """Save the descriptions of a task's finished shards."""
    described = json.dumps({split: dataclasses.asdict(shard) for split, shard in shards.items()})
    write_atomically(job.shards_file(task), described, elsewhere=ELSEWHERE)


def read_shards(job: Job, task: int) -> dict[str, Shard] | None:
    """The descriptions of `keep_shards`; None if the task did not finish or one of its shards is gone."""
    try:
        described = json.loads(job.shards_file(task).read_text("utf-8"))
    except FileNotFoundError:
        return None
    shards = {split: Shard(**shard) for split, shard in described.items()}
    wrong = any(job.folder.wrong_size(shard.name, shard.bytes) for shard in shards.values())
    return None if wrong else shards


def _items(source: Source, task: Task) -> Iterator[Document | BadRow]:
    items = itertools.chain.from_iterable(map(source.read, range(task.part, source.num_parts())))
    return itertools.islice(items, task.skip, task.skip + len(task.items))


class RecordFile:
    """An ArrayRecord file of `tokens` ids, `RECORD_TOKENS` a record. Methods raise OSError when the disk is full."""

    def __init__(self, path: Path, dtype: np.dtype):
        from array_record.python import array_record_module

        # Ids hardly compress, and windows are read at random: one uncompressed record a group.
        self._file = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        self._dtype, self.tokens = np.dtype(dtype).newbyteorder("<"), 0
        self._rest = np.zeros(0, self._dtype)

    def write(self, ids: np.ndarray) -> None:
        self.tokens += len(ids)
        ids = np.concatenate([self._rest, ids.astype(self._dtype)])
        end = len(ids) // RECORD_TOKENS * RECORD_TOKENS
        with _system_errors():
            for record in ids[:end].reshape(-1, RECORD_TOKENS):
                self._file.write(record.tobytes())
        self._rest = ids[end:]

    def close(self) -> None:
        with _system_errors():
            if len(self._rest):
                self._file.write(self._rest.tobytes())
            self._file.close()


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """Turn ArrayRecord's RuntimeError, whose text is the operating system's message, into an OSError."""
    try:
        yield
    except RuntimeError as error:
        code = next((code for code in DISK_FULL if os.strerror(code) in str(error)), None)
        raise OSError(code, os.strerror(code)) if code else OSError(str(error)) from error
