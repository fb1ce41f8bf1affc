"""Google Cloud Storage through gcsfs: its client, errors in one line, objects as files."""
import contextlib
import errno
import functools
import io
import logging
import os
from collections.abc import Iterator

READ_SECONDS, CONNECT_SECONDS = 60, 10  # for a part of an answer; retried


class BucketError(OSError):
    """A bucket's refusal or silence; the message says what to do."""


@functools.cache
def filesystem():
    """The client of all buckets, without a cache of listings. ImportError, naming the extra, without gcsfs."""
    os.environ.setdefault("EPATH_USE_TF", "false")
    try:
        import aiohttp
        import fsspec
        from gcsfs.core import GCSFileSystem
    except ImportError as error:
        raise ImportError(f"gs:// folders need `pip install 'softmask_jax[gcs]'` ({error}).") from error
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of errors that it raises
    limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    settings = {"use_listings_cache": False, "requests_timeout": limits}
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        settings["token"] = "anon"
    # Orbax's paths get the same settings.
    fsspec.config.conf["gcs"] = settings | fsspec.config.conf.get("gcs", {})
    # Only the JSON API, which every bucket but zonal ones has; gcsfs's other class asks a second service about each.
    for name in ("gcs", "gs"):
        fsspec.register_implementation(name, GCSFileSystem, clobber=True)
    return GCSFileSystem()


@contextlib.contextmanager
def plain_errors(path: str | os.PathLike, writes: bool = False) -> Iterator[None]:
    """Turn errors of the client into `BucketError`; a missing object stays FileNotFoundError, unless one is written."""
    try:
        yield
    except (FileExistsError, IsADirectoryError, ImportError, BucketError):
        raise
    except FileNotFoundError as error:
        if not writes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path)) from error
        raise _error(errno.ENOENT, path, "there is no such bucket; give another, or create it") from error
    except Exception as error:
        text, code = " ".join(str(error).split()), getattr(error, "code", None)
        module = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) and text.startswith("Forbidden"):
            reason = "refused (403); grant roles/storage.objectAdmin on the bucket, or give another"
            raise _error(errno.EACCES, path, reason) from error
        if str(code) == "401" or module == "google":
            reason = "no valid credentials; run `gcloud auth application-default login`"
            raise _error(errno.EACCES, path, reason) from error
        if code is not None or module in ("aiohttp", "requests") or isinstance(error, TimeoutError):
            reason = f"the bucket does not answer ({text[:120] or type(error).__name__}); run the same command again"
            raise _error(errno.EIO, path, reason) from error
        raise


def _error(number: int, path: str | os.PathLike, reason: str) -> BucketError:
    return BucketError(number, f"{os.fspath(path)}: {reason}.")


class ObjectReader(io.RawIOBase):
    """An object's bytes, read by ranges."""

    def __init__(self, url: str):
        with plain_errors(url):
            about = filesystem().info(url)
        if about["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), url)
        self.name, self._size, self._position = url, about["size"], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        with plain_errors(self.name):
            content = filesystem().cat_file(self.name, start=self._position, end=end)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


class ObjectWriter(io.RawIOBase):
    """An object sent in parts; it exists once this is closed, and not after an exception in a `with` block."""

    def __init__(self, url: str, mode: str):
        self.name = url
        with plain_errors(url, writes=True):
            self._file = filesystem().open(url, mode)

    def writable(self) -> bool:
        return True

    def write(self, content) -> int:
        with plain_errors(self.name, writes=True):
            self._file.write(content)
        return memoryview(content).nbytes

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            with contextlib.suppress(Exception):
                self._file.discard()
            self._file.closed = True
        self.close()

    def close(self) -> None:
        if not self.closed:
            try:
                with plain_errors(self.name, writes=True):
                    self._file.close()
            finally:
                super().close()
