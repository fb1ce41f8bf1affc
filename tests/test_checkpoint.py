"""Checkpoints: round trips, what is kept, damage, other models, full disks, kills."""
import contextlib
import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from softmask_jax import checkpoint_io
from softmask_jax.checkpoint import Checkpoints, read_trees


class State(NamedTuple):
    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState


def make_state(step: int) -> State:
    """With a bfloat16 leaf, scalars, and an optimiser of nested NamedTuples; its numbers tell the step."""
    params = {
        "backbone": {"w": jnp.full((4, 8), step, jnp.bfloat16), "b": jnp.arange(5.0) + step},
        "soft_mask": {"raw_scale": jnp.float32(step)},
    }
    labels = {"backbone": "backbone", "soft_mask": "soft_mask"}
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({"backbone": optax.adamw(1e-3), "soft_mask": optax.adam(1e-2)}, labels),
    )
    _, opt_state = tx.update(params, tx.init(params), params)
    return State(jnp.int32(step), params, {"w": jnp.full((4, 8), step + 0.5)}, opt_state)


def trees(state: State) -> dict:
    return {"params": state.params, "ema": state.ema, "optimizer": state.opt_state}


def abstract(state: State) -> dict:
    return jax.eval_shape(lambda: trees(state))


STATES = {step: make_state(step) for step in range(1, 5)}
ABSTRACT = abstract(STATES[1])


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """A folder with steps 1, 2, 3; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, STATES[step], {"step": step}, {"validation/nelbo": 4.0 - step})
    return folder


@pytest.fixture
def copy(three, tmp_path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "checkpoints"))


def biggest(folder: Path) -> Path:
    """The biggest file of arrays; in a checkpoint as small as these, metadata are bigger."""
    return max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Round trips


def test_a_state_comes_back_bit_for_bit_with_its_structure(three):
    step, restored, cursor = Checkpoints(three).restore_latest(ABSTRACT)
    assert (step, cursor) == (3, {"step": 3})
    assert_same(restored, trees(STATES[3]))
    assert isinstance(restored["optimizer"][1], type(STATES[3].opt_state[1]))


def test_an_empty_folder_has_no_checkpoint_and_reading_makes_no_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.restore_latest(ABSTRACT) is None
    assert (checkpoints.all_steps(), checkpoints.latest_step(), checkpoints.best_step()) == ([], None, None)
    with pytest.raises(FileNotFoundError, match="No checkpoint of any step"):
        checkpoints.restore_params()
    checkpoints.close()
    assert not (tmp_path / "none").exists()


def test_arrays_may_be_changed_or_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: 0 * x - 1, donate_argnums=0)
    numbers, array = np.ones((500, 500)), jnp.ones((500, 500))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"numpy": numbers, "jax": array}}, {})
        numbers[:] = -1
        array = overwrite(array).block_until_ready()
    _, restored = Checkpoints(tmp_path).restore_params()
    assert restored["ema"] is None
    assert (np.asarray(restored["params"]["numpy"]) == 1).all() and (np.asarray(restored["params"]["jax"]) == 1).all()


def mesh_of(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def on_mesh(mesh: Mesh, specs: dict, of: dict) -> dict:
    layout = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout[name]) for name, x in of.items()}


def test_a_state_saved_on_one_mesh_is_restored_on_others_and_on_one_device(tmp_path):
    specs = {"w": P("fsdp", "tensor"), "b": P(("data", "tensor")), "s": P()}
    params = {"w": jnp.arange(128.0).reshape(8, 16), "b": jnp.arange(8, dtype=jnp.bfloat16), "s": jnp.float32(3)}
    layout = on_mesh(mesh_of(2, 2, 2), specs, params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {k: jax.device_put(v, layout[k].sharding) for k, v in params.items()}}, {})
        checkpoints.wait()
        for shape in ((8, 1, 1), (1, 2, 4), (1, 1, 1)):
            wanted = on_mesh(mesh_of(*shape), specs, params)
            _, restored, _ = checkpoints.restore_latest({"params": wanted})
            assert_same(restored["params"], params)
            assert all(restored["params"][k].sharding == wanted[k].sharding for k in params)
        _, restored, _ = checkpoints.restore_latest({"params": jax.eval_shape(lambda: params)})
        assert restored["params"]["w"].devices() == jnp.zeros(()).devices()


def test_parameters_alone_are_read_without_knowing_the_model(three):
    step, restored = Checkpoints(three).restore_params()
    assert step == 3 and sorted(restored) == ["ema", "params"]
    assert_same(restored["params"], STATES[3].params)
    assert_same(restored["ema"], STATES[3].ema)
    step, restored = Checkpoints(three).restore_params(1, items=("params",), abstract=ABSTRACT)
    assert step == 1 and list(restored) == ["params"]
    assert_same(restored["params"], STATES[1].params)
    assert_same(read_trees(three / "2", ("ema",))["ema"], STATES[2].ema)
    with pytest.raises(FileNotFoundError, match="step 9 .*steps there: 1, 2, 3"):
        Checkpoints(three).restore_params(9)
    with pytest.raises(FileNotFoundError, match="give the folder of"):
        read_trees(three, ("params",))


# What is kept


def test_the_newest_n_and_the_best_are_kept_also_after_a_restart(tmp_path):
    scores = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 3.0, 5: None, 6: 4.0}
    folder = tmp_path / "checkpoints"
    for steps in ((1, 2, 3), (4, 5, 6)):
        with Checkpoints(folder, keep=2, keep_best=1) as checkpoints:
            for step in steps:
                metrics = None if scores[step] is None else {"validation/nelbo": np.float32(scores[step]), "x": 1}
                checkpoints.save(step, {"params": {"w": jnp.ones(2)}}, {}, metrics)
            checkpoints.wait()
            assert checkpoints.all_steps() == ([2, 3] if steps[0] == 1 else [2, 5, 6])
            assert checkpoints.best_step() == 2
    assert Checkpoints(folder).best_step() == 2
    assert Checkpoints(folder, best_metric="y").best_step() is None


def test_saving_a_step_twice_does_nothing_and_an_older_step_is_refused(copy):
    with Checkpoints(copy) as checkpoints:
        before = biggest(copy / "3").stat().st_mtime_ns
        assert not checkpoints.save(3, STATES[1], {})
        assert biggest(copy / "3").stat().st_mtime_ns == before
        with pytest.raises(ValueError, match="has step 3 already, so step 0 is not saved"):
            checkpoints.save(0, STATES[1], {})
        with pytest.raises(ValueError, match="keep must be 1 or more"):
            Checkpoints(copy, keep=0)


# Damage


def truncate(folder: Path) -> None:
    path = biggest(folder)
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "truncated data": truncate,
    "flipped byte": lambda folder: flip(biggest(folder / "optimizer")),
    "missing data": lambda folder: biggest(folder / "params").unlink(),
    "missing metadata": lambda folder: (folder / "params" / "_METADATA").unlink(),
    "missing tree": lambda folder: shutil.rmtree(folder / "ema"),
    "broken cursor": lambda folder: (folder / "data" / "metadata").write_text("{"),
    "flipped byte of metadata": lambda folder: flip(folder / "params" / "_METADATA"),
    "broken checksums": lambda folder: (folder / "checksums.json").write_text("[1"),
    "flipped byte of checksums": lambda folder: flip(folder / "checksums.json"),
    "empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(copy, caplog, damage):
    DAMAGES[damage](copy / "3")
    with caplog.at_level(logging.WARNING, "softmask_jax"):
        step, restored, cursor = Checkpoints(copy).restore_latest(ABSTRACT)
    assert (step, cursor) == (2, {"step": 2})
    assert_same(restored, trees(STATES[2]))
    assert len(caplog.records) == 1
    line = caplog.records[0].getMessage()
    assert f"{copy / '3'} is damaged (" in line and line.endswith("using step 2 instead.") and "\n" not in line
    assert (copy / "3.damaged-1").is_dir() and Checkpoints(copy).all_steps() == [1, 2]


@pytest.mark.parametrize("damage", ["truncated data", "missing data", "missing metadata", "missing tree"])
def test_without_checksums_damage_is_found_by_what_cannot_be_read(copy, damage):
    (copy / "3" / "checksums.json").unlink()
    assert Checkpoints(copy).restore_latest(ABSTRACT)[0] == 3
    DAMAGES[damage](copy / "3")
    step, restored, _ = Checkpoints(copy).restore_latest(ABSTRACT)
    assert step == 2
    assert_same(restored, trees(STATES[2]))


def test_a_damaged_step_can_be_saved_again_and_its_files_stay(copy):
    for number in (1, 2):
        flip(biggest(copy / "3"))
        with Checkpoints(copy) as checkpoints:
            assert checkpoints.restore_latest(ABSTRACT)[0] == 2
            assert checkpoints.save(3, STATES[3], {"step": 3})
            checkpoints.wait()
            assert_same(checkpoints.restore_latest(ABSTRACT)[1], trees(STATES[3]))
        assert len(list((copy / f"3.damaged-{number}").rglob("*"))) > 10


def test_all_damaged_is_one_error_and_nothing_is_renamed(copy):
    for step in (1, 2, 3):
        flip(biggest(copy / str(step)))
    with pytest.raises(RuntimeError, match="Every checkpoint .*step 3: .*step 2: .*step 1: .*Nothing was deleted"):
        Checkpoints(copy).restore_latest(ABSTRACT)
    assert Checkpoints(copy).all_steps() == [1, 2, 3]


def test_readers_of_parameters_pass_over_damage_and_rename_nothing(copy):
    flip(biggest(copy / "3" / "params"))
    assert Checkpoints(copy).restore_params()[0] == 2
    assert Checkpoints(copy).restore_params(3, items=("ema",))[0] == 3
    with pytest.raises(RuntimeError, match="3 is damaged: params/.*Use another step"):
        Checkpoints(copy).restore_params(3)
    assert Checkpoints(copy).all_steps() == [1, 2, 3]


# Another model


def test_a_checkpoint_of_another_model_is_an_error_naming_the_keys(copy):
    wanted = abstract(STATES[1])
    wanted["params"]["backbone"]["w"] = jax.ShapeDtypeStruct((4, 16), jnp.bfloat16)
    wanted["params"]["backbone"]["new"] = jax.ShapeDtypeStruct((), jnp.float32)
    wanted["params"]["soft_mask"] = {}
    wanted["ema"]["w"] = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    with pytest.raises(ValueError) as caught:
        Checkpoints(copy).restore_latest(wanted)
    message = str(caught.value)
    for part in (
        "params/backbone/w: found bfloat16[4, 8], wanted bfloat16[4, 16]",
        "params/backbone/new: found nothing, wanted float32[]",
        "params/soft_mask/raw_scale: found float32[], wanted nothing",
        "ema/w: found float32[4, 8], wanted bfloat16[4, 8]",
    ):
        assert part in message
    assert "optimizer" not in message and "\n" not in message
    assert Checkpoints(copy).all_steps() == [1, 2, 3]


def test_a_missing_ema_is_a_mismatch_and_many_mismatches_are_counted(three):
    with pytest.raises(ValueError, match="ema/w: found float32.*, wanted nothing"):
        Checkpoints(three).restore_latest({**ABSTRACT, "ema": None})
    many = {str(i): jax.ShapeDtypeStruct((), jnp.float32) for i in range(30)}
    with pytest.raises(ValueError, match="and 21 more"):
        Checkpoints(three).restore_latest({"params": many})


def test_unknown_trees_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds params, ema, optimizer; got opt"):
        Checkpoints(tmp_path).save(1, {"opt": {}}, {})


# Errors of the background


@contextlib.contextmanager
def files_no_larger_than(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_with_the_last_good_step_and_saving_works_again_afterwards(tmp_path):
    noise = np.random.default_rng(0).standard_normal((300, 300))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": noise}}, {})
        checkpoints.wait()
        with files_no_larger_than(100_000), pytest.raises(OSError) as caught:
            checkpoints.save(2, {"params": {"w": noise}}, {})
            checkpoints.wait()
        message = str(caught.value)
        assert f"while saving step 2 in {tmp_path}; the last good checkpoint is step 1" in message
        assert "\n" not in message
        assert os.listdir(tmp_path) == ["1"]
        assert checkpoints.save(2, {"params": {"w": noise}}, {})
        checkpoints.wait()
        assert checkpoints.all_steps() == [1, 2]


def test_an_error_in_the_background_surfaces_at_the_next_save(tmp_path, monkeypatch):
    failures = iter([OSError(errno.ENOSPC, "No space left on device"), RuntimeError("cables cut\nlong story")])

    def fail(folder):
        raise next(failures)

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(checkpoint_io, "write_checksums", fail)
    state = {"params": {"w": jnp.ones(3)}}
    checkpoints.save(1, state, {})
    with pytest.raises(OSError, match="No space left on device while saving step 1 .*there is no checkpoint yet"):
        checkpoints.save(2, state, {})
    checkpoints.save(2, state, {})
    with pytest.raises(RuntimeError, match=r"Saving step 2 in .* failed \(cables cut\); there is no"):
        checkpoints.close()
    assert os.listdir(tmp_path) == []


def test_an_error_inside_the_with_block_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint_io, "write_checksums", lambda folder: 1 / 0)
    with pytest.raises(KeyError, match="mine"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.ones(3)}}, {})
        raise KeyError("mine")
    assert "Saving step 1" in caplog.text


# Kills

CHILD = """
import os, signal, sys
import jax.numpy as jnp
from orbax.checkpoint._src.handlers.standard_checkpoint_handler import StandardCheckpointHandler
from orbax.checkpoint._src.path import async_path, deleter
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath
from softmask_jax import checkpoint_io
from softmask_jax.checkpoint import Checkpoints

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
    "before_checksums": lambda: before(checkpoint_io, "write_checksums"),
    "before_commit_marker": lambda: after(checkpoint_io, "write_checksums"),
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
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
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
@pytest.mark.parametrize("seed", range(8))
def test_a_kill_at_a_random_moment_leaves_the_last_whole_checkpoint(seed, tmp_path, caplog):
    child = start_child(tmp_path, "any")
    assert child.stdout.readline().strip() == "1", child.stderr.read()
    time.sleep(random.Random(seed).uniform(0, 1.5))
    child.kill()
    output, _ = child.communicate(timeout=120)
    committed = int((output.split() or ["1"])[-1])
    assert_whole_and_usable(tmp_path, set(range(committed, committed + 3)), caplog)


@pytest.mark.full
def test_ending_the_program_without_closing_says_so_and_keeps_what_was_saved(tmp_path):
    script = (
        "import sys, jax.numpy as jnp\n"
        "from softmask_jax.checkpoint import Checkpoints\n"
        "checkpoints = Checkpoints(sys.argv[1])\n"
        "checkpoints.save(1, {'params': {'w': jnp.ones(2)}}, {})\n"
        "checkpoints.wait()\n"
        "checkpoints.save(2, {'params': {'w': jnp.ones((2000, 2000))}}, {})\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_params()[0] == checkpoints.latest_step()
    assert checkpoints.latest_step() == 2 or f"Step 2 in {tmp_path} is lost" in ended.stderr


def test_the_stored_folder_has_the_layout_that_other_tools_expect(three):
    items = {"data", "ema", "optimizer", "params"}
    assert {path.name for path in (three / "3").iterdir() if path.is_dir()} == items
    recorded = json.loads((three / "3" / "checksums.json").read_text())
    assert {name.split("/")[0] for name in recorded["files"]} == items
