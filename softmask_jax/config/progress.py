"""Progress of a long loop on standard error: a bar on a terminal, elsewhere a plain line now and then."""
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

# Seconds between two lines of a log, and between two states of a bar.
LINE_EVERY, BAR_EVERY = 30.0, 0.1
_silenced = 0


def plain_logs() -> None:
    """Keep bars of other packages out of logs; for commands, before tqdm is imported, which reads this then."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Show nothing of loops that begin in the `with` block, where something else shows how far they are."""
    global _silenced
    _silenced += 1
    try:
        yield
    finally:
        _silenced -= 1


class Progress:
    """How far a loop is: the first update, then one every few seconds, and the end.

    A line is "Tokenizing 1,200 of 5,000 documents, 1.20M tokens/s, 02:10 left": title, count, unit, note, time.
    total: None if unknown. initial: what earlier processes did. scaled: write counts as 1.20k, 3.40G.
    brief: remove the bar at its end, and write no line before LINE_EVERY has passed. disable: show nothing."""

    def __init__(self, total: int | None, title: str, unit: str = "", *, initial: int = 0, scaled: bool = False,
                 brief: bool = False, disable: bool = False):  # fmt: skip
        self.total, self.title, self.unit, self.n, self.note = total, title, unit, initial, ""
        self._ask = None
        self._shown, self._scaled, self._begun, self._brief = initial, scaled, time.monotonic(), brief
        self._due = self._begun + LINE_EVERY * brief
        self._first = None  # (time, count) of the first update: compilation is not part of the speed
        self._off, self._bar = disable or _silenced > 0, None
        if not self._off and sys.stderr.isatty():
            style = {"unit": unit.removesuffix("s") or title.lower(), "unit_scale": scaled, "leave": not brief}
            self._due, self._brief = self._begun, False
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, desc=title, dynamic_ncols=True, smoothing=0.05, **style)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return max(time.monotonic() - self._begun, 1e-9)

    def update(self, count: int = 1, note: Callable[[], str] | None = None) -> None:
        """Count so many more. note: words on the state, asked for only when they are shown; "" keeps the last ones."""
        self.n += count
        if self._off or not count:
            return
        self._ask, now = note, time.monotonic()
        if now >= self._due:
            self._due = now + (LINE_EVERY if self._bar is None else BAR_EVERY)
            self._show(now)
        self._first = self._first or (now, self.n)

    def over(self, items: Iterable) -> Iterator:
        """The items, one update after each."""
        for item in items:
            yield item
            self.update()

    def say(self, line: str) -> None:
        """Print a line on standard output, above a bar."""
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line)

    def close(self) -> None:
        """Show the end, once."""
        if not (self._off or self._brief or self.n == self._shown):
            self._show(time.monotonic())
        if self._bar is not None:
            self._bar.close()
        self._off = True

    def _show(self, now: float) -> None:
        self.note = (self._ask() if self._ask else "") or self.note
        if self._bar is None:
            print(self._line(now), file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(self.n - self._bar.n)
        self._shown, self._brief = self.n, False

    def _line(self, now: float) -> str:
        from tqdm import tqdm

        name = tqdm.format_sizeof if self._scaled else "{:,}".format
        counts = f"{name(self.n)} of {name(self.total)}" if self.total else name(self.n)
        parts = [f"{self.title} {counts} {self.unit}".rstrip(), self.note]
        if self._first and self.total and self._first[1] < self.n < self.total:
            seconds = (self.total - self.n) * (now - self._first[0]) / (self.n - self._first[1])
            parts.append(f"{tqdm.format_interval(seconds)} left")
        return ", ".join(filter(None, parts))
