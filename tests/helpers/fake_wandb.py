"""A stand-in for the wandb package that records what it is told; it can be made to fail."""
import sys
import types

import pytest


class Run:
    def __init__(self, owner, settings):
        self.owner, self.settings, self.metrics, self.exit_code, self.rows = owner, settings, [], None, []

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, row):
        if self.owner.broken_at is not None and row["step"] >= self.owner.broken_at:
            raise OSError("no route to host\nand a long explanation")
        self.rows.append(row)

    def finish(self, exit_code=None):
        self.exit_code = exit_code


class Wandb(types.ModuleType):
    """`runs`: one for each `init`; `broken_at`: the step from which `log` fails; `refuses`: what `init` raises."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.broken_at, self.refuses = [], None, None

    def init(self, **settings):
        if self.refuses:
            raise self.refuses
        self.runs.append(Run(self, settings))
        return self.runs[-1]

    def logged(self) -> list[tuple[int, str]]:
        """(step, kind) of all rows of all runs."""
        rows = [row for run in self.runs for row in run.rows]
        return [(row["step"], next(name for name in row if name != "step").split("/")[0]) for row in rows]

    @staticmethod
    def Histogram(np_histogram):
        return ("histogram", *np_histogram)

    @staticmethod
    def Table(columns, data):
        return ("table", columns, data)


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module
