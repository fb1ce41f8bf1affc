"""The file that answers are written to: a row is in it once, whatever happens in between.

Rows are appended and synced batch by batch, in the order in which batches end; `finish` puts them into the order of the
prompts. Beside `out.jsonl` lie `out.jsonl.settings.json`, what the rows were made with, and at the end
`out.jsonl.summary.json`.
"""
import contextlib
import fcntl
import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from softmask_jax.io.files import (
    explained, is_device, plain, remove_leftovers, sync_folder, write_atomically, write_json,
)

ELSEWHERE = "give another --out"
ABSENT = "(absent)"

Key = tuple[int, int]


def key_of(row: Mapping) -> Key:
    """(index of the prompt, number of the sample) of an answer's row."""
    return row["index"], row.get("sample", 0)


class AnswerFile:
    """The answers in `path`, locked for this process within its `with` block.

    rows: those that are there, by key. A last line that a kill left half-written is dropped. The file's settings are
    those of `settings`, if it has rows already; `settle` adds what is known later and has to be called before `add`.

    Args:
      settings: JSON values that decide the answers, by the name of their flag.
      total: how many rows there are to be.

    Raises:
      ValueError: rows of other settings are there, or lines that are no answers. RuntimeError: another process writes
      this file. OSError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike, settings: Mapping, total: int):
        self.path, self.total = Path(os.path.expanduser(path)), total
        self.rows: dict[Key, dict] = {}
        self._settings, self._file = dict(plain(settings)), None

    @property
    def settings_path(self) -> Path:
        return self.path.with_name(self.path.name + ".settings.json")

    @property
    def summary_path(self) -> Path:
        return self.path.with_name(self.path.name + ".summary.json")

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return len(self.rows) == self.total

    def __enter__(self):
        with explained(self.path, ELSEWHERE):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if is_device(self.path):
                raise OSError(f"{self.path} is no file; {ELSEWHERE}.")
            self._file = open(self.path, "a+b", buffering=0)
        try:
            self._lock()
            if not (self.path.exists() and os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))):
                raise RuntimeError(f"Another process has just ended with {self.path}; run the command again.")
            remove_leftovers(self.path.parent, glob.escape(self.path.name))
            self.rows = self._read()
            self._compare(self._settings)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_):
        if not self.rows:
            # Nothing was generated: nothing is left that could be in the way of another attempt.
            with contextlib.suppress(OSError):
                self.path.unlink()
                self.settings_path.unlink()
        self._file.close()

    def settle(self, more: Mapping) -> None:
        """Compare and store further settings. ValueError if the rows that are there were made with others."""
        more = plain(more)
        self._compare(more)
        self._settings |= more
        if not self.rows:
            write_atomically(self.settings_path, json.dumps(self._settings, indent=1) + "\n", elsewhere=ELSEWHERE)
            sync_folder(self.path.parent)

    def add(self, rows: Sequence[Mapping]) -> None:
        """Append rows; they are on the disk when this returns. OSError if the disk does not take them."""
        content = _lines(rows)
        with explained(self.path, ELSEWHERE):
            while content:
                content = content[self._file.write(content) :]
            os.fsync(self._file.fileno())
        self.rows |= {key_of(row): dict(row) for row in rows}

    def finish(self, summary: Mapping) -> None:
        """Put the rows in order and write the summary, each atomically."""
        if list(self.rows) != sorted(self.rows):
            self.rows = dict(sorted(self.rows.items()))
            write_atomically(self.path, [_lines(self.rows.values())], elsewhere=ELSEWHERE)
        write_json(self.summary_path, summary)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"{self.path} is being written by another process. Wait for it to end, stop it, or {ELSEWHERE}."
            ) from None
        except OSError as error:
            raise RuntimeError(f"{self.path} cannot be locked ({error}); {ELSEWHERE}, on a local disk.") from error

    def _read(self) -> dict[Key, dict]:
        self._file.seek(0)
        content, found, good = self._file.read(), {}, 0
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
                found[key_of(row)] = row
            except (ValueError, TypeError, KeyError, AttributeError):
                if good + len(line) < len(content) or not self.settings_path.exists():
                    raise ValueError(f"{self.path}:{number} is no answer of this command; {ELSEWHERE}.") from None
                # Half of a line, which a kill left.
                with explained(self.path, ELSEWHERE):
                    self._file.truncate(good)
                break
            good += len(line)
        return found

    def _compare(self, settings: Mapping) -> None:
        if not self.rows:
            return
        try:
            stored = json.loads(self.settings_path.read_text("utf-8"))
        except (OSError, ValueError):
            raise ValueError(
                f"{self.path} has rows, but what they were made with is not to be read in {self.settings_path.name}; "
                f"{ELSEWHERE}."
            ) from None
        differing = [
            f"{name}: {_shown(stored.get(name, ABSENT))} -> {_shown(value)}" for name, value in settings.items()
            if stored.get(name, ABSENT) != value
        ]  # fmt: skip
        if differing:
            raise ValueError(
                f"{self.path} has rows that were made with other settings ({'; '.join(differing)}). Use theirs to "
                f"continue it, or {ELSEWHERE}."
            )


def _lines(rows: Iterable[Mapping]) -> bytes:
    return b"".join((json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n").encode() for row in rows)


def _shown(value) -> str:
    text = value if value == ABSENT else json.dumps(value)
    return text if len(text) <= 60 else text[:16] + "..."


def summarize(rows: Iterable[Mapping]) -> dict:
    """What the answers were and cost, all of it from their rows.

    Returns:
      "rows", "errors" and, of the rows without an error (0 where there are none), the shares "empty" and "ended", per
      row "new_tokens" and "calls", "tokens_per_call" (masks filled by network calls made, over all rows), and of all
      "seconds" and "tokens_per_second" (new tokens, up to their ends).
    """
    rows = list(rows)
    good = [row for row in rows if "error" not in row]
    total = {name: sum(row[name] for row in good) for name in ("empty", "ended", "new_tokens", "calls", "filled")}
    seconds, count = sum(row["seconds"] for row in rows), max(len(good), 1)
    return {
        "rows": len(rows),
        "errors": len(rows) - len(good),
        "empty": total["empty"] / count,
        "ended": total["ended"] / count,
        "new_tokens": total["new_tokens"] / count,
        "calls": total["calls"] / count,
        "tokens_per_call": total["filled"] / max(total["calls"], 1),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(total["new_tokens"] / seconds, 3) if seconds else 0.0,
    }


def count(number: int, what: str, plural: str = "s") -> str:
    """Such as "1,000 answers"."""
    return f"{number:,} {what}{plural if number != 1 else ''}"


def described(summary: Mapping) -> str:
    """The summary in a few lines."""
    errors = f", {summary['errors']:,} of them failed (NaN or infinite logits)" if summary["errors"] else ""
    return "\n".join([
        f"{count(summary['rows'], 'answer')}{errors}: {summary['empty']:.1%} empty, "
        f"{summary['ended']:.1%} ended by themselves",
        f"  a row        {summary['new_tokens']:.1f} new tokens, {summary['calls']:.1f} network calls",
        f"  a call       {summary['tokens_per_call']:.2f} tokens",
        f"  speed        {summary['tokens_per_second']:,.1f} tokens/s in {summary['seconds']:,.1f} s with compilation",
    ])  # fmt: skip
