"""Cache of token streams: `<key>.bin` (raw integers) and, written last, `<key>.json` (dtype, length, checksum).

The key hashes everything that decides the content: concurrent writers write the same bytes."""
import contextlib
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from softmask_jax.io.files import explained, write_atomically

logger = logging.getLogger("softmask_jax.data")

ENVIRONMENT_VARIABLE = "SOFTMASK_JAX_CACHE"
STALE_SECONDS = 24 * 3600


def cache_folder(configured: str = "") -> Path:
    """The folder for cached data: `configured`, else $SOFTMASK_JAX_CACHE, else softmask_jax in the XDG cache folder."""
    if folder := configured or os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(os.path.expanduser(folder))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softmask_jax"


def content_key(**parts) -> str:
    """Hash of JSON-able `parts`, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def write_cached(path: Path, chunks: Iterable[bytes]) -> None:
    """`files.write_atomically` into the cache, whose folder is made and tidied."""
    elsewhere = f"point config.data.cache_dir or {ENVIRONMENT_VARIABLE} at a folder that can be written"
    with explained(path.parent, elsewhere):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Temporaries of killed processes: a live writer's is younger than this.
        for leftover in path.parent.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                    leftover.unlink()
    write_atomically(path, chunks, elsewhere=elsewhere)


def write_stream(folder: Path, key: str, arrays: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Store the concatenation of integer `arrays` ([n] each) under `key`. Raises OSError as `write_cached`."""
    written = {"format": 1, "dtype": dtype.name, "tokens": 0, "crc32": 0}

    def chunks() -> Iterator[bytes]:
        for array in arrays:
            chunk = np.ascontiguousarray(array, dtype=dtype).tobytes()
            written["tokens"] += len(array)
            written["crc32"] = zlib.crc32(chunk, written["crc32"])
            yield chunk

    write_cached(folder / f"{key}.bin", chunks())
    write_cached(folder / f"{key}.json", [json.dumps(written).encode()])


def open_stream(folder: Path, key: str) -> np.ndarray | None:
    """The stream [tokens] stored under `key`, mapped read-only; None when it is missing or damaged (logged)."""
    path, marker = folder / f"{key}.bin", folder / f"{key}.json"
    if not marker.exists():
        return None
    try:
        expected = json.loads(marker.read_text("utf-8"))
        dtype, size = np.dtype(expected["dtype"]), int(expected["tokens"])
        if path.stat().st_size != size * dtype.itemsize:
            raise ValueError(f"{path.stat().st_size} bytes instead of {size * dtype.itemsize}")
        stream = np.asarray(np.memmap(path, dtype=dtype, mode="r")) if size else np.zeros(0, dtype)
        if zlib.crc32(stream) != expected["crc32"]:
            raise ValueError("its checksum is wrong")
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the token cache %s is damaged (%s); building it again", path, error)
        return None
    return stream
