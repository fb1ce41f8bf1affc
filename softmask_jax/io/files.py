"""Files that are whole or absent, locks of folders, and errors of disks with a remedy."""
import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from softmask_jax.io import bucket_lock
from softmask_jax.io.bucket import BucketError
from softmask_jax.io.paths import BucketPath, in_bucket, problem, to_path

log = logging.getLogger(__name__)

# Full disk, used-up quota, file-size limit.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EISDIR)


@contextlib.contextmanager
def explained(path: str | os.PathLike, elsewhere: str = "give a --workdir that can be written") -> Iterator[None]:
    """Turn the operating system's refusal to write into an OSError of the same errno that names `path` and a remedy."""
    try:
        yield
    except BucketError:
        raise
    except OSError as error:
        if error.errno in DISK_FULL:
            remedy = f"Free space and run the same command again, or {elsewhere}."
        elif error.errno in REFUSED:
            remedy = f"{elsewhere[0].upper()}{elsewhere[1:]}."
        else:
            raise
        raise OSError(error.errno, f"{os.strerror(error.errno)} while writing {path}. {remedy}") from error


def one_line(error: BaseException, length: int = 200) -> str:
    """The first line of an error's message, or its class without one, cut to a length."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:length]


def check_folder(path: str | os.PathLike, flag: str = "") -> None:
    """Raise ValueError for a folder that Orbax, TensorStore or gcsfs would misread or refuse. flag: for the message."""
    if in_bucket(path):
        if unusable := problem(path):
            raise ValueError(f"{flag}{os.fspath(path)}: {unusable}; give gs://BUCKET/FOLDER.")
        return
    real = os.path.realpath(path)
    top, *_ = names = real.split("/")[1:]
    reasons = {
        "its name is not UTF-8": real != real.encode(errors="replace").decode(),
        "TensorStore takes the backslash in it for a slash": "\\" in real,
        "Orbax takes 'gs:/' in it for a URL": "gs:/" in f"{real}/",
        f"Orbax takes /{top} for {top}://": top in ("gs", "s3", "az", "hf"),
        "TensorStore keeps names that end in .__lock for itself": any(name.endswith(".__lock") for name in names),
    }
    for reason, applies in reasons.items():
        if applies:
            shown = os.fspath(path).encode(errors="backslashreplace").decode()
            raise ValueError(f"{flag}{shown}: {reason}; rename the folder or give another.")


def literal_part(path: str) -> str:
    """The longest beginning of a path that exists literally, "" if none does."""
    end = len(path)
    while end > 0 and not os.path.lexists(os.path.expanduser(path[:end])):
        end = max(path.rfind("/", 0, end), 0)
    return path[:end]


def split_paths(text: str, separator: str, is_one: Callable[[str], bool] | None = None) -> list[str]:
    """The paths or patterns in a list; a separator in the name of an existing file does not separate.
    is_one: whether text is one path, by default if its separators are in the `literal_part` of PATH, KIND:PATH or
    NAME=PATH."""

    def by_default(piece: str) -> bool:
        halves = [piece.partition(sign) for sign in ":="]
        paths = [piece, *(path for name, _, path in halves if path and separator not in name)]
        return any(separator not in path.removeprefix(literal_part(path)) for path in paths)

    is_one = is_one or by_default
    pieces, paths = text.split(separator), []
    while pieces:
        joined = (separator.join(pieces[:count]) for count in range(len(pieces), 1, -1))
        one = next(filter(is_one, joined), pieces[0])
        pieces = pieces[one.count(separator) + 1 :]
        paths.append(one if os.path.lexists(os.path.expanduser(one)) else one.strip())
    return list(filter(None, paths))


def check_writable(path: str, flag: str = "--json") -> None:
    """Raise a one-line OSError if no file can be written there; "" is no file."""
    if not path or is_device(path) and os.access(path, os.W_OK):
        return
    try:
        if to_path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if in_bucket(path):
            to_path(path).check_writable()
        else:
            tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()
    except BucketError as error:
        raise BucketError(error.errno, f"{flag}: {error.strerror}") from error
    except OSError as error:
        raise OSError(f"{flag}={path} cannot be written ({error.strerror}); give another file.") from error


def write_atomically(path: str | os.PathLike, content: str | Iterable[bytes], **explanation: str) -> None:
    """Write a file, or a link's target, so that a kill leaves the old content or the new. OSError as `explained`."""
    chunks = [content.encode()] if isinstance(content, str) else content
    if in_bucket(path):
        if isinstance(content, str | list):
            to_path(path).write_bytes(b"".join(chunks))
            return
        with to_path(path).open("wb") as file:
            file.writelines(chunks)
        return
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
    """Remove temporaries of processes killed in `write_atomically`. name: glob pattern of the file."""
    if in_bucket(folder):  # has none
        return
    for leftover in folder.glob(f".{name}.[0-9]*-*.tmp"):
        leftover.unlink(missing_ok=True)


def is_device(path: str | os.PathLike) -> bool:
    """Whether the path is neither file nor folder, but a pipe or /dev/null, say."""
    return not in_bucket(path) and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def write_json(path: str | os.PathLike, value) -> None:
    """`write_atomically` of the `plain` value."""
    write_atomically(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def differences(old: Mapping, new: Mapping, names: Iterable[str]) -> dict[str, str]:
    """`name: old -> new` by name, of JSON values that differ; long ones are cut."""

    def shown(values: Mapping, name: str) -> str:
        text = json.dumps(values[name]) if name in values else "(absent)"
        return text if len(text) <= 60 else text[:16] + "..."

    differing = [name for name in names if (name in old, old.get(name)) != (name in new, new.get(name))]
    return {name: f"{name}: {shown(old, name)} -> {shown(new, name)}" for name in differing}


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


@contextlib.contextmanager
def locked(folder: Path, elsewhere: str, names: Iterable[str] = ()) -> Iterator[Callable[[], None]]:
    """Lock a folder until the block ends or the process dies. RuntimeError, naming the process that holds the lock.
    In a bucket it may wait, as a dead process of another host is only known by its silence (see `bucket_lock`).
    Yields a function that raises RuntimeError if the lock was lost since, as only a silent process in a bucket can.
    FileExistsError for a never locked folder with some of `names`, files to be replaced: it is another program's."""
    path = folder / ".lock"
    if not path.exists() and (others := [name for name in names if _holds(folder / name)]):
        raise FileExistsError(f"{folder} holds files of something else ({', '.join(others)}); {elsewhere}.")
    if isinstance(path, BucketPath):
        with bucket_lock.held(path, elsewhere) as check:
            yield check
        return
    with explained(path, elsewhere):
        file = open(path, "a+b", buffering=0)
    with file:
        file.seek(0)
        if not try_lock(file.fileno(), path):
            holder = file.read(200).decode(errors="replace").strip() or "another process"
            raise RuntimeError(f"{folder} is in use by {holder}. Wait for it to end, stop it, or {elsewhere}.")
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield lambda: None


def try_lock(handle: int, path: Path) -> bool:
    """Lock an open file; False if another process has locked it. Where the file system has no locks, warn and go
    on."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning(f"{path} cannot be locked ({error.strerror or error}): let no other process use this folder meanwhile.")
    return True


def _holds(path: Path) -> bool:
    """Whether the path is a file, or a folder with files that are not hidden."""
    return any(not entry.name.startswith(".") for entry in path.iterdir()) if path.is_dir() else _is_there(path)


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    if in_bucket(folder):
        return
    # File systems that cannot sync folders answer EINVAL.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
