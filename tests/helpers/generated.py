"""Works of the task "generative" on crafted runs, shared by its tests."""
import functools
import tempfile
from fractions import Fraction
from pathlib import Path

import softmask_jax
from softmask_jax.evaluate.settings import Generative, Models, Run, Samples, Settings
from softmask_jax.evaluate.task import Work
from softmask_jax.samplers import Options
from tests.evaluate.test_compare import write_run
from tests.helpers import tiny_gpt2, tiny_run
from tests.helpers.validated import StopAfter, mesh

SEED = 11
_kept = []


@functools.cache
def home() -> tuple[Path, dict]:
    """A folder with a soft-masked and a binary run on the same text and a scorer; the loaded models. Made once."""
    _kept.append(tempfile.TemporaryDirectory())
    at = Path(_kept[0].name)
    tiny_run.write_texts(at / "texts")
    write_run(at / "soft", at, 6, seed=1)
    write_run(at / "binary", at, 6, seed=0, soft_mask__variant="none")
    tiny_gpt2.write(at / "scorer")
    return at, {name: softmask_jax.load(at / name) for name in ("soft", "binary")}


def settings(path: Path, scorer: Path, *, sampler: Options = Options(steps=4), budgets: str = "1", samples=None,
             seed: int = SEED, **given) -> Settings:
    """A dozen samples of the run in `path`; given: of `settings.Generative`."""
    return Settings(
        models=Models(checkpoints=str(path)), run=Run(tasks="generative", seed=seed, budgets=budgets), sampler=sampler,
        samples=Samples(**{"count": 12, "batch_size": 8} | (samples or {})),
        generative=Generative(**{"scorer": str(scorer), "max_length": 32, "batch_size": 8} | given),
    )  # fmt: skip


def work(folder: Path, path: Path, model, scorer: Path, *, stop_after: int = 10**9, budget: Fraction = Fraction(1),
         devices: int = 1, **given) -> Work:
    """Of `model`, from the checkpoint in `path`, with its files in `folder`; given: of `settings`."""
    folder.mkdir(parents=True, exist_ok=True)
    return Work(settings(path, scorer, **given), path.name, path, folder, lambda: model, mesh(devices),
                StopAfter(stop_after), budget)
