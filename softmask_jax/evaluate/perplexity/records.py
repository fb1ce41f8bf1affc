"""Records of a validation, a row for each window and draw, and their columns."""
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softmask_jax.config.jax_settings import root_key
from softmask_jax.diffusion.objective import Objective
from softmask_jax.distributed import sharding
from softmask_jax.evaluate.perplexity.mask_draws import Strata
from softmask_jax.evaluate.task import DIVERGED, Piece, Work
from softmask_jax.io.answers import key_of

log = logging.getLogger("softmask_jax")
PASSES = ("one_pass", "two_pass")
# Work that a kill loses, at most.
SYNC_SECONDS = 2.0


class Columns(NamedTuple):
    """Columns of a record over W windows and M draws."""

    numbers: np.ndarray  # [W] of the windows, ascending
    values: dict[str, np.ndarray]  # [W M] by name

    @property
    def passes(self) -> list[str]:
        return [name for name in PASSES if name in self.values]

    @property
    def best(self) -> str:
        """The pass that counts for the model: "mixed" if measured, else two passes if it has soft-masking."""
        return "mixed" if "mixed" in self.values else self.passes[-1]


def settings_of(objective: Objective) -> dict:
    """JSON values that decide an objective's numbers."""
    settings = dataclasses.asdict(objective)
    soft_mask = settings.pop("soft_mask")
    return {"variant": soft_mask["variant"], "k": soft_mask["k"]} | settings


def recorded(work: Work, name: str, settings: Mapping, batches: Iterable[Piece], *, numbers: np.ndarray,
             strata: Strata | None, gather: Callable[[np.ndarray, Piece], Mapping], program: Callable,
             extra: tuple = ()) -> Columns:
    """Columns of the record `name`, missing rows measured first; `settings` decide the rows.

    numbers [W]: of the windows, ascending; strata: theirs, None if the program draws t alone. gather: (window numbers
    [B], piece) -> batch. program: (params, batch, draw, key, *extra) -> columns [B]. ValueError for a number that is
    not finite; Stopped after a signal."""
    shards = sharding.batch_shards(work.mesh)
    size = math.ceil(min(work.settings.perplexity.batch_size, len(numbers)) / shards) * shards

    def measured(piece: Piece) -> list[dict]:
        index = piece.filled(size)
        batch = dict(gather(index, piece))
        if strata is not None:
            window = np.searchsorted(numbers, index)
            batch |= {key: values[window, piece.draw] for key, values in strata._asdict().items()}
        batch, key = sharding.global_batch(batch, work.mesh), root_key(settings["seed"])
        scores = program(work.model.params, batch, np.int32(piece.draw), key, *extra)
        values = {name: np.asarray(column)[: len(piece.index)] for name, column in scores.items()}
        if bad := [name for name, column in values.items() if not np.isfinite(column).all()]:
            raise ValueError(f"{work.path}: {bad[0]} is not finite at step {settings['step']}; {DIVERGED}.")
        rows = zip(*(column.tolist() for column in values.values()))
        return [dict(zip(("index", "sample", *values), (*key, *row))) for key, row in zip(piece.keys, rows)]

    with work.records(name, settings, settings["windows"] * settings["draws"]) as file:
        work.complete(file, batches, measured, SYNC_SECONDS)
        return columns(file.rows.values(), settings["draws"])


def columns(rows: Iterable[Mapping], draws: int) -> Columns:
    """Columns of a complete record's rows, in any order."""
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
        if missing := settings["windows"] * settings["draws"] - len({key_of(row) for row in rows}):
            raise ValueError(f"rows not there: {missing:,}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): no difference to another model is paired with it", path, error)
        return None
    return settings, columns(rows, settings["draws"])
