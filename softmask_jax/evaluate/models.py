"""The models of an evaluation: `name=folder`, loaded when they are needed, one at a time; and which weights these were."""
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from softmask_jax.evaluate.settings import Models
from softmask_jax.io.files import explained, split_paths, write_json

PLAIN = "#none"
ELSEWHERE = "give another --out"
# In a model's folder: which weights its numbers are of.
PIN = "checkpoint.json"


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
      ValueError: none, a name twice, or one that no folder can have. FileNotFoundError: a folder that is not there, or
      holds no model.
    """
    found = []
    for part in split_paths(models.checkpoints, ";", lambda part: _named(part)[1].is_dir()):
        name, path, plain = _named(part)
        folder = str(path)
        if not path.is_dir():
            raise FileNotFoundError(f"--checkpoint: there is no folder '{folder}'; give a run's or a converted model's.")
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"--checkpoint: '{folder}' has no config.json, so it is neither a run's folder nor a converted model's."
            )
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


def _named(part: str) -> tuple[str, Path, bool]:
    """Name, folder and plainness of `name=folder#none`; of a folder that has just this name, no name."""
    for text in (part, part.strip()):
        if (path := Path(os.path.expanduser(text))).is_dir():
            return "", path, False
    folder, plain = text.removesuffix(PLAIN), text.endswith(PLAIN)
    # A path may have "=" in it: only what looks like a name is one, unless there is such a folder.
    match = None if os.path.isdir(os.path.expanduser(folder)) else re.match(r"([\w.-]+)=(.+)", folder, re.DOTALL)
    name, folder = match.groups() if match else ("", folder)
    return name, Path(os.path.expanduser(folder)), plain


class Loader:
    """Gives models, and keeps the one that was asked for last.

    load: `softmask_jax.load`. mesh: for it; None is one device. out: the evaluation's folder, which remembers the step
    that a run was measured at: where training has gone on since, an evaluation that is continued takes the same one.
    """

    def __init__(self, models: Models, load: Callable, mesh, out: Path):
        self._settings, self._load, self._mesh, self._out = models, load, mesh, out
        self._last: tuple[Checkpoint | None, object] = (None, None)

    def __call__(self, checkpoint: Checkpoint):
        if self._last[0] != checkpoint:
            # Its memory is needed.
            self._last = (None, None)
            given, step = self._settings, self.step(checkpoint)
            model = self._load(
                checkpoint.path, weights=given.weights, step=given.step if step is None else step, base=given.base,
                mesh=self._mesh,
            )  # fmt: skip
            if step is None:
                path, now = self._out / checkpoint.name / PIN, weights(checkpoint.path, model.step)
                with explained(path, ELSEWHERE):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path, {"asked": given.step, "step": model.step, "weights": now})
            self._last = checkpoint, without_soft_masking(model) if checkpoint.plain else model
        return self._last[1]

    def step(self, checkpoint: Checkpoint) -> int | None:
        """At which the evaluation in this folder measures a checkpoint; None if it has not begun.

        Raises ValueError if the settings name another one, or the folder of the model has other weights at it by now.
        """
        path = self._out / checkpoint.name / PIN
        try:
            pin = json.loads(path.read_text("utf-8"))
            asked, step, then = (pin[name] for name in ("asked", "step", "weights"))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no file of this command; remove it, or {ELSEWHERE}.") from None
        wanted, now = self._settings.step, weights(checkpoint.path, step)
        if wanted not in (None, asked, step):
            raise ValueError(f"{path.parent} holds numbers of other settings (step: {step} -> {wanted}): {ELSEWHERE}.")
        # A checkpoint that is gone is no matter to what is finished.
        if now and now != then:
            raise ValueError(
                f"{path.parent} holds numbers of other weights than {checkpoint.path} has at step {step} now: {ELSEWHERE}."
            )
        return step


def weights(path: Path, step: int) -> str:
    """A hash of the checksums of a model's weights, a run's at a step; "" without such."""
    for file in (path / "checkpoints" / str(step) / "checksums.json", path / "manifest.json"):
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
    return ""


def without_soft_masking(model):
    """The same weights as a binary model. ValueError if it is one already."""
    if not model.soft_mask.on:
        raise ValueError(f"{PLAIN} turns soft-masking off, but this model was trained without; leave it away.")
    return dataclasses.replace(model, soft_mask=dataclasses.replace(model.soft_mask, variant="none"))
