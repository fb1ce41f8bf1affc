"""The record of a validation: a row for each window and draw, kept as it is made; and its columns, read back."""
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softmask_jax.diffusion.dream_loss import DreamLoss
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.evaluate.task import Work
from softmask_jax.io.answers import AnswerFile, Key, key_of

log = logging.getLogger("softmask_jax")
PASSES = ("one_pass", "two_pass")
# Rows are synced to the disk so often, whatever a batch takes: a kill costs no more work than that.
SYNC_SECONDS = 2.0


def settings_of(objective: Nelbo | DreamLoss) -> dict:
    """What the numbers of an objective depend on, JSON-able."""
    settings = dataclasses.asdict(objective)
    soft_mask = settings.pop("soft_mask")
    return {"variant": soft_mask["variant"], "k": soft_mask["k"]} | settings


class Piece(NamedTuple):
    """A batch: the windows `index` [n] under their draw number `draw`; size: of its rows, where lengths differ."""

    index: np.ndarray
    draw: int
    size: int = 0

    @property
    def keys(self) -> list[Key]:
        return [(int(number), self.draw) for number in self.index]

    def filled(self, rows: int) -> np.ndarray:
        """The windows [rows] of a batch of that many rows: the first ones again behind the last."""
        return self.index[np.arange(rows) % len(self.index)]


def record(
    work: Work, file: AnswerFile, pieces: Iterable[Piece], score: Callable[[Piece], Mapping[str, np.ndarray]]
) -> None:
    """Have every piece in `file`. One that a kill left in part is made again whole, so that nothing rounds otherwise.

    score: a piece's columns by name, each [n] of numbers.

    Raises:
      ValueError: a number that is not finite. Stopped: after a signal; what is done is on the disk.
    """
    kept, synced = [], time.monotonic()
    try:
        for piece in pieces:
            if all(key in file.rows for key in piece.keys):
                continue
            work.check_stop()
            columns = {name: np.asarray(values) for name, values in score(piece).items()}
            if bad := [name for name, values in columns.items() if not np.isfinite(values).all()]:
                raise ValueError(
                    f"{work.path}: {bad[0]} is not finite at step {work.model.step}; the weights are damaged, or the "
                    "training diverged: give another --config.models.step."
                )
            plain = {name: values.tolist() for name, values in columns.items()}
            for place, (index, sample) in enumerate(piece.keys):
                if (index, sample) not in file.rows:
                    row = {name: values[place] for name, values in plain.items()}
                    kept.append({"index": index, "sample": sample} | row)
            if time.monotonic() - synced >= SYNC_SECONDS:
                file.add(kept)
                kept, synced = [], time.monotonic()
    finally:
        if kept:
            file.add(kept)


class Columns(NamedTuple):
    """numbers [W] of the windows, ascending; by name the values [W M] of their draws."""

    numbers: np.ndarray
    values: dict[str, np.ndarray]

    @property
    def passes(self) -> list[str]:
        """Which of PASSES there are."""
        return [name for name in PASSES if name in self.values]

    @property
    def best(self) -> str:
        """The model as it is meant to be used: with two passes if it has soft-masking; "mixed" where there is such."""
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
    """Settings and columns of a complete record; None if there is none, or with a warning if it is damaged."""
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
