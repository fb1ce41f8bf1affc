"""Damaged checkpoints: found, reported, passed over, never deleted."""
import logging
import os
import shutil
from pathlib import Path

import pytest

from softmask_jax.io.checkpoint import Checkpoints
from tests.helpers.checkpoint_states import ABSTRACT, STATES, assert_same, save_three, trees


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """A folder with steps 1, 2, 3; tests that change it copy it."""
    return save_three(tmp_path_factory.mktemp("three") / "checkpoints")


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


def truncate(folder: Path) -> None:
    """All that holds data: some of it may be a copy that no one reads."""
    for path in folder.glob("*/**/d/*"):
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
