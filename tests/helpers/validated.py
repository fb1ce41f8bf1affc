"""Works of the task "perplexity" on crafted runs, shared by its tests."""
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from softmask_jax.distributed import sharding
from softmask_jax.evaluate.perplexity import records
from softmask_jax.evaluate.settings import Models, Perplexity, Run, Settings
from softmask_jax.evaluate.task import Work

SEED = 7


class StopAfter:
    """A signal that comes once it was asked for `times` times."""

    def __init__(self, times: int):
        self.left = times

    @property
    def noted(self) -> bool:
        self.left -= 1
        return self.left < 0


def work(folder: Path, path: Path, model, *, devices: int = 1, stop_after: int = 10**9, seed: int = SEED, **given) -> Work:
    """Of `model`, from the checkpoint in `path`, with its files in `folder`; given: of `settings.Perplexity`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        models=Models(checkpoints=str(path)), run=Run(tasks="perplexity", seed=seed),
        perplexity=Perplexity(**{"draws": 2, "batch_size": 8, "bins": 4} | given),
    )  # fmt: skip
    return Work(settings, path.name, path, folder, lambda: model, mesh(devices), StopAfter(stop_after))


def mesh(devices: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(devices, devices=jax.devices()[:devices])


def predicting(model, log_p):
    """The same model, predicting at every position what log_p [V] says, whatever it sees; the mask's entry is unused."""
    head = model.params["backbone"]["head"]
    bias = np.zeros(head["bias"].shape, np.float32)
    bias[: len(log_p)] = log_p
    head = {"weight": np.zeros(head["weight"].shape, np.float32), "bias": bias}
    return dataclasses.replace(model, params=model.params | {"backbone": model.params["backbone"] | {"head": head}})


def columns(found: Work, name: str = "validation") -> SimpleNamespace:
    """What is in a record: windows [W] and, by name, values [W M]."""
    settings, made = records.stored(found.folder, name)
    return SimpleNamespace(settings=settings, numbers=made.numbers, **made.values)
