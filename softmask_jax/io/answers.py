"""The file of answers, resumable: rows are appended and synced by batch; `finish` puts them in the prompts' order.

Beside `out.jsonl` are `out.jsonl.settings.json`, what the rows depend on, and, finished, `out.jsonl.summary.json`."""
import contextlib
import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from softmask_jax.io.files import (
    differences, explained, is_device, plain, remove_leftovers, sync_folder, try_lock, write_atomically, write_json,
)

ELSEWHERE = "give another --out"

Key = tuple[int, int]


def key_of(row: Mapping) -> Key:
    """(index of the prompt, number of the sample) of an answer's row."""
    return row["index"], row.get("sample", 0)


class AnswerFile:
    """The `total` answers of `path`, locked within a `with` block; a half-written last line is dropped.

    settings: JSON values that decide the answers, by flag; `settle` adds those known later, before `add`. Raises
    ValueError for rows of other settings or lines that are no answers, RuntimeError for a file in use, OSError."""

    def __init__(self, path: str | os.PathLike, settings: Mapping, total: int):
        self.path, self.total = Path(os.path.expanduser(path)), total
        self.rows: dict[Key, dict] = {}
        self._settings, self._file = dict(plain(settings)), None
        self.settings_path, self.summary_path = (Path(f"{self.path}.{kind}.json") for kind in ("settings", "summary"))

    @property
    def complete(self) -> bool:
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
            # Nothing was generated: another attempt may have other settings.
            with contextlib.suppress(OSError):
                self.path.unlink()
                self.settings_path.unlink()
        self._file.close()

    def settle(self, more: Mapping) -> None:
        """Compare and store further settings. ValueError if the file has rows of others."""
        more = plain(more)
        self._compare(more)
        self._settings |= more
        if not self.rows:
            write_atomically(self.settings_path, json.dumps(self._settings, indent=1) + "\n", elsewhere=ELSEWHERE)
            sync_folder(self.path.parent)

    def add(self, rows: Sequence[Mapping]) -> None:
        """Append rows; they are on the disk when this returns. Raises OSError."""
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
        if not try_lock(self._file.fileno(), self.path, ELSEWHERE):
            remedy = f"Wait for it to end, stop it, or {ELSEWHERE}."
            raise RuntimeError(f"{self.path} is being written by another process. {remedy}")

    def _read(self) -> dict[Key, dict]:
        self._file.seek(0)
        content, rows, good = self._file.read(), {}, 0
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
                rows[key_of(row)] = row
            except (ValueError, TypeError, KeyError, AttributeError):
                if good + len(line) < len(content) or not self.settings_path.exists():
                    raise ValueError(f"{self.path}:{number} is no answer of this command; {ELSEWHERE}.") from None
                with explained(self.path, ELSEWHERE):
                    self._file.truncate(good)
                break
            good += len(line)
        return rows

    def _compare(self, settings: Mapping) -> None:
        if not self.rows:
            return
        try:
            stored = json.loads(self.settings_path.read_text("utf-8"))
        except (OSError, ValueError):
            reason = f"what they were made with is not to be read in {self.settings_path.name}"
            raise ValueError(f"{self.path} has rows, but {reason}; {ELSEWHERE}.") from None
        if differing := differences(stored, settings, settings):
            made = f"rows that were made with other settings ({'; '.join(differing.values())})"
            raise ValueError(f"{self.path} has {made}. Use theirs to continue it, or {ELSEWHERE}.")


def _lines(rows: Iterable[Mapping]) -> bytes:
    return b"".join((json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n").encode() for row in rows)


def summarize(rows: Iterable[Mapping]) -> dict:
    """Statistics of answers: shares "empty" and "ended" and means of "new_tokens" and "calls" (rows without an error);
    in total "tokens_per_call" (masks filled by a network call), "seconds" and "tokens_per_second" (new tokens)."""
    rows = list(rows)
    good = [row for row in rows if "error" not in row]
    total = {name: sum(row[name] for row in good) for name in ("empty", "ended", "new_tokens", "calls", "filled")}
    seconds, count = sum(row["seconds"] for row in rows), max(len(good), 1)
    return {
        "rows": len(rows),
        "errors": len(rows) - len(good),
        **{name: total[name] / count for name in ("empty", "ended", "new_tokens", "calls")},
        "tokens_per_call": total["filled"] / max(total["calls"], 1),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(total["new_tokens"] / seconds, 3) if seconds else 0.0,
    }


def count(number: int, what: str, plural: str = "s") -> str:
    """A count as text, such as "1,000 answers"."""
    return f"{number:,} {what}{plural if number != 1 else ''}"


def described(summary: Mapping) -> str:
    """The summary as text for the terminal."""
    errors = f", {summary['errors']:,} of them failed (NaN or infinite logits)" if summary["errors"] else ""
    return "\n".join([
        f"{count(summary['rows'], 'answer')}{errors}: {summary['empty']:.1%} empty, "
        f"{summary['ended']:.1%} ended by themselves",
        f"  a row        {summary['new_tokens']:.1f} new tokens, {summary['calls']:.1f} network calls",
        f"  a call       {summary['tokens_per_call']:.2f} tokens",
        f"  speed        {summary['tokens_per_second']:,.1f} tokens/s in {summary['seconds']:,.1f} s with compilation",
    ])  # fmt: skip
