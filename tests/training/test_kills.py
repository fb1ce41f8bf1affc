"""Real processes, killed: the same command again ends with the bits of an undisturbed run.

Each run trains a tiny model with a checkpoint every 3 steps. Its process is killed at random moments, from start-up to
the final validation, or by itself at a named point of a save; and then started again.
"""
import concurrent.futures
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softmask_jax.io import goodput
from tests.helpers import tiny_run
from tests.helpers.tiny_run import assert_identical, assert_rows_are_unique, rows
from tests.helpers.xla_flags import ONE_DEVICE

pytestmark = pytest.mark.full

ROOT = Path(__file__).parent.parent.parent
STEPS = 48
RUNS = 4
PHASES = ("start-up", "first step", "steps and saves", "steps and saves", "steps and saves")

# Dies at its first argument, a named point of the save that follows the first one of this process, then runs `main`.
AT_POINT = """
import os, signal, sys
from orbax.checkpoint._src.handlers.standard_checkpoint_handler import StandardCheckpointHandler
from orbax.checkpoint._src.path import async_path, deleter
from softmask_jax import main
from softmask_jax.io import checkpoint, tree_files

saves = []

def die():
    if len(saves) > 1:
        os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, when=lambda *a: True):
    original = getattr(owner, name)
    def patched(*args, **kwargs):
        if when(*args):
            die()
        return original(*args, **kwargs)
    setattr(owner, name, patched)

def after(owner, name, when=lambda *a: True):
    original = getattr(owner, name)
    def patched(*args, **kwargs):
        result = original(*args, **kwargs)
        if when(*args):
            die()
        return result
    setattr(owner, name, patched)

def after_async(owner, name, when=lambda *a: True):
    original = getattr(owner, name)
    async def patched(*args, **kwargs):
        result = await original(*args, **kwargs)
        if when(*args):
            die()
        return result
    setattr(owner, name, patched)

is_item = lambda source, target: target.name == "params"
is_step = lambda source, target: target.name.isdigit()
removed = []
third = lambda *a: len(saves) > 1 and (removed.append(a) or len(removed) == 3)
POINTS = {
    "before_data": lambda: before(StandardCheckpointHandler, "async_save"),
    "while_data_is_written": lambda: after_async(StandardCheckpointHandler, "async_save"),
    "after_data": lambda: before(StandardCheckpointHandler, "finalize"),
    "before_metadata": lambda: before(tree_files, "write_checksums"),
    "after_metadata": lambda: after(tree_files, "write_checksums"),
    "after_an_item": lambda: after_async(async_path, "rename", is_item),
    "before_commit": lambda: before(async_path, "rename", is_step),
    "after_commit": lambda: after_async(async_path, "rename", is_step),
    "before_deletion": lambda: before(deleter.PathDeleter, "delete"),
    "during_deletion": lambda: before(os, "unlink", third),
    "after_deletion": lambda: after(deleter.PathDeleter, "delete"),
}
POINTS[sys.argv[1]]()
save = checkpoint.Checkpoints.save
def counted(self, step, *args, **kwargs):
    self.wait()
    saves.append(step)
    print("saving", step, flush=True)
    return save(self, step, *args, **kwargs)
checkpoint.Checkpoints.save = counted
sys.exit(main.main(sys.argv[2:]))
"""
COMMITTED = ("after_commit", "before_deletion", "during_deletion", "after_deletion")
POINTS = (
    "before_data", "while_data_is_written", "after_data", "before_metadata", "after_metadata", "after_an_item",
    "before_commit", *COMMITTED,
)  # fmt: skip
# Of every part of a save one; tests/io/test_checkpoint_kills.py has all of them without the training around.
SOME_POINTS = ("while_data_is_written", "before_metadata", "after_an_item", "after_commit", "during_deletion")


class Home:
    def __init__(self, folder: Path):
        self.folder = folder
        tiny_run.write_texts(folder / "texts")
        self.config = tiny_run.write_config(
            folder / "tiny.py",
            tiny_run.settings(
                folder, train__steps=STEPS, train__log_every=3, checkpoint__every=3, eval__every=24, sample__count=1
            ),
        )
        self.start_seconds = self.loop_seconds = 0.0

    def start(self, name: str, *program: str) -> subprocess.Popen:
        command = [sys.executable, *(program or ("-m", "softmask_jax.main"))]
        command += ["--config", str(self.config), "--workdir", str(self.folder / name)]
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_DEVICE, "PYTHONPATH": str(ROOT),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder, env=environment
        )

    def complete(self, name: str) -> Path:
        """Start the run, for the last time, and wait for its end."""
        child = self.start(name)
        output, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors
        assert "Validation perplexity per token" in output and "Error" not in errors
        return self.folder / name

    def assert_as_undisturbed(self, run: Path) -> None:
        undisturbed = self.folder / "undisturbed"
        assert_identical(run, undisturbed, STEPS)
        assert rows(run) == rows(undisturbed)
        assert_rows_are_unique(run)
        assert tiny_run.summary(run) == tiny_run.summary(undisturbed)
        account = goodput.read(run)
        assert account.finished and math.isclose(account.wall, account.seen - account.since, abs_tol=1e-3)
        for folder in (".", "checkpoints", "tokenizer"):
            assert sorted(os.listdir(run / folder)) == sorted(os.listdir(undisturbed / folder))


def wait_for_first_line(child: subprocess.Popen) -> None:
    """Until it says what it trains: everything is built and restored, nothing is compiled."""
    line = child.stdout.readline()
    assert line, child.stderr.read()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("kills"))
    home.complete("compiling")
    started = time.monotonic()
    child = home.start("undisturbed")
    wait_for_first_line(child)
    home.start_seconds = time.monotonic() - started
    child.communicate(timeout=300)
    home.loop_seconds = time.monotonic() - started - home.start_seconds
    return home


def test_undisturbed_processes_are_bit_identical(home):
    home.assert_as_undisturbed(home.folder / "compiling")


def killed_run(home: Home, name: str, moments: random.Random) -> int:
    """Kill a new run once in each phase, complete it and check it; returns how many kills fell before its end."""
    metrics, kills = home.folder / name / "metrics.jsonl", 0
    size = lambda: metrics.stat().st_size if metrics.exists() else 0  # noqa: E731
    for phase in moments.sample(PHASES, len(PHASES)):
        child = home.start(name)
        if phase == "start-up":
            time.sleep(moments.uniform(0, home.start_seconds))
        else:
            wait_for_first_line(child)
            before = size()
            while phase == "steps and saves" and size() == before and child.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, home.loop_seconds / 3))
        child.kill()
        _, errors = child.communicate(timeout=60)
        assert child.returncode in (-signal.SIGKILL, 0), errors
        if child.returncode == 0:  # it was quicker
            break
        kills += 1
    home.assert_as_undisturbed(home.complete(name))
    return kills


@pytest.mark.parametrize("moments, runs", [(3, 1), pytest.param(20, RUNS, marks=pytest.mark.soak)])
def test_runs_killed_at_random_moments_end_as_if_undisturbed(home, moments, runs):
    """From start-up through steps and saves to the final validation; two runs at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        kills = list(pool.map(lambda seed: killed_run(home, f"random-{moments}-{seed}", random.Random(seed)), range(runs)))
        for seed in range(runs, 3 * runs):
            if sum(kills) >= moments:
                break
            kills.append(killed_run(home, f"random-{moments}-{seed}", random.Random(seed)))
    assert sum(kills) >= moments


@pytest.mark.parametrize("points", [SOME_POINTS, pytest.param(POINTS, marks=pytest.mark.soak)], ids=len)
def test_a_run_killed_at_named_points_of_a_save_ends_as_if_undisturbed(home, points):
    """One after the other: each process saves once, dies in its second save, and the next one continues."""
    run, last = home.folder / f"points-{len(points)}", 0
    for point in points:
        child = home.start(run.name, "-c", AT_POINT, point)
        output, errors = child.communicate(timeout=300)
        assert child.returncode == -signal.SIGKILL, (point, errors)
        saves = [int(line.split()[1]) for line in output.splitlines() if line.startswith("saving")]
        assert saves == [last + 3, last + 6], point
        last = saves[point in COMMITTED]
        assert max(int(name) for name in os.listdir(run / "checkpoints") if name.isdigit()) == last, point
    home.complete(run.name)
    home.assert_as_undisturbed(run)


def test_sigterm_saves_ends_cleanly_and_the_next_start_continues(home):
    child = home.start("terminated")
    wait_for_first_line(child)
    time.sleep(home.loop_seconds / 4)
    child.send_signal(signal.SIGTERM)
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 0 and "the same command continues from there." in output, errors
    step = int(output.split("saved at step ")[1].split(";")[0])
    assert max(map(int, os.listdir(home.folder / "terminated" / "checkpoints"))) == step < STEPS
    run = home.complete("terminated")
    assert_identical(run, home.folder / "undisturbed", STEPS)
    assert_rows_are_unique(run)
