"""Untrusted folders: only regular files, only inside the folder, only JSON of limited size."""
import json
import math
import os
from pathlib import Path, PurePosixPath

JSON_BYTES = OTHER_BYTES = 64 * 2**20


def inside(folder: Path, name: str, limit: float = math.inf) -> Path:
    """Path of a regular file in a folder. ValueError for a link out of it or over `limit` bytes; FileNotFoundError."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name or len(PurePosixPath(name).parts) != 1:
        raise ValueError(f"{folder}: refused the file name {name!r:.100}, which is not a plain name in this folder.")
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; copy or download the whole folder again.") from None
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ValueError(f"{path} cannot be read ({error.__class__.__name__}); copy the file itself.") from None
    home = folder.resolve()
    # The hub's cache keeps files as snapshots/<revision>/name -> ../../blobs/<hash>.
    allowed = {home, home.parent.parent / "blobs"} if home.parent.name == "snapshots" else {home}
    if target.parent not in allowed:
        raise ValueError(f"{path} is a link to a file outside of its folder; refused. Copy the file itself.")
    if not target.is_file():
        raise ValueError(f"{path} is no regular file; refused.")
    if (size := target.stat().st_size) > limit:
        raise ValueError(f"{path} has {size:,} bytes, more than the {limit:,} that such a file may have; refused.")
    return path


def read_json(folder: Path, name: str) -> dict:
    """A JSON object. Raises ValueError, one line, for anything else, FileNotFoundError without the file."""
    path = inside(folder, name, JSON_BYTES)
    return parse_json(path.read_bytes(), path)


def parse_json(content: bytes, where: os.PathLike | str) -> dict:
    """A JSON object whose keys occur once. Raises ValueError, one line."""

    def once(pairs: list) -> dict:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("a key occurs twice")
        return entries

    try:
        value = json.loads(content, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else "nested too deeply"
        raise ValueError(f"{where} is no valid JSON ({reason:.100}); download it again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds no JSON object; download it again.")
    return value
