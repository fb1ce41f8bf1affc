"""Checkpoints of a run: asynchronous, atomic, checked when they are read.

Layout: `<folder>/<step>/{params,ema,optimizer,data}` and `<step>/checksums.json`. The first three are Orbax trees (see
tree_files.py); `data` is JSON: the data cursor and the metrics. Orbax writes into a temporary folder and renames it
when everything, checksums included, is there: a kill leaves a whole checkpoint or none. A damaged checkpoint is never
deleted: it is reported, and set aside under another name by the run that resumes.
"""
import atexit
import logging
import math
import os
import shutil
from typing import Any, Callable, Mapping, Sequence

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from softmask_jax.io import tree_files
from softmask_jax.io.files import plain
from softmask_jax.io.stored_arrays import literal
from softmask_jax.io.tree_files import Damaged, TREES, read_trees

__all__ = ["TREES", "Checkpoints", "Damaged", "read_trees"]

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in one folder. A context manager; `close` waits for the save that is still running.

    Only `save` and `restore_latest` change the folder, and are for the one run that owns it; the rest may be used while
    another process trains there. In a run of several processes, all make the same calls.

    Args:
      folder: usually `<workdir>/checkpoints`.
      keep: how many of the newest to keep.
      keep_best: how many of the best to keep beside them.
      best_metric: key in the metrics given to `save`; lower is better; checkpoints without it are never "best".
      async_save: False makes `save` return only when the checkpoint is on disk.
    """

    def __init__(
        self, folder: str | os.PathLike, *, keep: int = 3, keep_best: int = 1, best_metric: str = "validation/nelbo",
        async_save: bool = True,
    ):  # fmt: skip
        if keep < 1 or keep_best < 0:
            raise ValueError(f"keep must be 1 or more and keep_best 0 or more, not {keep} and {keep_best}.")
        self._is_local = "://" not in str(folder)
        self.folder = literal(folder)
        self._keep, self._keep_best, self._best_metric = keep, keep_best, best_metric
        self._async_save = async_save
        self._scores: dict[int, float] = {}
        self._saving: int | None = None
        self._written: tuple[dict, dict] = {}, {}
        self._manager: ocp.CheckpointManager | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            self.close()
        except (OSError, RuntimeError) as failure:
            if error is None:
                raise
            # The error that ended the block matters more.
            log.error("%s", failure)

    def close(self) -> None:
        """Wait for the running save and free Orbax's threads; raises as `save` does."""
        try:
            self.wait()
        finally:
            atexit.unregister(self._at_exit)
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

    def wait(self) -> None:
        """Return when no save is running; raises as `save` does."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._give_up(error)
        self._saving = None

    def all_steps(self) -> list[int]:
        """Steps of the checkpoints on disk, ascending."""
        if not self.folder.exists():
            return []
        folders = (path for path in self.folder.iterdir() if path.name.isdigit())
        # Without a rename (object stores) a save in progress has the final name; its last file tells.
        return sorted(int(path.name) for path in folders if self._is_local or (path / "commit_success.txt").exists())

    def latest_step(self) -> int | None:
        """The newest step on disk."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step on disk with the lowest `best_metric`; None if none has it."""
        scored = [step for step in self.all_steps() if self._score(step) < math.inf]
        return min(scored, key=self._score, default=None)

    def save(self, step: int, state: Any, cursor: Mapping, metrics: Mapping[str, Any] | None = None) -> bool:
        """Wait for the save before, then start writing; the caller may donate or change the arrays afterwards.

        Args:
          step: updates done.
          state: has `params`, `ema`, `opt_state`; or a dict with names in TREES. Empty trees are not written.
          cursor: the data's position, JSON values.
          metrics: of this step, stored with it; `best_metric` among them ranks it.

        Returns:
          False if the step is on disk already: nothing is done.

        Raises:
          OSError: the disk is full, now or during the save before.
          RuntimeError: one of the two failed otherwise.
          ValueError: the folder has a newer step.
        """
        self.wait()
        steps = self.all_steps()
        if step in steps:
            return False
        if steps and step < steps[-1]:
            newer = f"{self.folder} has step {steps[-1]} already, so step {step} is not saved"
            raise ValueError(f"{newer}; resume from it, or use another --workdir.")
        metrics = plain(metrics or {})
        data, trees = {"cursor": plain(cursor), "metrics": metrics}, tree_files.storable(state)
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["data"] = ocp.args.JsonSave(data)
        # Shapes and dtypes alone: the arrays may be donated.
        self._written = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees), data
        self._scores[step] = _number(metrics.get(self._best_metric))
        self._saving = step
        try:
            self._manager = self._manager or self._make_manager()
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            self._give_up(error)
        if not self._async_save:
            self.wait()
        return True

    def restore_latest(self, abstract: Mapping[str, Any]) -> tuple[int, dict, dict] | None:
        """Read the newest undamaged checkpoint.

        A damaged one is reported in one line and the one before is tried; once a whole one is found, the damaged are
        renamed `<step>.damaged-<n>`, so that the run can save these steps again.

        Args:
          abstract: dict with names in TREES; its leaves have shape, dtype and, where they shall not lie on the default
            device, sharding (`jax.ShapeDtypeStruct`), on any mesh.

        Returns:
          step, trees with the structure of `abstract`, cursor; None if there is no checkpoint.

        Raises:
          ValueError: the checkpoint holds other keys, shapes or dtypes; they are named.
          RuntimeError: every checkpoint is damaged (nothing is renamed).
        """
        self.wait()

        def read(folder):
            data = tree_files.read_json(folder, tree_files.verify(folder, ["data"]))
            return read_trees(folder, [name for name in TREES if name in abstract], abstract), data["cursor"]

        found, damaged = self._newest(read)
        if damaged:
            self._set_aside(damaged)
        return None if found is None else (found[0], *found[1])

    def restore_params(
        self, step: int | None = None, items: Sequence[str] = ("params", "ema"), abstract: Mapping | None = None, *,
        narrow: bool = False,
    ) -> tuple[int, dict]:  # fmt: skip
        """Read some trees of a checkpoint, usually without the optimiser; see `read_trees`. Renames nothing.

        Args:
          step: None for the newest undamaged one.

        Returns:
          step, trees.

        Raises:
          FileNotFoundError: no such step, or no checkpoint at all.
          RuntimeError: the step, or every one, is damaged.
        """
        steps = self.all_steps()
        if step is None and steps:
            return self._newest(lambda folder: read_trees(folder, items, abstract, narrow=narrow))[0]
        if step not in steps:
            wanted, have = "any step" if step is None else f"step {step}", ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(f"No checkpoint of {wanted} in {self.folder}; steps there: {have}.")
        folder = self.folder / str(step)
        try:
            return step, read_trees(folder, items, abstract, narrow=narrow)
        except Damaged as damage:
            raise RuntimeError(f"The checkpoint {folder} is damaged: {damage}. Use another step.") from damage

    def _newest(self, read: Callable[[epath.Path], Any]) -> tuple[tuple[int, Any] | None, list[int]]:
        """(step, what was read) of the newest whole one, or None; the damaged steps above it."""
        damaged = {}
        for step in reversed(self.all_steps()):
            try:
                found = step, read(self.folder / str(step))
            except (Damaged, FileNotFoundError) as damage:
                damaged[step] = str(damage)
                continue
            for bad, problem in damaged.items():
                folder = self.folder / str(bad)
                log.warning("The checkpoint %s is damaged (%s); using step %d instead.", folder, problem, step)
            return found, list(damaged)
        if damaged:
            problems = "; ".join(f"step {step}: {problem}" for step, problem in damaged.items())
            advice = "Nothing was deleted; bring back a copy, or start again in another --workdir."
            raise RuntimeError(f"Every checkpoint in {self.folder} is damaged ({problems}). {advice}")
        return None, []

    def _set_aside(self, steps: Sequence[int]) -> None:
        for step in steps if jax.process_index() == 0 else ():
            folder = self.folder / str(step)
            names = (self.folder / f"{step}.damaged-{number}" for number in range(1, 1000))
            folder.rename(next(name for name in names if not name.exists()))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("softmask_jax:set_aside")
        self._scores.clear()
        if self._manager is not None:
            self._manager.reload()

    def _make_manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Keep(self._kept),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        atexit.register(self._at_exit)
        return ocp.CheckpointManager(self.folder, options=options)

    def _at_exit(self) -> None:
        # Python has ended the threads that Orbax needs: too late to finish a save, but not to say that it is lost.
        if self._saving not in (None, *self.all_steps()):
            log.error("Step %d in %s is lost: the program ended before `close`.", self._saving, self.folder)

    def _kept(self, steps: Sequence[int]) -> set[int]:
        best = sorted((step for step in steps if self._score(step) < math.inf), key=self._score)[: self._keep_best]
        return {*sorted(steps)[-self._keep :], *best}

    def _score(self, step: int) -> float:
        if step not in self._scores:
            try:
                metrics = tree_files.read_json(self.folder / str(step), verified=False)["metrics"]
                self._scores[step] = _number(metrics.get(self._best_metric))
            except (Damaged, AttributeError):
                self._scores[step] = math.inf
        return self._scores[step]

    def _temporary(self, step: int) -> epath.Path:
        return self.folder / f"{step}{ocp.path.atomicity_types.TMP_DIR_SUFFIX}"

    def _seal(self) -> None:
        # Orbax calls this in its background thread, on one process, after the last data of all and before the rename.
        # Object stores, which have none, check their objects themselves.
        folder = self._temporary(self._saving) if self._is_local else self.folder / str(self._saving)
        tree_files.read_back(folder, *self._written)
        if self._is_local:
            tree_files.write_checksums(folder)

    def _give_up(self, error: Exception) -> None:
        """Leave the folder and Orbax as before the save, and raise the reason in one line."""
        step, self._saving = self._saving, None
        self._scores.pop(step, None)
        if self._manager is not None:
            self._manager.reload()
        if jax.process_index() == 0:
            # On a full disk the space matters; what lies there is not a checkpoint.
            shutil.rmtree(self._temporary(step), ignore_errors=True)
        last = self.latest_step()
        good = "there is no checkpoint yet" if last is None else f"the last good checkpoint is step {last}"
        if code := tree_files.disk_full(error):
            text = f"{os.strerror(code)} while saving step {step} in {self.folder}; {good}. Free space and run again"
            raise OSError(code, text) from error
        reason = tree_files.one_line(error)
        raise RuntimeError(f"Saving step {step} in {self.folder} failed ({reason}); {good}.") from error


class _Keep(ocp.checkpoint_managers.PreservationPolicy):
    """Orbax asks after each save which checkpoints stay."""

    def __init__(self, choose: Callable[[Sequence[int]], set[int]]):
        self._choose = choose

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        kept = self._choose([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _number(value) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.inf
