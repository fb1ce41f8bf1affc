"""Where the checkpoints of a run stand, and which are whole: what local folders and buckets do differently."""
import contextlib
import shutil
from collections.abc import Callable, Container, Sequence

import orbax.checkpoint as ocp
from etils import epath

from softmask_jax.io.paths import BucketPath

# Orbax's last object of a checkpoint in a bucket, where a save in progress has the final name.
COMMIT = "commit_success.txt"


def step_folders(folder: epath.Path) -> "StepFolders":
    return BucketSteps(folder) if isinstance(folder, BucketPath) else StepFolders(folder)


class StepFolders:
    """Local folders, which get the name of their step once all is written."""

    def __init__(self, folder: epath.Path):
        self.folder = folder

    def all(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return self._named() if self.folder.exists() else []

    def unsealed(self, step: int) -> epath.Path:
        """The folder of a checkpoint that is written, before it counts as whole."""
        return self.folder / f"{step}{ocp.path.atomicity_types.TMP_DIR_SUFFIX}"

    def set_aside(self, step: int) -> None:
        """Rename a checkpoint `<step>.damaged-<n>`."""
        (self.folder / str(step)).rename(self._aside(step))

    def discard(self, step: int) -> None:
        """Remove what a failed save wrote: a full disk needs the space."""
        shutil.rmtree(self.unsealed(step), ignore_errors=True)

    def tidy(self, kept: Callable[[Sequence[int]], Container[int]]) -> None:
        """Remove what is left of killed saves, and checkpoints that are not kept. On a disk Orbax does."""

    def options(self, policy: ocp.checkpoint_managers.PreservationPolicy) -> dict:
        """Options of Orbax's manager. policy: chooses the checkpoints to keep."""
        return {"preservation_policy": policy, "cleanup_tmp_directories": True}

    def _named(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def _aside(self, step: int) -> epath.Path:
        names = (self.folder / f"{step}.damaged-{number}" for number in range(1, 1000))
        return next(name for name in names if not name.exists())


class BucketSteps(StepFolders):
    """Objects below `<step>/`, whole once COMMIT is there; it is the last to come and the first to go."""

    def all(self) -> list[int]:
        with contextlib.suppress(FileNotFoundError):
            return [step for step in self._named() if (self.folder / str(step) / COMMIT).exists()]
        return []

    def unsealed(self, step: int) -> epath.Path:
        return self.folder / str(step)

    def set_aside(self, step: int) -> None:
        """Copy within the bucket, all objects but COMMIT first, then remove: a kill leaves one whole copy or two."""
        folder = self.folder / str(step)
        folder.copy_objects(self._aside(step), last=(COMMIT,))
        self.discard(step)

    def discard(self, step: int) -> None:
        folder = self.folder / str(step)
        (folder / COMMIT).unlink(missing_ok=True)
        folder.rmtree(missing_ok=True)

    def tidy(self, kept: Callable[[Sequence[int]], Container[int]]) -> None:
        whole = self.all()
        keep = kept(whole)
        for step in self._named() if whole or self.folder.exists() else []:
            if step not in whole or step not in keep:
                self.discard(step)

    def options(self, policy: ocp.checkpoint_managers.PreservationPolicy) -> dict:
        # Orbax would ask for properties of the bucket, which takes another role and another package.
        return {}  # nothing is removed
