"""Rows of metrics for Weights & Biases (config.train.wandb): each once, in order.

wandb.json in the run's folder holds the W&B run's id and last row; rows computed again after it are not sent twice."""
import contextlib
import json
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np

from softmask_jax.io import metrics
from softmask_jax.io.files import one_line, plain, write_json
from softmask_jax.io.paths import in_bucket
from softmask_jax.io.run_folder import RunFolder

FINISHED, FAILED, STOPPED = 0, 1, 255  # exit codes that W&B shows as finished, failed and killed


def package(project: str) -> Any:
    """The wandb package. ValueError if it is not installed."""
    try:
        import wandb

        wandb.init  # W&B makes folders called wandb, which can be imported, too
    except (ImportError, AttributeError):
        remedy = "pip install wandb (this project's extra [wandb]), or leave config.train.wandb empty"
        raise ValueError(f"config.train.wandb={project} needs the package wandb: {remedy}.") from None
    return wandb


class WandbRows:
    """The run's rows in W&B; starts with those of metrics.jsonl that W&B lacks.

    start: the step the run continues from. say: shows the user a line. ValueError if wandb is not installed;
    RuntimeError if W&B cannot be started at step 0. Later failures end only the logging to W&B, with one line."""

    def __init__(self, folder: RunFolder, project: str, config: dict, start: int, say: Callable[[str], None]):
        self._file, self._say, self._run = folder.path / "wandb.json", say, None
        self._wandb, self._last = package(project), self._stored(project)
        try:
            folder_of_wandb = None if in_bucket(folder.path) else str(folder.path)
            about = {"project": project, "dir": folder_of_wandb, "name": folder.path.name, "config": plain(config)}
            self._run = self._wandb.init(**about, id=self._last["id"], resume="allow", allow_val_change=True)
            # W&B counts its own steps upward; curves are drawn against ours.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
            write_json(self._file, self._last)
        except Exception as error:
            if start == 0:
                remedy = "`wandb login`, set WANDB_MODE=offline, or leave config.train.wandb empty"
                raise RuntimeError(f"Weights & Biases cannot be started ({one_line(error)}): {remedy}.") from error
            self._give_up(error)
        self._catch_up(folder)

    def write(self, step: int, kind: str, values: dict) -> None:
        """One row of numbers, shares of a histogram over [0, 1] and texts, unless W&B has it or a later one."""
        before = self._last
        if self._run is None or step < before["step"] or (step == before["step"] and kind in before["kinds"]):
            return
        kinds = [*before["kinds"], kind] if step == before["step"] else [kind]
        self._last = before | {"step": step, "kinds": kinds}
        try:
            # Recorded first: a kill in between loses a row instead of repeating it.
            write_json(self._file, self._last)
            row = {f"{kind}/{name}": self._shown(name, value) for name, value in values.items()}
            self._run.log({"step": step, **row})
        except Exception as error:
            self._give_up(error)
            with contextlib.suppress(OSError):  # a full disk ends the run elsewhere
                write_json(self._file, before)

    def close(self, exit_code: int) -> None:
        """End the W&B run as one that FINISHED, FAILED or was STOPPED."""
        run, self._run = self._run, None
        if run is not None:
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:
                self._give_up(error)

    def _stored(self, project: str) -> dict:
        """Project, id and last row of the W&B run; of a new one if this project has none."""
        known = {"project": str, "id": str, "step": int, "kinds": list}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            last = json.loads(self._file.read_text(encoding="utf-8"))
            if all(isinstance(last[name], kind) for name, kind in known.items()) and last["project"] == project:
                return last
        return {"project": project, "id": uuid.uuid4().hex[:12], "step": -1, "kinds": []}

    def _catch_up(self, folder: RunFolder) -> None:
        if self._run is None or not metrics.files(folder.path):
            return
        for line in metrics.lines(folder.path):
            row = json.loads(line)
            if "step" in row and "kind" in row:
                self.write(row.pop("step"), row.pop("kind"), row)

    def _shown(self, name: str, value):
        if isinstance(value, (int, float)):
            return value
        if isinstance(value, str):  # NaN or infinity in JSON
            return float(value)
        if name.endswith("histogram"):
            return self._wandb.Histogram(np_histogram=(np.asarray(value), np.linspace(0.0, 1.0, len(value) + 1)))
        return self._wandb.Table(columns=["text"], data=[[text] for text in value])

    def _give_up(self, error: Exception) -> None:
        self._run = None
        rest = "metrics.jsonl has every row, and the run's next start hands over what W&B lacks."
        self._say(f"Warning: Weights & Biases failed ({one_line(error)}); the run goes on without it. {rest}")
