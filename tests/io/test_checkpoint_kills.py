"""A SIGKILL at any point of a save leaves the last whole checkpoint, and a folder that the next run can use."""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from softmask_jax.io.checkpoint import Checkpoints
from tests.helpers.checkpoint_states import assert_same
from tests.helpers.xla_flags import ONE_DEVICE

CHILD = """
import os, signal, sys
import jax.numpy as jnp
from orbax.checkpoint._src.handlers.standard_checkpoint_handler import StandardCheckpointHandler
from orbax.checkpoint._src.path import async_path, deleter
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath
from softmask_jax.io import tree_files
from softmask_jax.io.checkpoint import Checkpoints

folder, point = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, when=lambda *a: True):
    original = getattr(owner, name)
    def patched(*args, **kwargs):
        if when(*args):
            die()
        return original(*args, **kwargs)
    setattr(owner, name, patched)

def after(owner, name, is_async=False, when=lambda *a: True):
    original = getattr(owner, name)
    def patched(*args, **kwargs):
        result = original(*args, **kwargs)
        if when(*args):
            die()
        return result
    async def patched_async(*args, **kwargs):
        result = await original(*args, **kwargs)
        if when(*args):
            die()
        return result
    setattr(owner, name, patched_async if is_async else patched)

unlinked = []
def third(*_):
    unlinked.append(1)
    return len(unlinked) == 3

is_step = lambda source, target: target.name == "3"
is_item = lambda source, target: target.name == "params"
ARM = {
    "before_data": lambda: before(StandardCheckpointHandler, "async_save"),
    "while_data_is_written": lambda: after(StandardCheckpointHandler, "async_save", is_async=True),
    "after_data": lambda: before(StandardCheckpointHandler, "finalize"),
    "after_metadata": lambda: after(StandardCheckpointHandler, "finalize"),
    "after_an_item": lambda: after(async_path, "rename", is_async=True, when=is_item),
    "before_checksums": lambda: before(tree_files, "write_checksums"),
    "before_commit_marker": lambda: after(tree_files, "write_checksums"),
    "before_rename": lambda: before(async_path, "rename", when=is_step),
    "after_rename": lambda: after(async_path, "rename", is_async=True, when=is_step),
    "before_deletion": lambda: before(deleter.PathDeleter, "delete"),
    "during_deletion": lambda: before(os, "unlink", when=third),
    "after_deletion": lambda: after(deleter.PathDeleter, "delete"),
}

def state(step):
    return {"params": {"w": jnp.full((64, 64), step * 1.0)}, "optimizer": {"m": jnp.full((64, 64), -step * 1.0)}}

with Checkpoints(folder, keep=2, keep_best=0) as checkpoints:
    for step in range(1, 10_000 if point == "any" else 4):
        if step == 3 and point != "any":
            ARM[point]()
        checkpoints.save(step, state(step), {"step": step})
        if point != "any" or step % 2:
            checkpoints.wait()
            print(step, flush=True)
"""
COMMITTED = {"after_rename", "before_deletion", "during_deletion", "after_deletion"}
ALL_POINTS = (
    "before_data", "while_data_is_written", "after_data", "after_metadata", "after_an_item", "before_checksums",
    "before_commit_marker", "before_rename", *sorted(COMMITTED),
)  # fmt: skip
CORE_POINTS = ("after_data", "before_rename", "during_deletion")


def start_child(folder: Path, point: str) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(folder), point]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_DEVICE}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def killed_state(step: int) -> dict:
    return {
        "params": {"w": np.full((64, 64), step, np.float32)},
        "optimizer": {"m": np.full((64, 64), -step, np.float32)},
    }


def assert_whole_and_usable(folder: Path, allowed: set[int], caplog) -> None:
    """Some allowed step comes back whole, without a complaint, and the next saves leave nothing else behind."""
    with Checkpoints(folder, keep=2, keep_best=0) as checkpoints:
        step, restored, cursor = checkpoints.restore_latest(jax.eval_shape(lambda: killed_state(1)))
        assert step in allowed and cursor == {"step": step} and not caplog.records
        assert_same(restored, killed_state(step))
        checkpoints.save(step + 1, killed_state(step + 1), {"step": step + 1})
        checkpoints.save(step + 2, killed_state(step + 2), {"step": step + 2})
    assert sorted(os.listdir(folder), key=int) == [str(step + 1), str(step + 2)]


def kill_at(point: str, folder: Path, caplog) -> None:
    child = start_child(folder, point)
    output, errors = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, errors
    assert output.split() == ["1", "2"]
    assert_whole_and_usable(folder, {3 if point in COMMITTED else 2}, caplog)


@pytest.mark.parametrize("point", CORE_POINTS)
def test_a_kill_while_saving_leaves_the_last_whole_checkpoint(point, tmp_path, caplog):
    kill_at(point, tmp_path, caplog)


@pytest.mark.full
@pytest.mark.parametrize("point", [point for point in ALL_POINTS if point not in CORE_POINTS])
def test_a_kill_at_every_named_point_of_a_save_leaves_the_last_whole_checkpoint(point, tmp_path, caplog):
    kill_at(point, tmp_path, caplog)


@pytest.mark.full
@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(3, 8))])
def test_a_kill_at_a_random_moment_leaves_the_last_whole_checkpoint(seed, tmp_path, caplog):
    child = start_child(tmp_path, "any")
    assert child.stdout.readline().strip() == "1", child.stderr.read()
    time.sleep(random.Random(seed).uniform(0, 1.5))
    child.kill()
    output, _ = child.communicate(timeout=120)
    committed = int((output.split() or ["1"])[-1])
    assert_whole_and_usable(tmp_path, set(range(committed, committed + 3)), caplog)
