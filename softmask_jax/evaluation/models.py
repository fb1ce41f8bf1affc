"""The models of an evaluation: `name=folder`, loaded when they are needed, one at a time."""
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from softmask_jax.evaluation.settings import Models, listed
from softmask_jax.samplers import SoftMasking

PLAIN = "#none"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """plain: its soft-masking is turned off."""

    name: str
    path: Path
    plain: bool = False


def checkpoints(models: Models) -> list[Checkpoint]:
    """What `models.checkpoints` names; the first is the baseline.

    A folder without a name goes by its own; `#none` behind it turns soft-masking off.

    Raises:
      ValueError: none, a name twice, or one that no folder can have. FileNotFoundError: a folder that is not there.
    """
    found = []
    for part in listed(models.checkpoints):
        folder, plain = (part.removesuffix(PLAIN), True) if part.endswith(PLAIN) else (part, False)
        # A path may have "=" in it: only what looks like a name is one.
        match = re.match(r"([\w.-]+)=(.+)", folder)
        name, folder = match.groups() if match else ("", folder)
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"--checkpoint: there is no folder '{folder}'; give a run's or a converted model's.")
        name = name or (path.absolute().name + ("-plain" if plain else ""))
        found.append(Checkpoint(re.sub(r"[^\w.-]", "_", name), path, plain))
    if not found:
        raise ValueError("There is nothing to evaluate: give --checkpoint=FOLDER, or config.models.checkpoints.")
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two checkpoints are called '{name}'; name them: --checkpoint=a=FOLDER --checkpoint=b=FOLDER.")
        if name.strip(".") == "":
            raise ValueError(f"A checkpoint cannot be called '{name}'; name it: --checkpoint=NAME=FOLDER.")
    return found


class Loader:
    """Gives models, and keeps the one that was asked for last.

    load: `softmask_jax.load`. mesh: for it; None is one device.
    """

    def __init__(self, models: Models, load: Callable, mesh):
        self._settings, self._load, self._mesh = models, load, mesh
        self._last: tuple[Checkpoint | None, object] = (None, None)

    def __call__(self, checkpoint: Checkpoint):
        if self._last[0] != checkpoint:
            # Its memory is needed.
            self._last = (None, None)
            given = self._settings
            model = self._load(
                checkpoint.path, weights=given.weights, step=given.step, base=given.base, mesh=self._mesh
            )
            self._last = checkpoint, without_soft_masking(model) if checkpoint.plain else model
        return self._last[1]


def without_soft_masking(model):
    """The same weights as a binary model. ValueError if it is one already."""
    if not model.soft_mask.on:
        raise ValueError(f"{PLAIN} turns soft-masking off, but this model was trained without; leave it away.")
    if hasattr(model, "config"):
        soft = dataclasses.replace(model.config.soft_mask, variant="none")
        return dataclasses.replace(model, config=dataclasses.replace(model.config, soft_mask=soft))
    return dataclasses.replace(model, soft_mask=SoftMasking())
