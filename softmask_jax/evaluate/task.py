"""Protocol of evaluation tasks: each measures one model at one budget of steps, resumably.

A task computes its numbers from rows in files (`Work.records`) alone, so it may be killed at any time. Draws depend on
the settings' seed and the row's number, never on the order of work."""
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from softmask_jax.distributed.preemption import StopSignal
from softmask_jax.evaluate.settings import Settings
from softmask_jax.io.answers import AnswerFile, Hosts, Key, key_of
from softmask_jax.training.intervals import student

# Advice for numbers that are not finite.
DIVERGED = "the weights are damaged, or the training diverged: give another --config.models.step"


class Stopped(KeyboardInterrupt):
    """A signal ended the evaluation between two pieces; finished work is on the disk."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number of `count` observations, with its 95 % interval if it has one."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int = 0
    unit: str = ""
    better: str = ""  # "lower", "higher" or ""

    @classmethod
    def of_mean(cls, values, **more) -> "Estimate":
        """Mean of independent values [n], with an interval for two or more."""
        values = np.asarray(values, np.float64)
        if not len(values):
            raise ValueError("There is nothing to take the mean of.")
        mean, count = float(values.mean()), len(values)
        error = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
        return cls(mean, *student(mean, error, count), count, **more)

    @classmethod
    def of_ratio(cls, sums, counts, **more) -> "Estimate":
        """sum(sums) / sum(counts) over independent rows [N], with the delta method's interval for a ratio."""
        sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
        value, rows = float(sums.sum() / counts.sum()), len(sums)
        deviations = sums - value * counts
        error = math.sqrt(rows / max(rows - 1, 1) * float(np.square(deviations).sum())) / float(counts.sum())
        return cls(value, *student(value, error, rows), rows, **more)

    def mapped(self, function: Callable[[float], float], **more) -> "Estimate":
        """A rising function of the number and its interval, such as exp."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return dataclasses.replace(self, value=function(self.value), low=low, high=high, **more)


@dataclasses.dataclass(frozen=True)
class Result:
    """Numbers of a task."""

    estimates: Mapping[str, Estimate]  # by name, the most important first
    cost: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of a text: "calls" and "seconds"
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # JSON values, such as curves
    notes: tuple[str, ...] = ()  # sentences that explain the numbers
    complete: bool = True  # False if the same command with more flags can add numbers


class Piece(NamedTuple):
    """A batch of rows under one draw."""

    index: np.ndarray  # [n] numbers of the rows
    draw: int = 0
    size: int = 0  # bucket of their lengths, where they differ

    @property
    def keys(self) -> list[Key]:
        return [(int(number), self.draw) for number in self.index]

    def filled(self, rows: int) -> np.ndarray:
        """`index` repeated cyclically to a full batch [rows]."""
        return self.index[np.arange(rows) % len(self.index)]


def pieces(numbers: np.ndarray, draws: int, batch_size: int, size: int = 0) -> Iterator[Piece]:
    """All rows `numbers` [W] under each draw."""
    for draw in range(draws):
        for start in range(0, len(numbers), batch_size):
            yield Piece(numbers[start : start + batch_size], draw, size)


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """One model and budget for one task."""

    settings: Settings
    name: str  # of the checkpoint, as its path
    path: Path
    folder: Path  # the task's own
    load: Callable[[], Any]  # returns the `softmask_jax.Model`, loaded on first use
    mesh: jax.sharding.Mesh  # of the devices that share rows
    stop: StopSignal
    budget: Fraction = Fraction(1)  # share of the sampler's steps
    allow_code: bool = False  # whether programs that a model wrote may run
    allow_unsafe_code: bool = False  # and without a sandbox
    hosts: Hosts = Hosts()  # that share the rows

    @property
    def model(self):
        return self.load()

    @contextlib.contextmanager
    def records(self, name: str, settings: Mapping, total: int) -> Iterator[AnswerFile]:
        """File of JSON rows, shared by the hosts. ValueError if it has rows of other settings."""
        with AnswerFile(self.folder / f"{name}.jsonl", settings, total, self.hosts) as file:
            file.settle({})
            yield file

    def complete(self, file: AnswerFile, batches: Iterable[Piece], make: Callable[[Piece], Sequence[Mapping]],
                 sync_seconds: float = 0.0) -> None:
        """Append this host's missing rows of pieces to `file`, synced every `sync_seconds` and at the end, and wait for
        the other hosts'. Stopped on a signal.

        make: a piece's rows, with "index" and "sample"; an incomplete piece is made again whole, for equal rounding."""
        waiting, synced = [], time.monotonic()
        try:
            for piece in self.hosts.share(list(batches)):
                if all(key in file.rows for key in piece.keys):
                    continue
                self.check_stop()
                waiting += [row for row in make(piece) if key_of(row) not in file.rows]
                if time.monotonic() - synced >= sync_seconds:
                    file.add(waiting)
                    waiting, synced = [], time.monotonic()
        finally:
            if waiting:
                file.add(waiting)
        self.gather(file)

    def gather(self, file: AnswerFile) -> None:
        """Wait until the rows of all hosts are there. Raises as `check_stop`."""
        file.gather(self.check_stop)

    def check_stop(self) -> None:
        """Call between two pieces of work. Raises Stopped after a signal, RuntimeError if another host has gone."""
        if self.stop.noted:
            raise Stopped
        self.hosts.check()


class Task(Protocol):
    """A kind of measurement."""

    name: str  # on the command line
    sections: tuple[str, ...]  # of the settings that decide its numbers
    sweeps: bool  # whether its numbers depend on the budget

    def check(self, settings: Settings, *, allow_code: bool, allow_unsafe_code: bool) -> None:
        """Raise ValueError, OSError or ImportError, one line, for impossible settings before a model is loaded."""

    def run(self, work: Work) -> Result:
        """Measure, with `work.check_stop` often. ValueError for an unsuitable model."""

    def compare(self, baseline: Work, other: Work) -> dict[str, Estimate]:
        """Paired differences `other` - `baseline` on the same draws, from the files of two finished works."""
