"""Small files that are whole or absent, and what to say when the disk does not take them."""
import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

# What a full disk, a used-up quota and a file-size limit answer.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EISDIR,
)


@contextlib.contextmanager
def explained(path: str | os.PathLike, elsewhere: str = "give a --workdir that can be written") -> Iterator[None]:
    """Turn the operating system's refusal to write into one OSError, same errno, that names `path` and a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            remedy = f"Free space and run the same command again, or {elsewhere}."
        elif error.errno in REFUSED:
            remedy = f"{elsewhere[0].upper()}{elsewhere[1:]}."
        else:
            raise
        raise OSError(error.errno, f"{os.strerror(error.errno)} while writing {path}. {remedy}") from error


def check_folder(path: str | os.PathLike, flag: str = "") -> None:
    """Raise a one-line ValueError for a local folder that Orbax or TensorStore would take for another, or refuse.

    flag: what named it, such as "--workdir=".
    """
    real = os.path.realpath(path)
    names = real.split("/")
    try:
        real.encode()
    except UnicodeEncodeError:
        reason = "its name is not UTF-8"
    else:
        reason = (
            "TensorStore takes the backslash in it for a slash" if "\\" in real
            else "Orbax takes 'gs:/' in it for a URL" if "gs:/" in f"{real}/"
            else f"Orbax takes /{names[1]} for {names[1]}://" if names[1] in ("gs", "s3", "az", "hf")
            else "TensorStore keeps names that end in .__lock for itself" if any(n.endswith(".__lock") for n in names)
            else ""
        )  # fmt: skip
    if reason:
        shown = os.fspath(path).encode(errors="backslashreplace").decode()
        raise ValueError(f"{flag}{shown}: {reason}; rename the folder or give another.")


def literal_part(path: str) -> str:
    """The longest beginning of a path that exists under just this name, "" if none does."""
    end = len(path)
    while end > 0 and not os.path.lexists(os.path.expanduser(path[:end])):
        end = max(path.rfind("/", 0, end), 0)
    return path[:end]


def split_paths(text: str, separator: str, is_one: Callable[[str], bool] | None = None) -> list[str]:
    """The paths or patterns that a value lists; a separator in the name of what exists parts nothing.

    is_one: whether a piece with separators in it is one path; by default, if they are in its `literal_part`, or in that
      of what follows its first colon or equals sign, as in `jsonl:PATH` and `name=PATH`.
    """

    def by_default(piece: str) -> bool:
        halves = [piece.partition(sign) for sign in ":="]
        paths = [piece, *(path for name, _, path in halves if path and separator not in name)]
        return any(separator not in path.removeprefix(literal_part(path)) for path in paths)

    is_one = is_one or by_default
    pieces, found = text.split(separator), []
    while pieces:
        joined = (separator.join(pieces[:count]) for count in range(len(pieces), 1, -1))
        one = next(filter(is_one, joined), pieces[0])
        pieces = pieces[one.count(separator) + 1 :]
        found.append(one if os.path.lexists(os.path.expanduser(one)) else one.strip())
    return [piece for piece in found if piece]


def check_writable(path: str, flag: str = "--json") -> None:
    """Raise a one-line OSError, before anything is measured, if no file can be written there; "" is no file."""
    if not path or is_device(path) and os.access(path, os.W_OK):
        return
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()
    except OSError as error:
        raise OSError(f"{flag}={path} cannot be written ({error.strerror}); give another file.") from error


def write_atomically(path: str | os.PathLike, content: str | Iterable[bytes], **explanation: str) -> None:
    """Write a file so that a kill or a full disk leaves the old content or the new, never a part.

    A link stays, and the file that it leads to is replaced. Devices and pipes are written as they are.

    Args:
      content: text, or chunks of bytes as they come.
      explanation: of `explained`.

    Raises:
      OSError: the disk is full or the folder cannot be written; the old file is still there.
    """
    chunks = [content.encode()] if isinstance(content, str) else content
    if is_device(path):
        with explained(path, **explanation), open(path, "wb") as file:
            file.writelines(chunks)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with explained(path, **explanation), open(temporary, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what processes left that were killed in `write_atomically`. name: of the file, a glob pattern."""
    for leftover in folder.glob(f".{name}.[0-9]*-*.tmp"):
        leftover.unlink(missing_ok=True)


def is_device(path: str | os.PathLike) -> bool:
    """Whether this is neither a file nor a folder but, for example, a pipe or /dev/null."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def write_json(path: str | os.PathLike, value) -> None:
    """`write_atomically` of a value that `plain` understands."""
    write_atomically(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def plain(value):
    """A value as JSON has it: numpy and jax scalars and arrays as numbers and lists, NaN and infinities as strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    array = np.asarray(value)
    if array.dtype.kind in "biu":
        return array.tolist()
    try:
        return plain(array.astype(np.float64).tolist())
    except (TypeError, ValueError):
        raise ValueError(f"{type(value).__name__} {value!r} cannot be written as JSON; pass numbers or text.") from None


def acquire_lock(folder: Path, elsewhere: str, names: Iterable[str] = ()) -> int:
    """Lock a folder for this process, until it dies or closes the descriptor that is returned.

    Args:
      names: what is going to be replaced in it. The lock is a file that stays, so a folder without it is not ours.

    Raises:
      FileExistsError: some of `names` are in a folder that was never locked: they are another program's.
      OSError: the folder cannot be written.
      RuntimeError: another process holds it; it is named, with a remedy that ends in `elsewhere`.
    """
    path = folder / ".lock"
    if not path.exists() and (others := [name for name in names if _holds(folder / name)]):
        raise FileExistsError(f"{folder} holds files of something else ({', '.join(others)}); {elsewhere}.")
    with explained(path, elsewhere):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(handle)
        raise RuntimeError(f"{folder} is in use by {holder}. Wait for it to end, stop it, or {elsewhere}.") from None
    except OSError as error:
        os.close(handle)
        raise RuntimeError(f"{path} cannot be locked ({error}); {elsewhere}, on a local disk.") from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return handle


def _holds(path: Path) -> bool:
    """Whether there is such a file, or such a folder that is not empty but for hidden files."""
    return any(not name.startswith(".") for name in os.listdir(path)) if path.is_dir() else os.path.lexists(path)


@contextlib.contextmanager
def locked(folder: Path, elsewhere: str, names: Iterable[str] = ()) -> Iterator[None]:
    """`acquire_lock`, for as long as the block lasts."""
    handle = acquire_lock(folder, elsewhere, names)
    try:
        yield
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder last."""
    # So that the rename survives a power cut; file systems that can't do it for folders say EINVAL.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
