"""The file of answers, resumable: rows are appended and synced by batch; `finish` puts them in the prompts' order.

Beside `out.jsonl` are `out.jsonl.settings.json`, what the rows depend on, and, finished, `out.jsonl.summary.json`.
Of several hosts the first writes `out.jsonl`, host i `out.jsonl.hosts/<i>.jsonl` until the first has its rows."""
import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from softmask_jax.io import appended as appended_files
from softmask_jax.io.appended import appended
from softmask_jax.io.files import differences, plain, sync_folder, write_atomically, write_json
from softmask_jax.io.paths import in_bucket, to_path

ELSEWHERE = "give another --out"

Key = tuple[int, int]


def key_of(row: Mapping) -> Key:
    """(index of the prompt, number of the sample) of an answer's row."""
    return row["index"], row.get("sample", 0)


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes that share the rows of a file, as one of them sees it."""

    process: int = 0
    processes: int = 1
    check: Callable[[], None] = lambda: None  # raises RuntimeError, naming the host, if another has gone
    progress: Callable[[int], None] = lambda count: None  # called with numbers of rows that are there, old or new

    @property
    def first(self) -> bool:
        return self.process == 0

    def share(self, items: Sequence) -> Sequence:
        """This host's part of `items`, which are equal on all hosts."""
        return items[self.process :: self.processes]


class AnswerFile:
    """The `total` answers of `path`, locked within a `with` block; a half-written last line is dropped.

    settings: JSON values that decide the answers, by flag; `settle` adds those known later, before `add`. hosts: each
    adds some of the rows, then all `gather`; `rows` are those of any host, whose number may differ from before. Raises
    ValueError for rows of other settings or lines that are no answers, RuntimeError for a file in use, OSError."""

    def __init__(self, path: str | os.PathLike, settings: Mapping, total: int, hosts: Hosts = Hosts()):
        self.whole, self.total, self.hosts = to_path(path), total, hosts
        if not self.whole.name:
            raise IsADirectoryError(f"{self.whole} is a folder. Give another --out.")
        self.folder = self.whole.with_name(f"{self.whole.name}.hosts")
        self.path = self.whole if hosts.first else self.folder / f"{hosts.process}.jsonl"
        self.rows: dict[Key, dict] = {}
        self._settings, self._file, self._stack = dict(plain(settings)), None, contextlib.ExitStack()
        self._sources: set[Path] = set()  # files with rows
        self._merged = 0  # rows of the whole file, as another host than the first has seen it
        self.settings_path = _settings_path(self.path)
        self.summary_path = self.whole.with_name(f"{self.whole.name}.summary.json")

    @property
    def complete(self) -> bool:
        return len(self.rows) == self.total

    def __enter__(self):
        with contextlib.ExitStack() as self._stack:
            pieces = self._pieces()
            # Another host's file is made with its first rows.
            if self.hosts.first or self.path in pieces:
                self._open()
            # Pieces before the whole: their rows are there before they are removed.
            self._take([path for path in pieces if path != self.path])
            if not self.hosts.first:
                self._take([self.whole])
            self.hosts.progress(len(self.rows))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_):
        # Nothing was generated: another attempt may have other settings. Or the first host has this one's rows.
        if self._file and (self.path not in self._sources or not self.hosts.first and self._is_merged()):
            with contextlib.suppress(OSError):
                self._file.remove()
                self.settings_path.unlink()
        self._stack.close()

    def settle(self, more: Mapping) -> None:
        """Compare and store further settings. ValueError if the file has rows of others."""
        more = plain(more)
        for path in self._sources:
            self._compare(path, more)
        self._settings |= more
        if self._file and self.path not in self._sources:
            self._store_settings()

    def add(self, rows: Sequence[Mapping]) -> None:
        """Append rows; they are on the disk when this returns. Raises OSError."""
        if rows:
            if not self._file:
                self._open()
                self._store_settings()
            self._file.append(_lines(rows))
            self._sources.add(self.path)
            self.hosts.progress(len(rows))
        self.rows |= {key_of(row): dict(row) for row in rows}

    def gather(self, check: Callable[[], None] | None = None) -> None:
        """Wait until the first host has the rows of all; afterwards `rows` are complete. Raises as `check`, by default
        `Hosts.check`, which is called while it waits."""
        check = check or self.hosts.check
        while self.hosts.processes > 1:
            started = time.monotonic()
            self._take(self._pieces() if self.hosts.first else [self.whole])
            if self._is_merged():
                return
            check()
            # Reading takes a tenth of the time.
            time.sleep(min(max(0.2, 10 * (time.monotonic() - started)), 10.0))

    def finish(self, summary: Mapping) -> None:
        """Put the rows in order and write the summary, each atomically."""
        changed = list(self.rows) != sorted(self.rows)
        self.rows = dict(sorted(self.rows.items()))
        self._file.replace(_lines(self.rows.values()), changed)
        write_json(self.summary_path, summary)

    def _open(self) -> None:
        """Lock this host's file, and read it."""
        self._file = self._stack.enter_context(appended(self.path, ELSEWHERE))
        content = self._file.read()
        rows, good = _parsed(self.path, content)
        if good < len(content):
            self._file.truncate(good)
        if rows:
            self._compare(self.path, self._settings)
            self._sources.add(self.path)
        self.rows |= rows

    def _store_settings(self) -> None:
        write_atomically(self.settings_path, json.dumps(self._settings, indent=1) + "\n", elsewhere=ELSEWHERE)
        sync_folder(self.path.parent)

    def _is_merged(self) -> bool:
        """Whether the whole file is complete."""
        return self.complete if self.hosts.first else self._merged == self.total

    def _pieces(self) -> list[Path]:
        """The files of hosts but for the first's."""
        if not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir())
        # In a bucket a file may be in pieces only.
        numbers = {match[1] for name in names if (match := re.match(r"(\d+)\.jsonl(\.pieces)?$", name))}
        return sorted(self.folder / f"{number}.jsonl" for number in numbers)

    def _take(self, paths: Sequence[Path]) -> None:
        """Read other hosts' rows; the first adds them to its file, and removes what nobody will any more."""
        for path in paths:
            rows, _ = _parsed(path, appended_files.read(path))
            if path == self.whole:
                self._merged = len(rows)
            if rows:
                self._compare(path, self._settings)
                self._sources.add(path)
            new = {key: row for key, row in rows.items() if key not in self.rows}
            self.rows |= new
            if not self.hosts.first:
                continue
            if new and self.path not in self._sources:
                self._store_settings()
            self.add(list(new.values()))
            if self.complete or int(path.stem) >= self.hosts.processes:
                appended_files.remove(path)
                _settings_path(path).unlink(missing_ok=True)
                self._sources.discard(path)
        last = self.hosts.first and (self.complete or self.hosts.processes == 1)
        if paths and last and not in_bucket(self.folder):
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _compare(self, path: Path, settings: Mapping) -> None:
        """ValueError if the rows of a file are of other settings; those that are not known yet are taken from it."""
        try:
            stored = json.loads(_settings_path(path).read_text("utf-8"))
        except (OSError, ValueError):
            reason = f"what they were made with is not to be read in {_settings_path(path).name}"
            raise ValueError(f"{path} has rows, but {reason}; {ELSEWHERE}.") from None
        if differing := differences(stored, settings, settings):
            made = f"rows that were made with other settings ({'; '.join(differing.values())})"
            raise ValueError(f"{path} has {made}. Use theirs to continue it, or {ELSEWHERE}.")
        self._settings = stored | self._settings


def _settings_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def _parsed(path: Path, content: bytes) -> tuple[dict[Key, dict], int]:
    """Rows of a file, and the bytes before a half-written last line. ValueError for lines that are no answers."""
    rows, good = {}, 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
            rows[key_of(row)] = row
        except (ValueError, TypeError, KeyError, AttributeError):
            if good + len(line) < len(content) or not _settings_path(path).exists():
                raise ValueError(f"{path}:{number} is no answer of this command; {ELSEWHERE}.") from None
            break
        good += len(line)
    return rows, good


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
