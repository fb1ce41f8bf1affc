"""The run's folder: lock, atomic files, config on resume, the metrics file."""
import errno
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.io import run_folder
from softmask_jax.io.files import plain, write_atomically, write_json
from softmask_jax.io.run_folder import RunFolder, versions
from tests.helpers.held_folder import held

CONFIG = {"model": {"kind": "dit", "hidden_size": 64}, "soft_mask": {"variant": "topk", "k": 3}, "train": {"steps": 10}}


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path):
    with held(tmp_path) as child:
        with pytest.raises(RuntimeError, match=f"in use by process {child.pid} on .*--workdir"):
            RunFolder(tmp_path)
        RunFolder(tmp_path, lock=False)
    # The kernel gives a dead process's lock back: no stale lock to remove by hand.
    with RunFolder(tmp_path) as folder:
        assert folder.is_writer


def test_closing_gives_the_lock_back(tmp_path):
    with RunFolder(tmp_path / "a" / "b") as folder, pytest.raises(RuntimeError, match="in use"):
        RunFolder(folder.path)
    assert not folder.is_writer
    RunFolder(tmp_path / "a" / "b").close()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(NotADirectoryError, match="give a folder"):
        RunFolder(tmp_path / "run")


def test_a_reader_writes_nothing(tmp_path):
    folder = RunFolder(tmp_path, lock=False)
    folder.write_config(CONFIG)
    folder.write_versions()
    folder.append({"step": 1})
    assert folder.truncate_metrics(0) == 0
    assert list(tmp_path.iterdir()) == []


def test_of_several_processes_only_the_first_locks(tmp_path, monkeypatch):
    with RunFolder(tmp_path) as first:
        monkeypatch.setattr(run_folder.jax, "process_index", lambda: 1)
        second = RunFolder(tmp_path)
        assert first.is_writer and not second.is_writer


def test_a_failed_write_keeps_the_old_file_and_leaves_no_rubbish(tmp_path, monkeypatch):
    write_json(tmp_path / "config.json", {"a": 1})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "config.json", "half")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


def test_leftovers_of_a_killed_writer_are_removed_by_the_next_one(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    leftovers = [tmp_path / ".config.json.1-a.tmp", tmp_path / "tokenizer" / ".tokenizer.json.1-a.tmp"]
    for path in leftovers:
        path.touch()
    RunFolder(tmp_path, lock=False)
    assert all(path.exists() for path in leftovers)
    with RunFolder(tmp_path):
        assert not any(path.exists() for path in leftovers)


@pytest.mark.parametrize("content", ["", '{"st', "[]", '{"finished": true}', b"\xff\xfe"])
def test_a_damaged_summary_counts_as_absent(tmp_path, content):
    folder = RunFolder(tmp_path, lock=False)
    assert folder.read_summary() is None
    (tmp_path / "summary.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert folder.read_summary() is None
    write_json(tmp_path / "summary.json", {"step": 3})
    assert folder.read_summary() == {"step": 3}


def test_plain_makes_valid_json_of_arrays_and_of_what_is_not_finite():
    record = {
        "a": np.float32(0.5), "b": jnp.bfloat16(2), "c": np.arange(3), "d": float("nan"), "e": jnp.float32(-jnp.inf),
        "f": np.bool_(True), "g": (1, None, "x"), "h": np.array([1.0, np.inf]), "i": np.int64(7),
    }  # fmt: skip
    expected = {
        "a": 0.5, "b": 2.0, "c": [0, 1, 2], "d": "nan", "e": "-inf", "f": True, "g": [1, None, "x"],
        "h": [1.0, "inf"], "i": 7,
    }  # fmt: skip
    assert plain(record) == expected
    assert json.loads(json.dumps(plain(record), allow_nan=False)) == expected
    with pytest.raises(ValueError, match="object .*cannot be written as JSON"):
        plain({"x": object()})


def test_an_unchanged_config_and_a_new_folder_are_fine(tmp_path):
    with RunFolder(tmp_path) as folder:
        assert folder.check_config(CONFIG) == []
        folder.write_config(CONFIG)
        assert folder.read_config() == CONFIG
        assert folder.check_config(CONFIG) == []


def test_a_config_that_does_not_fit_the_run_is_an_error_naming_keys_and_values(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write_config(CONFIG)
        other = {"model": {"kind": "dit", "hidden_size": 128}, "soft_mask": {"variant": "none", "k": 1}, "train": {}}
        with pytest.raises(ValueError) as caught:
            folder.check_config(other)
        message = str(caught.value)
        assert "model.hidden_size: 64 -> 128" in message
        assert 'soft_mask.variant: "topk" -> "none"' in message
        assert "soft_mask.k" not in message and "train.steps" not in message and "\n" not in message


def test_bearable_differences_are_returned(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write_config(CONFIG)
        other = {**CONFIG, "train": {"steps": 20, "seed": 1}}
        assert folder.check_config(other) == ["train.seed: (absent) -> 1", "train.steps: 10 -> 20"]


def test_an_unreadable_config_is_one_clear_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model": ')
    with RunFolder(tmp_path) as folder, pytest.raises(ValueError, match="config.json is not readable as JSON"):
        folder.check_config(CONFIG)


def test_versions_name_the_libraries_and_report_what_changed(tmp_path):
    found = versions()
    assert found["jax"] and found["orbax-checkpoint"] and found["python"] and "cpu" in found["device"]
    with RunFolder(tmp_path) as folder:
        assert folder.write_versions() == []
        stored = json.loads((tmp_path / "versions.json").read_text())
        assert stored == found
        write_json(tmp_path / "versions.json", {**stored, "jax": "0.1"})
        assert folder.write_versions() == [f"jax: 0.1 -> {found['jax']}"]


def test_metrics_are_in_the_file_as_soon_as_they_are_logged(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.append({"step": 1, "loss": np.float32(2.5)})
        folder.append({"step": 2, "loss": float("nan")})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": "nan"}]


def test_truncation_keeps_lines_up_to_the_restored_step_and_drops_a_half_written_one(tmp_path):
    with RunFolder(tmp_path) as folder:
        assert folder.truncate_metrics(3) == 0
        folder.append({"note": "start"})
        for step in (1, 3, 5, 7):
            folder.append({"step": step})
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 2, "lo')
        assert folder.truncate_metrics(3) == 3
        folder.append({"step": 4})
        assert folder.truncate_metrics(4) == 0
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"note": "start"}, {"step": 1}, {"step": 3}, {"step": 4}]


def test_a_line_after_a_half_written_one_is_still_readable(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with RunFolder(tmp_path) as folder:
        folder.append({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == ['{"step": 1}', '{"st', '{"step": 2}']
