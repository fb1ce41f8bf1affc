"""Account of a run's wall time by kind, over all its starts: `goodput.json`, written while it trains, read by reports.

What a start adds is known up to its last record; the time from there to the next start is lost to the restart."""
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

FILE = "goodput.json"
KEPT_MARKS = 16


class Kind(NamedTuple):
    label: str
    meaning: str  # one sentence, for the report


KINDS = {
    "steps": Kind(
        "Training steps", "Steps that count, from a batch at hand to the device's results, and their rows of metrics."),
    "data": Kind(
        "Waiting for data", "The next batch was not there, and the device had finished all steps before it."),
    "compiling": Kind(
        "Compiling", "Tracing and compiling the training step; compiling other programs, or loading cached ones."),
    "saving": Kind(
        "Saving", "Steps wait while a checkpoint is checked and copied, or the one before it is still written."),
    "validating": Kind(
        "Validating", "Validation between the steps and after the last one."),
    "start": Kind(
        "Start-up", "From the command to its first batch, at every start: imports, hosts, data, model, restoring."),
    "other": Kind(
        "Samples and the rest", "Sampling, traces of a profile, this page, closing of files."),
    "repeated": Kind(
        "Lost: done again", "Steps, waits, validation, samples after the checkpoint that the next start went on from."),
    "down": Kind(
        "Lost: no process", "From the last record of a process that had not finished the run to the next start."),
}  # fmt: skip
# What a restart from an earlier checkpoint does again.
WORK = ("steps", "data", "validating", "other")


@dataclasses.dataclass
class Account:
    """Seconds by kind, whose sum is the wall time from the first start to the newest record."""

    since: float  # Unix time of the first start that is in here
    seen: float  # Unix time up to which seconds are counted
    starts: int = 1
    finished: bool = False  # the pause before the next start is nobody's loss
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    marks: list[list] = dataclasses.field(default_factory=list)  # [step, seconds of WORK that led to its checkpoint]

    @property
    def wall(self) -> float:
        return math.fsum(self.seconds.values())

    @property
    def shares(self) -> dict[str, float]:
        """Share of the wall time by kind; their sum is 1, or 0 of no time."""
        return {kind: seconds / (self.wall or 1.0) for kind, seconds in self.seconds.items()}

    @property
    def goodput(self) -> float:
        """Share of training steps that count."""
        return self.shares["steps"]

    def line(self) -> str:
        """One sentence: the goodput, and the other kinds from the largest on."""
        rest = sorted(self.shares.items(), key=lambda item: -item[1])
        rest = [f"{KINDS[kind].label} {share:.1%}" for kind, share in rest if kind != "steps" and share >= 0.0005]
        times = f"{duration(self.wall)}, {self.starts} start{'s' * (self.starts > 1)}"
        return f"{self.goodput:.1%} training steps in {times}" + f" ({'; '.join(rest)})" * bool(rest)

    def add(self, kind: str, now: float) -> None:
        """Count the time up to `now`, in Unix seconds. A clock set back counts nothing."""
        self.seconds[kind] += max(now - self.seen, 0.0)
        self.seen = now

    def move(self, kind: str, other: str, seconds: float) -> None:
        """Count seconds of one kind as another."""
        seconds = min(seconds, self.seconds[kind])
        self.seconds[kind] -= seconds
        self.seconds[other] += seconds

    def start_again(self, now: float) -> None:
        """Begin another process of the run."""
        if not self.finished:
            self.add("down", now)
        self.seen, self.finished, self.starts = now, False, self.starts + 1

    def continue_from(self, step: int) -> None:
        """Count the work after `step`, the restored checkpoint's, as lost; interpolated for a step without a mark."""
        if self.marks:
            steps = [mark[0] for mark in self.marks]
            for i, kind in enumerate(WORK):
                kept = float(np.interp(step, steps, [mark[1][i] for mark in self.marks]))
                self.move(kind, "repeated", self.seconds[kind] - kept)
        self.mark(step)

    def mark(self, step: int) -> None:
        """Keep what was done up to `step`, whose checkpoint comes next; of all marks the first and the newest."""
        earlier = [mark for mark in self.marks if mark[0] < step]
        kept = earlier[:1] + earlier[1:][2 - KEPT_MARKS :]
        self.marks = [*kept, [step, [self.seconds[kind] for kind in WORK]]]


def parse(values: Mapping) -> Account | None:
    """The account in a JSON object; None if it is none."""
    try:
        account = Account(**values)
        numbers = [account.since, account.seen, *account.seconds.values()]
        numbers += [number for step, work in account.marks for number in (step, *work)]
        is_whole = account.seconds.keys() == KINDS.keys() and all(len(work) == len(WORK) for _, work in account.marks)
        is_valid = is_whole and all(math.isfinite(number) and number >= 0 for number in [*numbers, account.starts])
        return account if is_valid else None
    except (TypeError, ValueError, AttributeError):
        return None


def read(folder: Path) -> Account | None:
    """The account of a run; None if there is none or it is damaged."""
    try:
        return parse(json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def duration(seconds: float) -> str:
    """'42 s', '3 min 20 s' or '5 h 7 min'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours:,} h {left} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
