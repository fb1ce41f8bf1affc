"""Plain text: files, each one document or cut by a separator, and the interpreter's standard library."""
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from softmask_jax.data.sources.documents import BadRow, Document, Source, spans
from softmask_jax.data.sources.listing import Listed, fingerprint, listed, open_file

# Folders of tests, third-party code and build leftovers.
STDLIB_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
# Parts are neighbouring files of about this size.
PART_BYTES = 16 << 20
# Files with a separator are read in steps of this size, or of the current document if it is longer.
READ_BYTES = 4 << 20


@dataclass(frozen=True)
class FileSource(Source):
    """UTF-8 files, one document each, or several with a `separator`. Reading raises ValueError or OSError."""

    name: str
    listing: tuple[Listed, ...]
    separator: str = ""

    @cached_property
    def _groups(self) -> tuple[tuple[int, int], ...]:
        return spans((file.size for file in self.listing), PART_BYTES)

    def identity(self) -> str:
        return fingerprint(self.name, self.separator, self._groups, self.listing)

    def read(self, part: int) -> Iterator[Document]:
        separator = self.separator.encode()
        for file in self.listing[slice(*self._groups[part])]:
            offset = 0
            for number, content in enumerate(_pieces(file.path, separator)):
                name = f"{file.name}#{number}" if separator else file.name
                yield Document(name, decode(content, file.path, offset))
                offset += len(content) + len(separator)


def _pieces(path: Path | str, separator: bytes) -> Iterator[bytes]:
    # Bytes can be cut before they are decoded: no character of UTF-8 holds the beginning of another.
    rest = b""
    with open_file(path) as file:
        if not separator:
            yield file.read()
            return
        while chunk := file.read(max(READ_BYTES, len(rest))):
            *pieces, rest = (rest + chunk).split(separator)
            yield from pieces
    yield rest


def decode(content: bytes, path: Path | str, start: int = 0) -> str:
    """Text of the content at byte `start` of a file. Raises ValueError, with the first bad byte, for binary content."""
    bad = content.find(b"\0") if b"\0" in content else len(content)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = min(bad, error.start)
    if bad == len(content):
        return text
    remedy = "leave a binary file out of data.paths, or convert a text (iconv -f ENCODING -t UTF-8)"
    raise ValueError(f"{path}: byte {start + bad} (0x{content[bad]:02x}) is not UTF-8 text; {remedy}")


class LibrarySource(FileSource):
    """Files that the user did not choose: unreadable ones are bad rows."""

    def read(self, part: int) -> Iterator[Document | BadRow]:
        for file in self.listing[slice(*self._groups[part])]:
            try:
                yield Document(file.name, decode(file.path.read_bytes(), file.path))
            except OSError as error:
                yield BadRow(file.name, f"cannot be read ({error.strerror})")
            except ValueError:
                yield BadRow(file.name, "is not UTF-8 text")


def stdlib() -> LibrarySource:
    """The standard library's *.py files without tests, about 12 MB, by name. FileNotFoundError without sources."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        # `config-*` and `_sysconfigdata*` differ between builds: the same Python has the same corpus without them.
        subfolders[:] = [n for n in subfolders if n not in STDLIB_SKIPPED_FOLDERS and not n.startswith("config-")]
        paths = (Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata"))
        files += [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    if not files:
        reason = "this interpreter ships its standard library without *.py sources"
        raise FileNotFoundError(f"{root}: {reason}; use data.source=files with data.paths")
    return LibrarySource("stdlib", tuple(listed(name, path) for name, path in sorted(files)))
