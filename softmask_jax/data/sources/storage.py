"""Folders of finished files, local or in an object store (`gs://`), through fsspec."""
import hashlib
import os
from pathlib import Path

from softmask_jax.io.files import explained, sync_folder, write_atomically

CHUNK_BYTES = 1 << 22
ELSEWHERE = "give another --out"


class Folder:
    """A folder by path or URL; files appear in it whole or not at all. Raises ValueError for "" and unknown URLs."""

    def __init__(self, url: str | os.PathLike):
        import fsspec

        if not os.fspath(url).strip():
            raise ValueError("the path of a folder is empty; name one, . is the folder you are in")
        self.url = os.path.expanduser(os.fspath(url)).rstrip("/") or "/"
        self.is_remote = "://" in self.url
        try:
            if self.is_remote:
                self._files, self._root = fsspec.core.url_to_fs(self.url)
            else:  # "::" and "file:" are part of a local name
                self._files, self._root = fsspec.filesystem("file"), os.path.join(os.getcwd(), self.url)
        except (ImportError, ValueError) as error:
            remedy = "gs:// folders need `pip install 'softmask_jax[gcs]'`, or give a mounted folder"
            raise ValueError(f"{self.url}: {error}; {remedy}") from error

    def __str__(self) -> str:
        return self.url

    def path(self, name: str) -> str:
        """Path or URL of `name`, for messages."""
        return f"{self.url}/{name}"

    def names(self) -> list[str]:
        """Sorted names of files that are not hidden; [] for a missing folder."""
        try:
            self._files.invalidate_cache()
            entries = self._files.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        names = (entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file")
        return sorted(name for name in names if not name.startswith("."))

    def size(self, name: str) -> int | None:
        """Bytes of a file, None for a missing one."""
        try:
            self._files.invalidate_cache()
            return int(self._files.info(f"{self._root}/{name}")["size"])
        except FileNotFoundError:
            return None

    def wrong_size(self, name: str, expected: int) -> str:
        """Problem with a file that is missing or of another size; "" for others."""
        size = self.size(name)
        return "" if size == expected else "is missing" if size is None else f"has {size} bytes instead of {expected}"

    def read(self, name: str) -> bytes:
        """Content of a file. Raises FileNotFoundError."""
        return self._files.cat_file(f"{self._root}/{name}")

    def sha256(self, name: str) -> str:
        """Digest of the file in its store. Raises OSError."""
        with self._files.open(f"{self._root}/{name}", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def put(self, local: Path, name: str) -> None:
        """Move a finished file in, for a local folder from the same disk. Raises OSError."""
        with explained(self.path(name), ELSEWHERE):
            if self.is_remote:
                self._files.put_file(os.fspath(local), f"{self._root}/{name}")
                local.unlink()
                return
            Path(self._root).mkdir(parents=True, exist_ok=True)
            with open(local, "rb") as file:
                os.fsync(file.fileno())
            os.replace(local, Path(self._root, name))
        sync_folder(Path(self._root))

    def local(self, name: str, mirror: Path) -> Path:
        """The file's own path, or that of a copy of a remote file in the folder `mirror`, fetched if missing."""
        if not self.is_remote:
            return Path(self._root, name)
        path = mirror / name
        if not path.exists() or path.stat().st_size != self.size(name):
            self.fetch(name, path)
        return path

    def fetch(self, name: str, path: Path) -> None:
        """Copy the file to a local path. Raises OSError."""
        elsewhere = "point config.data.cache_dir at a larger disk"
        with explained(path, elsewhere):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._files.open(f"{self._root}/{name}", "rb") as file:
            write_atomically(path, iter(lambda: file.read(CHUNK_BYTES), b""), elsewhere=elsewhere)
