"""Models of an evaluation: `name=folder`, loaded on first use, one at a time; and which weights they had."""
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from softmask_jax.convert.sources import ADAPTER_CONFIG, ADAPTER_FILE
from softmask_jax.evaluate.settings import Models
from softmask_jax.io.files import explained, split_paths, write_json
from softmask_jax.io.paths import to_path

PLAIN = "#none"
ELSEWHERE = "give another --out"
# File in a model's folder that records the step and weights behind its numbers.
PIN = "checkpoint.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate."""

    name: str
    path: Path
    plain: bool = False  # with its soft-masking turned off


def checkpoints(models: Models) -> list[Checkpoint]:
    """Checkpoints in `models.checkpoints`, the baseline first. ValueError, FileNotFoundError: a bad name, no model."""
    listed = []
    for part in split_paths(models.checkpoints, ";", lambda part: _parsed(part).path.is_dir()):
        checkpoint = _parsed(part)
        path = checkpoint.path
        if not path.is_dir():
            raise FileNotFoundError(f"--checkpoint: no folder '{path}'; give a run's, a model's or an adapter's.")
        if not any((path / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise FileNotFoundError(f"--checkpoint: '{path}' has neither config.json nor {ADAPTER_CONFIG}; give the "
                                    "folder of a run, of a converted model or of PEFT's adapter.")  # fmt: skip
        name = checkpoint.name or path.absolute().name + "-plain" * checkpoint.plain
        listed.append(dataclasses.replace(checkpoint, name=re.sub(r"[^\w.-]", "_", name)))
    if not listed:
        raise ValueError("There is nothing to evaluate: give --checkpoint=FOLDER, or config.models.checkpoints.")
    names = [one.name for one in listed]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two checkpoints are called '{name}'; name them: --checkpoint=a=FOLDER and so on.")
        if name.strip(".") == "":
            raise ValueError(f"A checkpoint cannot be called '{name}'; name it: --checkpoint=NAME=FOLDER.")
    return listed


def _parsed(part: str) -> Checkpoint:
    """`name=folder#none`; a folder of exactly this name goes first."""
    for text in (part, part.strip()):
        if (path := to_path(text)).is_dir():
            return Checkpoint("", path)
    folder, plain = text.removesuffix(PLAIN), text.endswith(PLAIN)
    match = re.match(r"([\w.-]+)=(.+)", folder, re.DOTALL)
    # A path may contain "=".
    if not match or to_path(folder).is_dir():
        return Checkpoint("", to_path(folder), plain)
    return Checkpoint(match[1], to_path(match[2]), plain)


class Loader:
    """Loads models by `load` (`softmask_jax.load`), keeps the last one, and pins each run's step in the folder `out`,
    so that a continued evaluation measures the same step though training has gone on. Only the first host writes it."""

    def __init__(self, models: Models, load: Callable, mesh, out: Path, first: bool = True):
        self._settings, self._load, self._mesh, self._out, self._first = models, load, mesh, out, first
        self._last: tuple[Checkpoint | None, object] = (None, None)

    def __call__(self, checkpoint: Checkpoint):
        if self._last[0] == checkpoint:
            return self._last[1]
        # Free its memory.
        self._last = (None, None)
        settings, step = self._settings, self.step(checkpoint)
        asked = settings.step if step is None else step
        model = self._load(checkpoint.path, weights=settings.weights, step=asked, base=settings.base, mesh=self._mesh)
        if step is None and self._first:
            now = weights(checkpoint.path, model.step)
            write_own(self._out / checkpoint.name / PIN, {"asked": settings.step, "step": model.step, "weights": now})
        self._last = checkpoint, without_soft_masking(model) if checkpoint.plain else model
        return self._last[1]

    def step(self, checkpoint: Checkpoint) -> int | None:
        """Step at which a checkpoint is measured; None before its first use. ValueError if the settings ask for another
        step, or the weights at it have changed."""
        folder = self._out / checkpoint.name
        if not (pin := read_own(folder / PIN, ("asked", "step", "weights"))):
            return None
        step, wanted = pin["step"], self._settings.step
        if wanted not in (None, pin["asked"], step):
            raise ValueError(f"{folder} holds numbers of other settings (step: {step} -> {wanted}): {ELSEWHERE}.")
        # Finished numbers outlive their checkpoint.
        if weights(checkpoint.path, step) not in ("", pin["weights"]):
            now = f"{checkpoint.path} has at step {step} now"
            raise ValueError(f"{folder} holds numbers of other weights than {now}: {ELSEWHERE}.")
        return step


def read_own(path: Path, names: Sequence[str]) -> dict:
    """Entries `names` of a JSON file; {} if it is absent. ValueError for another program's file."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return {name: content[name] for name in names}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no result of this command; remove it, or {ELSEWHERE}.") from None


def write_own(path: Path, content: Mapping) -> None:
    with explained(path, ELSEWHERE):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)


def weights(path: Path, step: int) -> str:
    """Hash of the checksums of a model's weights, a run's at a step, or of PEFT's adapter itself; "" without such."""
    for file in (path / "checkpoints" / str(step) / "checksums.json", path / "manifest.json", path / ADAPTER_FILE):
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
    return ""


def without_soft_masking(model):
    """The same weights as a binary model. ValueError if it is one already."""
    if not model.soft_mask.on:
        raise ValueError(f"{PLAIN} turns soft-masking off, but this model was trained without; leave it away.")
    return dataclasses.replace(model, soft_mask=dataclasses.replace(model.soft_mask, variant="none"))
