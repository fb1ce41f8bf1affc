"""Checkpoints: round trips, other meshes, what is kept, other models, errors of the background."""
import contextlib
import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from softmask_jax.io import tree_files
from softmask_jax.io.checkpoint import Checkpoints, read_trees
from tests.helpers.checkpoint_states import ABSTRACT, STATES, abstract, assert_same, save_three, trees


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """A folder with steps 1, 2, 3; tests that change it copy it."""
    return save_three(tmp_path_factory.mktemp("three") / "checkpoints")


@pytest.fixture
def copy(three, tmp_path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "checkpoints"))


# Round trips


def test_a_state_comes_back_bit_for_bit_with_its_structure(three):
    step, restored, cursor = Checkpoints(three).restore_latest(ABSTRACT)
    assert (step, cursor) == (3, {"step": 3})
    assert_same(restored, trees(STATES[3]))
    assert isinstance(restored["optimizer"][1], type(STATES[3].opt_state[1]))


def test_an_empty_folder_has_no_checkpoint_and_reading_makes_no_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.restore_latest(ABSTRACT) is None
    assert (checkpoints.all_steps(), checkpoints.latest_step()) == ([], None)
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


def test_saving_a_step_twice_does_nothing_and_an_older_step_is_refused(copy):
    with Checkpoints(copy) as checkpoints:
        before = (copy / "3" / "checksums.json").stat().st_mtime_ns
        assert not checkpoints.save(3, STATES[1], {})
        assert (copy / "3" / "checksums.json").stat().st_mtime_ns == before
        with pytest.raises(ValueError, match="has step 3 already, so step 0 is not saved"):
            checkpoints.save(0, STATES[1], {})
        with pytest.raises(ValueError, match="keep must be 1 or more"):
            Checkpoints(copy, keep=0)


def test_the_stored_folder_has_the_layout_that_other_tools_expect(three):
    items = {"data", "ema", "optimizer", "params"}
    assert {path.name for path in (three / "3").iterdir() if path.is_dir()} == items
    recorded = json.loads((three / "3" / "checksums.json").read_text())
    assert {name.split("/")[0] for name in recorded["files"]} == items


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


def test_what_was_saved_in_bfloat16_is_read_into_float32_with_its_values_and_rounded_only_if_asked(three, caplog):
    wanted = abstract(STATES[3])
    wanted["params"]["backbone"]["w"] = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    with caplog.at_level(logging.INFO, "softmask_jax"):
        _, found, _ = Checkpoints(three).restore_latest(wanted)
    assert found["params"]["backbone"]["w"].dtype == jnp.float32
    np.testing.assert_array_equal(found["params"]["backbone"]["w"], STATES[3].params["backbone"]["w"].astype(jnp.float32))
    assert any("read from bfloat16 as float32" in record.getMessage() for record in caplog.records)
    wanted["ema"]["w"] = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"ema/w: found float32\[4, 8\], wanted bfloat16"):
        Checkpoints(three).restore_params(abstract=wanted)
    _, found = Checkpoints(three).restore_params(abstract=wanted, narrow=True)
    np.testing.assert_array_equal(found["ema"]["w"], STATES[3].ema["w"].astype(jnp.bfloat16))


def test_integers_are_never_read_as_numbers_with_a_fraction(three):
    counts = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), abstract(STATES[3])["optimizer"])
    with pytest.raises(ValueError, match=r"count: found int32\[\], wanted float32"):
        Checkpoints(three).restore_params(items=("optimizer",), abstract={"optimizer": counts}, narrow=True)


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
    monkeypatch.setattr(tree_files, "write_checksums", fail)
    state = {"params": {"w": jnp.ones(3)}}
    checkpoints.save(1, state, {})
    with pytest.raises(OSError, match="No space left on device while saving step 1 .*there is no checkpoint yet"):
        checkpoints.save(2, state, {})
    checkpoints.save(2, state, {})
    with pytest.raises(RuntimeError, match=r"Saving step 2 in .* failed \(cables cut\); there is no"):
        checkpoints.close()
    assert os.listdir(tmp_path) == []


def test_an_error_inside_the_with_block_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tree_files, "write_checksums", lambda folder: 1 / 0)
    with pytest.raises(KeyError, match="mine"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.ones(3)}}, {})
        raise KeyError("mine")
    assert "Saving step 1" in caplog.text


@pytest.mark.full
@pytest.mark.parametrize("folder_is_there", [True, False])
def test_a_program_that_ends_without_closing_waits_for_its_save(tmp_path, folder_is_there):
    script = (
        "import shutil, sys, jax.numpy as jnp\n"
        "from softmask_jax.io.checkpoint import Checkpoints, tree_files\n"
        "if sys.argv[2] == 'False': tree_files.read_back = lambda *_: shutil.rmtree(sys.argv[1])\n"
        "checkpoints = Checkpoints(sys.argv[1])\n"
        "checkpoints.save(1, {'params': {'w': jnp.ones((2000, 2000))}}, {})\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path), str(folder_is_there)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and Checkpoints(tmp_path).latest_step() == (1 if folder_is_there else None)
    assert folder_is_there or f"Saving step 1 in {tmp_path} failed" in ended.stderr
