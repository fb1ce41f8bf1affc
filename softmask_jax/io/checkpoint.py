"""Checkpoints of a run: asynchronous, atomic, checked when they are read. Damaged ones are reported, never deleted.

`<folder>/<step>/` holds `params`, `ema` and `optimizer`, Orbax trees (see tree_files.py), `data`, JSON with cursor and
metrics, and `checksums.json`. It gets its name, in a bucket its `commit_success.txt`, once all is written: a kill leaves
a whole checkpoint or none."""
import contextlib
import logging
import math
import os
import threading
from typing import Any, Callable, Mapping, Sequence

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from softmask_jax.io import tree_files
from softmask_jax.io.files import one_line, plain
from softmask_jax.io.step_folders import step_folders
from softmask_jax.io.stored_arrays import literal
from softmask_jax.io.tree_files import Damaged, TREES, read_trees

__all__ = ["TREES", "Checkpoints", "Damaged", "read_trees"]

BEST_METRIC = "validation/nelbo"

log = logging.getLogger(__name__)

_open: set["Checkpoints"] = set()  # with threads of Orbax


def _finish() -> None:
    for checkpoints in list(_open):
        try:
            checkpoints.wait()
        except (OSError, RuntimeError) as failure:
            log.error("%s", failure)


# A program that ends without `close` waits for its save. `atexit` comes too late: by then Python has stopped the thread
# pools that Orbax needs, and its threads wait for each other forever.
threading._register_atexit(_finish)


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints in one folder: the newest `keep`, and the `keep_best` of lowest `BEST_METRIC`.

    `save` and `restore_latest` are for the run that owns the folder, in which all processes make the same calls; the
    rest may be used while another process trains there."""

    def __init__(self, folder: str | os.PathLike, *, keep: int = 3, keep_best: int = 1):
        if keep < 1 or keep_best < 0:
            raise ValueError(f"keep must be 1 or more and keep_best 0 or more, not {keep} and {keep_best}.")
        self.folder = literal(folder)
        self._folders = step_folders(self.folder)
        self._keep, self._keep_best = keep, keep_best
        self._scores: dict[int, float] = {}
        self._saving: int | None = None
        self._written: tuple[dict, dict] = {}, {}
        self._manager: ocp.CheckpointManager | None = None

    def __exit__(self, kind, error, traceback):
        try:
            self.close()
        except (OSError, RuntimeError) as failure:
            if error is None:
                raise
            log.error("%s", failure)  # the error that ended the block matters more

    def close(self) -> None:
        """Wait for the running save and free Orbax's threads; raises as `save` does."""
        try:
            self.wait()
        finally:
            _open.discard(self)
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

    def wait(self) -> None:
        """Return when no save is running; raises as `save` does."""
        try:
            if self._saving is not None:
                self._manager.wait_until_finished()
                self._tidy()
        except Exception as error:
            self._give_up(error)
        self._saving = None

    def all_steps(self) -> list[int]:
        """Steps of the checkpoints on disk, ascending."""
        return self._folders.all()

    def latest_step(self) -> int | None:
        """The newest step on disk."""
        return max(self.all_steps(), default=None)

    def save(self, step: int, state: Any, cursor: Mapping, metrics: Mapping[str, Any] | None = None) -> bool:
        """Wait for the previous save, then start one; False if the step is on disk. The arrays may then be donated.

        state: has `params`, `ema`, `opt_state`; or a dict with names in TREES. cursor: position in the data. Raises
        OSError (disk full) or RuntimeError if this save or the previous one fails, ValueError below a newer step."""
        self.wait()
        steps = self.all_steps()
        if step in steps:
            return False
        if steps and step < steps[-1]:
            newer = f"{self.folder} has step {steps[-1]} already, so step {step} is not saved"
            raise ValueError(f"{newer}; resume from it, or use another --workdir.")
        data, trees = {"cursor": plain(cursor), "metrics": plain(metrics or {})}, tree_files.storable(state)
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()} | {"data": ocp.args.JsonSave(data)}
        # Shapes and dtypes alone: the arrays may be donated.
        self._written = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees), data
        self._scores[step] = _score(data["metrics"])
        self._saving = step
        try:
            self._manager = self._manager or self._make_manager()
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            self._give_up(error)
        return True

    def restore_latest(self, abstract: Mapping[str, Any]) -> tuple[int, dict, dict] | None:
        """Step, trees like `abstract` and cursor of the newest undamaged checkpoint; None without a checkpoint.

        Damaged ones above it are renamed `<step>.damaged-<n>`, so that the run can save these steps again. ValueError
        as `read_trees`, RuntimeError if every one is damaged (nothing is renamed)."""
        self.wait()

        def read(folder):
            data = tree_files.read_json(folder, tree_files.verify(folder, ["data"]))
            return read_trees(folder, [name for name in TREES if name in abstract], abstract), data["cursor"]

        newest, damaged = self._newest(read)
        if damaged:
            self._set_aside(damaged)
        if newest:
            self._tidy()  # killed after its last save, a run saves no more
        return newest and (newest[0], *newest[1])

    def restore_params(
        self, step: int | None = None, items: Sequence[str] = ("params", "ema"), abstract: Mapping | None = None, *,
        narrow: bool = False,
    ) -> tuple[int, dict]:  # fmt: skip
        """The step (None: the newest undamaged one) and some of its trees; see `read_trees`. Renames nothing.
        Raises FileNotFoundError without such a step, RuntimeError when it, or every one, is damaged."""
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
        """(step, result of `read`) of the newest undamaged checkpoint, or None; the damaged steps above it."""
        damaged = {}
        for step in reversed(self.all_steps()):
            try:
                content = read(self.folder / str(step))
            except (Damaged, FileNotFoundError) as damage:
                damaged[step] = damage
                continue
            for bad, damage in damaged.items():
                folder = self.folder / str(bad)
                log.warning("The checkpoint %s is damaged (%s); using step %d instead.", folder, damage, step)
            return (step, content), list(damaged)
        if damaged:
            problems = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
            advice = "Nothing was deleted; bring back a copy, or start again in another --workdir."
            raise RuntimeError(f"Every checkpoint in {self.folder} is damaged ({problems}). {advice}")
        return None, []

    def _set_aside(self, steps: Sequence[int]) -> None:
        for step in steps if jax.process_index() == 0 else ():
            self._folders.set_aside(step)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("softmask_jax:set_aside")
        self._scores.clear()
        if self._manager is not None:
            self._manager.reload()

    def _make_manager(self) -> ocp.CheckpointManager:
        self._tidy()
        options = ocp.CheckpointManagerOptions(
            lightweight_initialize=True, async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            **self._folders.options(_Keep(self._kept)),
        )  # fmt: skip
        _open.add(self)
        return ocp.CheckpointManager(self.folder, options=options)

    def _tidy(self) -> None:
        if jax.process_index() == 0:
            self._folders.tidy(self._kept)

    def _kept(self, steps: Sequence[int]) -> set[int]:
        best = sorted((step for step in steps if self._score(step) < math.inf), key=self._score)[: self._keep_best]
        return {*sorted(steps)[-self._keep :], *best}

    def _score(self, step: int) -> float:
        if step not in self._scores:
            try:
                self._scores[step] = _score(tree_files.read_json(self.folder / str(step), verified=False)["metrics"])
            except (Damaged, AttributeError):
                self._scores[step] = math.inf
        return self._scores[step]

    def _seal(self) -> None:
        # In Orbax's thread, on one process, before the checkpoint counts as whole.
        folder = self._folders.unsealed(self._saving)
        tree_files.read_back(folder, *self._written)
        tree_files.write_checksums(folder)

    def _give_up(self, error: Exception) -> None:
        """Leave the folder and Orbax as before the save, and raise the reason in one line."""
        step, self._saving = self._saving, None
        self._scores.pop(step, None)
        if self._manager is not None:
            self._manager.reload()
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                self._folders.discard(step)
        last = self.latest_step()
        good = "there is no checkpoint yet" if last is None else f"the last good checkpoint is step {last}"
        if code := tree_files.disk_full(error):
            text = f"{os.strerror(code)} while saving step {step} in {self.folder}; {good}. Free space and run again"
            raise OSError(code, text) from error
        raise RuntimeError(f"Saving step {step} in {self.folder} failed ({one_line(error, 300)}); {good}.") from error


class _Keep(ocp.checkpoint_managers.PreservationPolicy):
    """Which checkpoints Orbax keeps after each save."""

    def __init__(self, choose: Callable[[Sequence[int]], set[int]]):
        self._choose = choose

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        kept = self._choose([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _score(metrics: Mapping) -> float:
    value = metrics.get(BEST_METRIC)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.inf
