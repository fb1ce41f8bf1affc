"""A tiny Dream, or LLaDA, made and converted, with its runs."""

import jax
import numpy as np
import pytest

from softmask_jax import config
from softmask_jax.convert import tiny
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.distributed import sharding
from softmask_jax.io import tree_files
from softmask_jax.training import loop


class Workshop:
    """A folder with a tiny model, converted, and its runs by `recipe`."""

    def __init__(self, folder, family: str = "dream", recipe: str = "dream7b"):
        self.folder, self.recipe = folder, recipe
        tiny.make(folder, family=family, conversations=60)
        assert convert([f"--src={folder / 'hf'}", f"--dst={folder / 'model'}", "--verify"]) == 0

    def overrides(self) -> list[str]:
        return [
            f"model.base={self.folder / 'model'}", f"data.paths=jsonl:{self.folder / 'chats.jsonl'}",
            f"data.cache_dir={self.folder / 'cache'}", f"train.compilation_cache={self.folder / 'compiled'}",
            "train.global_batch_size=2", "train.micro_batches=2",
        ]  # fmt: skip

    def settings(self, *overrides: str, recipe: str = ""):
        return config.load(f"configs/{recipe or self.recipe}.py:smoke", [*self.overrides(), *overrides])

    def run(self, name: str, *overrides: str, stop_at: int | None = None, recipe: str = ""):
        """The run's folder and its summary."""
        at, mesh = loop.StopSignal.at, sharding.make_mesh(devices=jax.devices()[:1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "peak_flops", lambda device: 1e11)
            patch.setattr(loop.sharding, "make_mesh", lambda **_: mesh)
            patch.setattr(loop.StopSignal, "at", lambda stop, step: step == stop_at or at(stop, step))
            summary = loop.train(self.settings(*overrides, recipe=recipe), str(self.folder / name))
        return self.folder / name, summary


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    cache = jax.config.jax_compilation_cache_dir
    yield Workshop(tmp_path_factory.mktemp("dream"))
    jax.config.update("jax_compilation_cache_dir", cache)


@pytest.fixture(scope="module")
def llada_workshop(tmp_path_factory):
    cache = jax.config.jax_compilation_cache_dir
    yield Workshop(tmp_path_factory.mktemp("llada"), "llada", "llada8b")
    jax.config.update("jax_compilation_cache_dir", cache)


@pytest.fixture(scope="module")
def tuned(workshop):
    return workshop.run("tuned")


def arrays(folder, step, items=("params",)):
    trees = tree_files.read_trees(folder / "checkpoints" / str(step), items)
    return {"/".join(path): np.asarray(leaf) for path, leaf in tree_files.flat(trees).items()}


def arrays_of_model(folder):
    trees = tree_files.read_trees(folder, ("params",))
    return {"/".join(path): np.asarray(leaf) for path, leaf in tree_files.flat(trees).items()}
