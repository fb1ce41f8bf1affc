"""Rows of metrics for Weights & Biases, if config.train.wandb names a project: each row once, in their order.

wandb.json in the run's folder holds the id of the W&B run, so that a continued run goes on in the same one, and the
last row that was handed over: a run that continues from an earlier checkpoint computes rows again that W&B has already.
"""
import contextlib
import json
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np

from softmask_jax.io.files import plain, write_json
from softmask_jax.io.run_folder import RunFolder

FINISHED, FAILED, STOPPED = 0, 1, 255  # exit codes that W&B shows as finished, failed and killed


def package(project: str) -> Any:
    """The wandb package. ValueError, one line, if it is not installed."""
    try:
        import wandb

        wandb.init  # a folder called wandb, as W&B itself makes, can be imported too
    except (ImportError, AttributeError):
        raise ValueError(
            f"config.train.wandb={project} needs the package wandb: pip install wandb (this project's extra [wandb]), "
            "or leave config.train.wandb empty."
        ) from None
    return wandb


class WandbRows:
    """The run's rows in W&B; those of metrics.jsonl that W&B lacks are handed over first.

    Args:
      project: config.train.wandb. config: nested, all keys. start: the step the run continues from.
      say: shows the user a line.

    Raises:
      ValueError: wandb is not installed. RuntimeError: W&B cannot be started and the run is new. Later mishaps, such as
      a network that is down, are said once and end the logging to W&B, not the run; its next start hands over the rest.
    """

    def __init__(self, folder: RunFolder, project: str, config: dict, start: int, say: Callable[[str], None]):
        self._file, self._say, self._run = folder.path / "wandb.json", say, None
        self._wandb, self._at = package(project), self._stored(project)
        try:
            self._run = self._wandb.init(
                project=project, dir=str(folder.path), name=folder.path.name, id=self._at["id"], resume="allow",
                config=plain(config), allow_val_change=True,
            )  # fmt: skip
            # W&B counts its own steps upward; curves are drawn against ours.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
            write_json(self._file, self._at)
        except Exception as error:
            if start == 0:
                raise RuntimeError(
                    f"Weights & Biases cannot be started ({_first_line(error)}): `wandb login`, set "
                    "WANDB_MODE=offline, or leave config.train.wandb empty."
                ) from error
            self._give_up(error)
        self._catch_up(folder)

    def write(self, step: int, kind: str, values: dict) -> None:
        """One row: numbers, shares of a histogram over [0, 1], lists of texts; not if W&B has it or a later one."""
        before = self._at
        if self._run is None or step < before["step"] or (step == before["step"] and kind in before["kinds"]):
            return
        kinds = [*before["kinds"], kind] if step == before["step"] else [kind]
        self._at = before | {"step": step, "kinds": kinds}
        try:
            # Noted first: a kill in between loses W&B a row rather than giving it one twice.
            write_json(self._file, self._at)
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
        """Project, id and last row of the W&B run; of a new one if there is none in this project."""
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            known = {"project": str, "id": str, "step": int, "kinds": list}
            if all(isinstance(found[name], kind) for name, kind in known.items()) and found["project"] == project:
                return found
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return {"project": project, "id": uuid.uuid4().hex[:12], "step": -1, "kinds": []}

    def _catch_up(self, folder: RunFolder) -> None:
        path = folder.path / "metrics.jsonl"
        if self._run is None or not path.exists():
            return
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                row = json.loads(line)
                if "step" in row and "kind" in row:
                    self.write(row.pop("step"), row.pop("kind"), row)

    def _shown(self, name: str, value):
        if isinstance(value, (int, float)):
            return value
        if isinstance(value, str):  # a number that JSON does not know
            return float(value)
        if name.endswith("histogram"):
            return self._wandb.Histogram(np_histogram=(np.asarray(value), np.linspace(0.0, 1.0, len(value) + 1)))
        return self._wandb.Table(columns=["text"], data=[[text] for text in value])

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self._say(
            f"Warning: Weights & Biases failed ({_first_line(error)}); the run goes on without it. metrics.jsonl has "
            "every row, and the run's next start hands over what W&B lacks."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
