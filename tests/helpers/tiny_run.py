"""A run small enough for tests: a few text files as bytes, a DiT of one narrow block; and how to read what it left."""
import functools
import json
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tensorboardX.proto.event_pb2 import Event

from softmask_jax import config
from softmask_jax.distributed import sharding
from softmask_jax.io import metrics, tree_files
from softmask_jax.training import loop
from softmask_jax.models import families
from softmask_jax.training.tasks import running_text

WORDS = "mask token noise step blend weight soft hard train sample lambda top draw time batch row".split()
STEPS = 8


def write_texts(folder: Path, seed: int = 0) -> str:
    """Eight short texts; returns the glob that finds them."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(8):
        (folder / f"{i}.txt").write_text(" ".join(random.choice(WORDS, 60)))
    return str(folder / "*.txt")


def settings(folder: Path, **changed) -> dict:
    """Nested settings that read `folder`/texts; `changed` is `section__key=value`."""
    values = dict(
        model=dict(hidden_size=16, num_blocks=1, num_heads=2, cond_dim=8, mlp_ratio=2, compute_dtype="float32"),
        # With this centre lambda is open from the start, when entropies are near log 256.
        soft_mask=dict(k=2, init_scale=0.5, init_centre=-6.0),
        data=dict(
            source="files", paths=str(folder / "texts" / "*.txt"), tokenizer="bytes", seq_len=16,
            validation_rule="last", validation_documents=2, cache_dir=str(folder / "tokens"),
        ),
        optimizer=dict(learning_rate=1e-2, warmup_steps=2, ema_decay=0.9),
        train=dict(steps=STEPS, global_batch_size=8, log_every=2, compilation_cache=str(folder / "compiled")),
        checkpoint=dict(every=4, keep=2),
        eval=dict(every=4, batch_size=8, windows=8, max_windows=16),
        sample=dict(every=0, count=0, steps=2),
    )  # fmt: skip
    for name, value in changed.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return values


def write_config(path: Path, values: dict) -> Path:
    path.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n")
    return path


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint: parameters, EMA, optimiser."""
    trees = tree_files.read_trees(workdir / "checkpoints" / str(step), tree_files.TREES)
    return {"/".join(path): np.asarray(leaf) for path, leaf in tree_files.flat(trees).items()}


def assert_identical(workdir: Path, other: Path, step: int) -> None:
    """The checkpoints of two runs hold the same bits."""
    ours, theirs = arrays(workdir, step), arrays(other, step)
    assert ours.keys() == theirs.keys() and {name.split("/")[0] for name in ours} == set(tree_files.TREES)
    for name, value in ours.items():
        assert value.tobytes() == theirs[name].tobytes(), name


def rows(workdir: Path, kind: str | None = None, timed: bool = False) -> list[dict]:
    """Lines of metrics.jsonl; without what depends on the clock unless `timed`."""
    logged = [json.loads(line) for line in metrics.lines(workdir)]
    clock = () if timed else ("tokens_per_second", "model_flops_per_second", "model_flops_share")
    logged = [{name: value for name, value in row.items() if name not in clock} for row in logged]
    return [row for row in logged if kind in (None, row["kind"])]


def summary(workdir: Path) -> dict:
    """summary.json without what depends on the clock."""
    values = json.loads((workdir / "summary.json").read_text())
    assert 0 < values.pop("goodput") < 1
    return values


def assert_rows_are_unique(workdir: Path) -> None:
    seen = [(row["step"], row["kind"]) for row in rows(workdir)]
    assert len(seen) == len(set(seen)) and [step for step, _ in seen] == sorted(step for step, _ in seen)


def events(workdir: Path) -> dict[str, list]:
    """(step, value) pairs of TensorBoard's event files by tag, in the order of writing."""
    found: dict[str, list] = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += 12 + size + 4
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value))
    return found


class Crash(Exception):
    """The process dies here, as far as the run's folder can tell."""


class Home:
    """A folder with texts, caches and runs."""

    def __init__(self, folder):
        self.folder = folder
        write_texts(folder / "texts")

    def run(self, name, *, mesh=(1, 1, 1), crash_at=None, stop_at=None, profile=False, profiler_port=None, **changed):
        """Train in the run's folder on the first devices; returns it and the summary."""
        wanted = config.from_dict(settings(self.folder, **changed))
        mesh = sharding.make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
        progress, at = loop.Tracker.progress, loop.StopSignal.at

        def crash(tracker, step):
            if step == crash_at:
                raise Crash
            progress(tracker, step)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.sharding, "make_mesh", lambda **_: mesh)
            patch.setattr(loop.Tracker, "progress", crash)
            patch.setattr(loop.StopSignal, "at", lambda stop, step: step == stop_at or at(stop, step))
            summary = loop.train(wanted, self.folder / name, profile=profile, profiler_port=profiler_port)
        return self.folder / name, summary


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs of equal settings share what they compile: their parts are made once and kept, JAX's cache does the rest."""
    home, kept = Home(tmp_path_factory.mktemp("runs")), []
    make, folder = loop.train_step.make, jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((families.denoiser, "build"), (loop.optimizer, "make"), (running_text, "Perplexity")):
            patch.setattr(owner, name, functools.cache(getattr(owner, name)))
        patch.setattr(loop.train_step, "make", lambda *given: kept.append(make(*given)) or kept[-1])
        patch.setattr(loop, "peak_flops", lambda device: 1e11)
        yield home
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()
