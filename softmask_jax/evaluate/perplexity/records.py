"""Records of a validation, a row for each window and draw, and their columns."""
import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softmask_jax.diffusion.dream_loss import DreamLoss
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.evaluate.pieces import Piece, complete
from softmask_jax.evaluate.task import Work
from softmask_jax.io.answers import key_of

log = logging.getLogger("softmask_jax")
PASSES = ("one_pass", "two_pass")
# Rows are synced to the disk this often: a kill costs no more work.
SYNC_SECONDS = 2.0


def settings_of(objective: Nelbo | DreamLoss) -> dict:
    """What the numbers of an objective depend on, JSON-able."""
    settings = dataclasses.asdict(objective)
    soft_mask = settings.pop("soft_mask")
    return {"variant": soft_mask["variant"], "k": soft_mask["k"]} | settings


def recorded(
    work: Work, name: str, settings: Mapping, pieces: Iterable[Piece], score: Callable[[Piece], Mapping[str, np.ndarray]]
) -> "Columns":
    """Columns of the record `name`, which is completed first.

    Args:
      settings: that decide the rows, "windows", "draws" and "step" among them. score: a piece's columns, each [n].

    Raises:
      ValueError: a number that is not finite. Stopped: after a signal; finished rows are on the disk.
    """

    def rows(piece: Piece) -> list[dict]:
        columns = {name: np.asarray(values) for name, values in score(piece).items()}
        if bad := [name for name, values in columns.items() if not np.isfinite(values).all()]:
            raise ValueError(
                f"{work.path}: {bad[0]} is not finite at step {settings['step']}; the weights are damaged, or the "
                "training diverged: give another --config.models.step."
            )
        lists = {name: values.tolist() for name, values in columns.items()}
        return [
            {"index": index, "sample": sample} | {name: values[row] for name, values in lists.items()}
            for row, (index, sample) in enumerate(piece.keys)
        ]

    with work.records(name, settings, settings["windows"] * settings["draws"]) as file:
        if not file.complete:
            complete(work, file, pieces, rows, SYNC_SECONDS)
        return columns(file.rows.values(), settings["draws"])


class Columns(NamedTuple):
    """numbers [W] of the windows, ascending; values by name, each [W M] over windows and draws."""

    numbers: np.ndarray
    values: dict[str, np.ndarray]

    @property
    def passes(self) -> list[str]:
        """The PASSES that were measured."""
        return [name for name in PASSES if name in self.values]

    @property
    def best(self) -> str:
        """The pass that counts for the model: "mixed" where measured, else two passes if it has soft-masking."""
        return "mixed" if "mixed" in self.values else self.passes[-1]


def columns(rows: Iterable[Mapping], draws: int) -> Columns:
    """Of the complete rows of a record, in any order."""
    ordered = sorted(rows, key=key_of)
    numbers = np.array([row["index"] for row in ordered[::draws]])
    names = [name for name in ordered[0] if name not in ("index", "sample")]
    return Columns(numbers, {
        name: np.array([row[name] for row in ordered], np.float64).reshape(-1, draws) for name in names
    })  # fmt: skip


def stored(folder: Path, name: str) -> tuple[dict, Columns] | None:
    """Settings and columns of a complete record; None if it is absent or, with a warning, damaged."""
    path = folder / f"{name}.jsonl"
    try:
        settings = json.loads(path.with_name(path.name + ".settings.json").read_text("utf-8"))
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        missing = settings["windows"] * settings["draws"] - len({key_of(row) for row in rows})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        missing = str(error)
    if missing:
        log.warning("%s is damaged (%s): no difference to another model is paired with it", path,
                    missing if isinstance(missing, str) else f"rows not there: {missing:,}")
        return None
    return settings, columns(rows, settings["draws"])
