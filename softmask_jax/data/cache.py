"""Files that are either whole or not there: the cache of tokenized streams, and atomic writes.

A stream is `<key>.bin` (raw unsigned integers) and `<key>.json` (dtype, length, checksum), the latter written last: it
is the commit marker. The key is a hash of everything the content depends on, so writers of one key write the same bytes
and any interleaving of them leaves a whole file. Readers map the file, so replacing it under them is harmless.
"""
import contextlib
import errno
import hashlib
import json
import logging
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

logger = logging.getLogger("softmask_jax.data")

ENVIRONMENT_VARIABLE = "SOFTMASK_JAX_CACHE"
STALE_SECONDS = 24 * 3600
CHUNK_BYTES = 1 << 24


def cache_folder(configured: str = "") -> Path:
    """The folder for cached data: `configured`, else $SOFTMASK_JAX_CACHE, else softmask_jax in the XDG cache folder."""
    folder = configured or os.environ.get(ENVIRONMENT_VARIABLE, "")
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softmask_jax"


def content_key(**parts) -> str:
    """A hexadecimal name, 32 digits, for what depends on JSON-able `parts` and nothing else."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@contextlib.contextmanager
def one_line_disk_errors(folder: Path) -> Iterator[None]:
    """Turns the operating system's refusal to write into one OSError, same errno, that names folder and remedy."""
    try:
        yield
    except OSError as error:
        remedy = f"point data.cache_dir or {ENVIRONMENT_VARIABLE} at another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"no space left to write {folder}: free some, or {remedy}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise OSError(error.errno, f"cannot write {folder} ({error.strerror}): {remedy}") from error
        raise


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Writes `chunks` so that `path` holds its old content or all of the new, even when killed or out of space.

    Raises OSError (one line, with the folder) when the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with one_line_disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale_temporaries(path.parent)
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _remove_stale_temporaries(folder: Path) -> None:
    # Only what a killed process left behind: a live writer's temporary is younger than this.
    for leftover in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                leftover.unlink()


def _sync_folder(folder: Path) -> None:
    # Without it a power cut may lose the rename although the file's content was synced.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_stream(folder: Path, key: str, arrays: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Stores the concatenation of integer `arrays` ([n] each) under `key`. Raises OSError as `write_atomically`."""
    dtype = np.dtype(dtype)
    written = {"format": 1, "dtype": dtype.name, "tokens": 0, "crc32": 0}

    def chunks() -> Iterator[bytes]:
        for array in arrays:
            chunk = np.ascontiguousarray(array, dtype=dtype).tobytes()
            written["tokens"] += len(array)
            written["crc32"] = zlib.crc32(chunk, written["crc32"])
            yield chunk

    write_atomically(folder / f"{key}.bin", chunks())
    write_atomically(folder / f"{key}.json", [json.dumps(written).encode()])


def open_stream(folder: Path, key: str) -> np.ndarray | None:
    """The stream [tokens] stored under `key`, mapped read-only; None when there is none, or a damaged one (logged)."""
    path, marker = folder / f"{key}.bin", folder / f"{key}.json"
    if not marker.exists():
        return None
    try:
        expected = json.loads(marker.read_text())
        dtype, size = np.dtype(expected["dtype"]), int(expected["tokens"])
        if path.stat().st_size != size * dtype.itemsize:
            raise ValueError(f"{path.stat().st_size} bytes instead of {size * dtype.itemsize}")
        stream = np.asarray(np.memmap(path, dtype=dtype, mode="r")) if size else np.zeros(0, dtype)
        crc = 0
        per_chunk = CHUNK_BYTES // dtype.itemsize
        for start in range(0, size, per_chunk):
            crc = zlib.crc32(stream[start : start + per_chunk], crc)
        if crc != expected["crc32"]:
            raise ValueError("its checksum is wrong")
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the token cache %s is damaged (%s); building it again", path, error)
        return None
    return stream
