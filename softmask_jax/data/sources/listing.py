"""Files by glob patterns, local or behind URLs such as gs://, plain or compressed."""
import contextlib
import glob
import gzip
import hashlib
import importlib
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from softmask_jax.io.files import literal_part, one_line, split_paths

# Properties of a remote file that change when it is rewritten; each file system has its own.
REMOTE_STAMPS = ("generation", "etag", "ETag", "updated", "mtime", "LastModified", "last_modified", "created")
READ_BUFFER = 1 << 20


class Listed(NamedTuple):
    """A file: name for messages, path (a str is a URL), bytes, and a stamp that changes when it is rewritten."""

    name: str
    path: Path | str
    size: int
    stamp: str


def listed(name: str, path: Path) -> Listed:
    """A local file as it is now."""
    stat = path.stat()
    return Listed(name, path, stat.st_size, str(stat.st_mtime_ns))


def list_files(patterns: str | Iterable[str], kind: str, example: str = "texts/**/*.txt") -> tuple[Listed, ...]:
    """Files that match glob patterns (comma-separated or a sequence), each once, by pattern, then by name.
    Existing paths are literal. ValueError, FileNotFoundError for no match, ImportError or OSError for a bad URL."""
    commas = isinstance(patterns, str) and "," in patterns
    # Names in a sequence may hold commas, but no zero byte.
    lists = [(patterns, ",")] if isinstance(patterns, str) else [(one, "\0") for one in patterns]
    patterns = [pattern for text, separator in lists for pattern in split_paths(text, separator)]
    if not patterns:
        raise ValueError(f"data.source={kind} needs data.paths: glob patterns, comma-separated, such as {example}")
    files: dict[Path | str, Listed] = {}
    for pattern in patterns:
        count, matches = _remote_matches(pattern) if "://" in pattern else _local_matches(pattern)
        files |= matches | files  # the first name of each
        if matches:
            continue
        if count and os.path.islink(pattern):
            reason = f"{pattern!r} is a link to a file that does not exist; mend it"
        elif count:
            reason = f"{pattern!r} matches only folders; for their files use {pattern.rstrip('/') + '/**/*'!r}"
        else:
            hint = "; commas part patterns, ? stands for one in a name" if commas else ""
            reason = f"no file matches {pattern!r} (looked from {os.getcwd()}){hint}"
        raise FileNotFoundError(f"data.paths: {reason}")
    if packed := [file.name for file in files.values() if kind == "jsonl" and file.name.endswith(".zst")]:
        required("zstandard", "zst", f"{packed[0]}: *.zst")
    return tuple(files.values())


def _local_matches(pattern: str) -> tuple[int, dict[Path, Listed]]:
    pattern = os.path.expanduser(pattern)
    fixed = literal_part(pattern)
    matches = sorted(glob.glob(glob.escape(fixed) + pattern.removeprefix(fixed), recursive=True))
    paths = [Path(match) for match in matches if os.path.isfile(match)]
    return len(matches), {path.resolve(): listed(path.as_posix(), path) for path in paths}


def _remote_matches(pattern: str) -> tuple[int, dict[str, Listed]]:
    import fsspec

    scheme = pattern.split("://")[0]
    try:
        system, inside = fsspec.core.url_to_fs(pattern)
    except ImportError as error:
        remedy = "pip install 'softmask_jax[gcs]'" if scheme in ("gs", "gcs") else one_line(error)
        raise ImportError(f"data.paths: {pattern!r} needs a package that is missing: {remedy}") from error
    except ValueError as error:
        raise ValueError(f"data.paths: {pattern!r}: nothing here reads {scheme}:// (gs:// and files do)") from error
    try:
        matches = {inside: system.info(inside)} if system.isfile(inside) else system.glob(inside, detail=True)
    except Exception as error:  # every file system, and the network below it, has errors of its own
        remedy = "check the network and your credentials"
        raise OSError(f"data.paths: {pattern!r} cannot be listed ({_named(error)}); {remedy}") from error
    files = {}
    for path, properties in sorted(matches.items()):
        if properties["type"] == "file":
            url = system.unstrip_protocol(path)
            stamp = "/".join(str(properties[key]) for key in REMOTE_STAMPS if key in properties)
            files[url] = Listed(url, url, properties["size"], stamp)
    return len(matches), files


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def open_file(path: Path | str) -> BinaryIO:
    """The file for reading bytes. Raises OSError of the original kind with its path and a remedy."""
    hint = "fix its permissions or leave it out of data.paths"
    try:
        if isinstance(path, Path):
            return path.open("rb", buffering=READ_BUFFER)
        import fsspec

        # `fsspec.open` would take a name for a pattern.
        system, inside = fsspec.core.url_to_fs(path)
        return io.BufferedReader(system.open(inside, "rb"), READ_BUFFER)
    except OSError as error:
        raise type(error)(f"{path}: cannot be read ({error.strerror or error}); {hint}") from error
    except Exception as error:  # as in `_remote_matches`
        raise OSError(f"{path}: cannot be read ({_named(error)}); check the network, {hint}") from error


def fingerprint(*parts: object) -> str:
    """A hash of `repr`s."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def is_compressed(file: Listed) -> bool:
    return file.name.endswith((".gz", ".zst"))


def required(module: str, extra: str, purpose: str):
    """The module. Raises ImportError, with the extra that installs it, for a missing package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs a package: pip install 'softmask_jax[{extra}]'") from error


@contextlib.contextmanager
def open_unpacked(file: Listed) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked for *.gz and *.zst. Raises ValueError when these are damaged or cut short."""
    with open_file(file.path) as opened:
        if not is_compressed(file):
            yield opened
            return
        if file.name.endswith(".gz"):
            unpacked, damage = gzip.GzipFile(fileobj=opened), (EOFError, zlib.error, gzip.BadGzipFile)
        else:
            import zstandard

            unpacked, damage = _ZstdFrames(opened), (EOFError, zstandard.ZstdError)
        try:
            yield io.BufferedReader(unpacked, READ_BUFFER)
        except damage as error:
            reason = f"damaged or cut short ({one_line(error)})"
            raise ValueError(f"{file.name}: {reason}; fetch or compress it again") from error


class _ZstdFrames(io.RawIOBase):
    """Bytes of zstd frames; zstandard's own reader accepts a file that was cut short."""

    def __init__(self, file: BinaryIO):
        self._file, self._frame, self._rest, self._ready = file, None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        import zstandard

        while not self._ready:
            packed = self._rest or self._file.read(READ_BUFFER)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready, self._rest = memoryview(self._frame.decompress(packed)), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
