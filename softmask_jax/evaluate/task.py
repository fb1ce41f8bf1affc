"""Protocol of evaluation tasks: each measures one model at one budget of steps, resumably.

A task keeps its rows in files of its `Work.folder` (`Work.records`) and computes its numbers from those files alone, so
it can be killed at any moment and ends with the same numbers. Draws depend on the settings' seed and the number of the
row, never on the order of work.
"""
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from softmask_jax.distributed.preemption import StopSignal
from softmask_jax.evaluate.settings import Settings
from softmask_jax.io.answers import AnswerFile
from softmask_jax.training.intervals import student


class Stopped(KeyboardInterrupt):
    """A signal ended the evaluation between two pieces; finished work is on the disk."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number of `count` observations with its 95 % interval [low, high], where it has one. better: "lower", "higher"
    or ""."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int = 0
    unit: str = ""
    better: str = ""

    @classmethod
    def of_mean(cls, values, **more) -> "Estimate":
        """Mean of independent values [n] and its interval (none for a single one)."""
        values = np.asarray(values, np.float64)
        if not len(values):
            raise ValueError("There is nothing to take the mean of.")
        mean, count = float(values.mean()), len(values)
        error = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
        return cls(mean, *student(mean, error, count), count, **more)

    @classmethod
    def of_ratio(cls, sums, counts, **more) -> "Estimate":
        """sum(sums) / sum(counts) over independent rows [N], with the interval of the delta method for a ratio.

        Rows are what is independent, not what they count: a row's deviation is sums - ratio * counts.
        """
        sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
        value, rows = float(sums.sum() / counts.sum()), len(sums)
        deviations = sums - value * counts
        error = math.sqrt(rows / max(rows - 1, 1) * float(np.square(deviations).sum())) / float(counts.sum())
        return cls(value, *student(value, error, rows), rows, **more)

    def mapped(self, function: Callable[[float], float], **more) -> "Estimate":
        """A rising function of the number, such as exp."""
        ends = (None if end is None else function(end) for end in (self.low, self.high))
        return dataclasses.replace(self, **dict(zip(("low", "high"), ends)), value=function(self.value), **more)


@dataclasses.dataclass(frozen=True)
class Result:
    """Numbers of a task.

    Attributes:
      estimates: by name, the most important first.
      cost: such as "calls" (network calls a text) and "seconds" (a text); may differ between machines.
      details: JSON values, such as curves. notes: sentences that explain the numbers.
      complete: False if the same command can add numbers, such as with leave to run programs.
    """

    estimates: Mapping[str, Estimate]
    cost: Mapping[str, float] = dataclasses.field(default_factory=dict)
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    complete: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """One model and budget for one task.

    Attributes:
      name: the model's, unique. path: of its checkpoint. folder: the task's own, existing.
      load: returns the model, loaded on first use and shared among tasks. mesh: of the devices that share rows.
      budget: share of the sampler's steps.
      allow_code, allow_unsafe_code: whether programs that a model wrote may run, and without a sandbox.
    """

    settings: Settings
    name: str
    path: Path
    folder: Path
    load: Callable[[], Any]
    mesh: jax.sharding.Mesh
    stop: StopSignal
    budget: Fraction = Fraction(1)
    allow_code: bool = False
    allow_unsafe_code: bool = False

    @property
    def model(self):
        """The `softmask_jax.Model` to measure."""
        return self.load()

    @contextlib.contextmanager
    def records(self, name: str, settings: Mapping, total: int) -> Iterator[AnswerFile]:
        """File of JSON rows that decides which work is left. ValueError if its rows were made with other settings."""
        with AnswerFile(self.folder / f"{name}.jsonl", settings, total) as file:
            file.settle({})
            yield file

    def check_stop(self) -> None:
        """Call between two pieces of work. Raises Stopped after a signal."""
        if self.stop.noted:
            raise Stopped


class Task(Protocol):
    """`name`: on the command line. `sections`, `sweeps`: settings that decide its numbers, and whether the budget does."""

    name: str
    sections: tuple[str, ...]
    sweeps: bool

    def check(self, settings: Settings, *, allow_code: bool, allow_unsafe_code: bool) -> None:
        """Check the settings before a model is loaded. Raises ValueError, OSError or ImportError, one line."""

    def run(self, work: Work) -> Result:
        """Measure. Raises ValueError for an unsuitable model; calls `work.check_stop` often."""

    def compare(self, baseline: Work, other: Work) -> dict[str, Estimate]:
        """Paired differences `other` - `baseline` on the same draws by name, from the files of two finished works."""
