"""Paths of local folders and of buckets, `gs://bucket/folder`, with pathlib's methods; what buckets do otherwise.

A bucket has objects and no folders: an object appears whole or not at all, and nothing needs a rename."""
import contextlib
import errno
import functools
import io
import os
import re
import shutil
import uuid
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from softmask_jax.io.bucket import ObjectReader, ObjectWriter, filesystem, plain_errors

SCHEME = "gs://"
READ_BLOCK = 1 << 22


def to_path(text: str | os.PathLike) -> Path:
    """A local path, ~ expanded, or a `BucketPath`. ValueError for other URLs, which would be local folders."""
    text = os.fspath(text)
    if not text.startswith(SCHEME) and re.match(r"[a-z][a-z0-9+.-]*://", text):
        raise ValueError(f"{text}: only {SCHEME} and folders of mounted file systems can be used.")
    return BucketPath(text) if text.startswith(SCHEME) else Path(os.path.expanduser(text))


def in_bucket(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith(SCHEME)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that is in it."""
    (folder.rmtree if isinstance(folder, BucketPath) else functools.partial(shutil.rmtree, folder))()


def problem(path: str | os.PathLike) -> str:
    """Why a folder in a bucket cannot be used; "" if it can."""
    bucket, _, name = os.fspath(path).removeprefix(SCHEME).partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{1,220}[a-z0-9]", bucket):
        return f"'{bucket}' is no name of a bucket"
    if not name.strip("/"):
        return "it names a bucket without a folder"
    if unusable := re.search(r"[*?\[\]#\\\x00-\x1f]|//|(^|/)\.\.?(/|$)", name):
        return f"the libraries that read buckets misread '{unusable[0]}' in it"
    return ""


class Stat(NamedTuple):
    """Size of an object in bytes, as pathlib and as etils name it."""

    st_size: int

    @property
    def length(self) -> int:
        return self.st_size


class BucketPath(type(epath.Path("/"))):
    """A path in a bucket. `mkdir` does nothing: folders exist where there are objects."""

    def __truediv__(self, name):
        return type(self)(f"{self}/{os.fspath(name)}")

    def joinpath(self, *names):
        return functools.reduce(lambda path, name: path / name, names, self)

    @property
    def parent(self):
        return type(self)(os.path.dirname(str(self))) if len(self.parts) > 3 else self

    def with_name(self, name: str):
        return self.parent / name

    @property
    def bucket(self) -> str:
        return self.parts[2]

    def absolute(self):
        return self

    def resolve(self, strict: bool = False):
        if strict and not self.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return self

    def expanduser(self):
        return self

    def samefile(self, other) -> bool:
        return os.fspath(other).rstrip("/") == str(self)

    def is_symlink(self) -> bool:
        return False

    def about(self) -> dict[str, Any]:
        """The `type` of what is there, and of an object `size`, `crc32c`, `generation`. FileNotFoundError."""
        with plain_errors(self):
            return filesystem().info(str(self))

    def _type(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self.about()["type"]
        return ""

    def exists(self) -> bool:
        return bool(self._type())

    def is_file(self) -> bool:
        return self._type() == "file"

    def is_dir(self) -> bool:
        return self._type() == "directory"

    def stat(self) -> "Stat":
        return Stat(self.about()["size"])

    def iterdir(self) -> Iterator:
        with plain_errors(self):
            names = filesystem().ls(str(self), detail=False)
        return (self / name for name in sorted({name.rstrip("/").rpartition("/")[2] for name in names}))

    def glob(self, pattern: str) -> Iterator:
        with plain_errors(self):
            return iter([type(self)(SCHEME + name) for name in filesystem().glob(f"{self}/{pattern}")])

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        pass

    def read_bytes(self) -> bytes:
        with plain_errors(self):
            return filesystem().cat_file(str(self))

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`."""
        with plain_errors(self):
            return filesystem().cat_file(str(self), start=start, end=end)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode("utf-8", errors or "strict")

    def write_bytes(self, data: bytes) -> int:
        """Put an object; readers see the old one or this one."""
        with plain_errors(self, writes=True):
            filesystem().pipe_file(str(self), bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode())

    def create(self, data: bytes) -> bool:
        """Put an object unless there is one; True if the object there has this content (an answer may have been lost)."""
        with plain_errors(self, writes=True):
            try:
                filesystem().pipe_file(str(self), data, mode="create")
                return True
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):
                    return self.read_bytes() == data
                return False

    def check_writable(self) -> None:
        """Raise BucketError if no object can be put beside this one."""
        probe = self.with_name(f".{self.name}.{uuid.uuid4().hex[:8]}.tmp")
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)

    def open(self, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None):
        """A file to read, with `seek`; or to write ("wb", "xb"), whole once closed, absent after an exception."""
        if "w" in mode or "x" in mode:
            file = ObjectWriter(str(self), mode.replace("t", "").replace("b", "") + "b")
            return file if "b" in mode else io.TextIOWrapper(file, encoding or "utf-8", errors)
        file = io.BufferedReader(ObjectReader(str(self)), READ_BLOCK)
        return file if "b" in mode else io.TextIOWrapper(file, encoding or "utf-8", errors)

    def unlink(self, missing_ok: bool = False) -> None:
        with plain_errors(self):
            try:
                filesystem().rm_file(str(self))
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def rmtree(self, missing_ok: bool = False) -> None:
        with plain_errors(self):
            try:
                filesystem().rm(str(self), recursive=True)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def copy_objects(self, target: "BucketPath", last: Container[str]) -> None:
        """Copy all objects below this path within the store, those named in `last` after the others."""
        with plain_errors(self):
            for name in sorted(self.objects(), key=lambda name: (name in last, name)):
                filesystem().cp_file(f"{self}/{name}", f"{target}/{name}")

    def objects(self) -> dict[str, dict[str, Any]]:
        """The objects below this path by relative name, from one listing: `size`, `crc32c`, `generation`."""
        with plain_errors(self, writes=True):  # a missing folder is an empty listing, a missing bucket none
            listed = filesystem().find(str(self), detail=True)
        start = len(str(self).removeprefix(SCHEME)) + 1
        return {name[start:]: about for name, about in sorted(listed.items()) if not name.endswith("/")}
