"""Rows for Weights & Biases: each once and in order whatever happened to the run, and no mishap of W&B ends a run."""
import json
import math
import struct
import sys
from pathlib import Path

import pytest

from softmask_jax import main
from softmask_jax.io.run_folder import RunFolder
from softmask_jax.training import loop
from softmask_jax.training.wandb_rows import FINISHED, WandbRows
from tests.helpers import tiny_run
from tests.helpers.fake_wandb import wandb as wandb  # the fixture
from tests.helpers.tiny_run import Crash, STEPS, rows
from tests.helpers.tiny_run import home as home  # the fixture

PROJECT = {"train__wandb": "toys", "sample__every": 3, "sample__count": 1}


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        yield folder


def begun(folder, start=0, project="toys", say=pytest.fail):
    return WandbRows(folder, project, {"train": {"steps": 9}}, start, say)


def test_a_run_is_started_with_its_folder_name_and_config(folder, wandb):
    begun(folder).close(FINISHED)
    (run,) = wandb.runs
    wanted = {"project": "toys", "dir": str(folder.path), "name": "run", "resume": "allow"}
    wanted["config"] = {"train": {"steps": 9}}
    assert wanted.items() <= run.settings.items() and run.exit_code == 0
    assert run.metrics == [("step", None), ("*", "step")]


def test_numbers_histograms_and_texts_are_logged_as_what_they_are(folder, wandb):
    handed = begun(folder)
    handed.write(3, "train", {"loss": 2.0, "grad_norm": "nan", "lambda_histogram": [0.25, 0.75]})
    handed.write(3, "samples", {"texts": ["a", "b"]})
    first, second = wandb.runs[0].rows
    assert first["step"] == 3 and first["train/loss"] == 2.0 and math.isnan(first["train/grad_norm"])
    kind, shares, edges = first["train/lambda_histogram"]
    assert kind == "histogram" and list(shares) == [0.25, 0.75] and list(edges) == [0.0, 0.5, 1.0]
    assert second == {"step": 3, "samples/texts": ("table", ["text"], [["a"], ["b"]])}


def test_a_continued_run_is_the_same_and_gets_no_row_twice(folder, wandb):
    handed = begun(folder)
    for step in (1, 2, 3):
        handed.write(step, "train", {"loss": step})
    handed = begun(folder, start=1)  # the rows of 2 and 3 are computed again, 3 at last with its validation
    for step, kind in ((2, "train"), (3, "train"), (3, "validation"), (4, "train")):
        handed.write(step, kind, {"loss": step})
    assert wandb.logged() == [(1, "train"), (2, "train"), (3, "train"), (3, "validation"), (4, "train")]
    assert wandb.runs[0].settings["id"] == wandb.runs[1].settings["id"]


def test_another_project_or_a_damaged_note_begins_a_new_run_with_all_rows(folder, wandb):
    begun(folder).write(1, "train", {"loss": 1.0})
    folder.append({"step": 1, "kind": "train", "loss": 1.0})
    begun(folder, start=1, project="other")
    (folder.path / "wandb.json").write_text("{")
    begun(folder, start=1, project="other")
    assert len({run.settings["id"] for run in wandb.runs}) == 3 and wandb.logged() == 3 * [(1, "train")]


def test_a_failure_is_said_once_and_made_up_for_by_the_next_start(folder, wandb):
    said = []
    wandb.broken_at = 2
    handed = begun(folder, say=said.append)
    for step in (1, 2, 3):
        folder.append({"step": step, "kind": "train", "loss": float(step)})
        handed.write(step, "train", {"loss": float(step)})
    handed.close(FINISHED)
    assert len(said) == 1 and said[0].startswith("Warning: Weights & Biases failed (no route to host)")
    wandb.broken_at = None
    begun(folder, start=3).write(4, "train", {"loss": 4.0})
    assert wandb.logged() == [(step, "train") for step in (1, 2, 3, 4)]


def test_a_new_run_that_cannot_reach_wandb_is_refused_and_a_continued_one_warned(folder, wandb):
    wandb.refuses = Exception("api_key not configured")
    with pytest.raises(RuntimeError, match="cannot be started .api_key not configured.: `wandb login`, set WANDB_MODE"):
        begun(folder)
    said = []
    begun(folder, start=5, say=said.append).write(6, "train", {"loss": 1.0})
    assert len(said) == 1 and "goes on without it" in said[0]


@pytest.mark.full
def test_a_run_that_crashed_stopped_and_continued_has_every_row_once(home, wandb, capsys):
    """And W&B hears how each part ended."""
    with pytest.raises(Crash):
        home.run("tracked", crash_at=7, **PROJECT)  # the checkpoint is step 4: 6 is logged twice
    assert wandb.runs[-1].exit_code == 1
    home.run("tracked", stop_at=5, **PROJECT)
    assert wandb.runs[-1].exit_code == 255
    run, _ = home.run("tracked", **PROJECT)
    assert wandb.runs[-1].exit_code == 0 and len({one.settings["id"] for one in wandb.runs}) == 1
    # Step 5 was logged while W&B had 6 already.
    assert wandb.logged() == [(row["step"], row["kind"]) for row in rows(run) if row["step"] != 5]
    assert wandb.runs[0].settings["config"]["train"]["steps"] == STEPS
    last = wandb.runs[-1].rows[-2]
    assert last["final/two_pass/nelbo"] == rows(run, "final")[0]["two_pass/nelbo"]
    before = len(wandb.runs)
    home.run("tracked", **PROJECT)
    assert len(wandb.runs) == before  # a run that is done has nothing to log
    assert "Weights" not in capsys.readouterr().out


def test_a_failing_wandb_does_not_end_a_run(home, wandb, capsys):
    wandb.broken_at = 3
    run, summary = home.run("untracked", **PROJECT)
    assert summary["finished"] and (run / "report.html").exists()
    assert capsys.readouterr().out.count("Weights & Biases failed (no route to host)") == 1
    assert wandb.logged() == [(2, "train")]


def test_a_missing_package_is_one_line_before_anything_is_built(tmp_path, monkeypatch, capsys):
    tiny_run.write_texts(tmp_path / "texts")
    path = tiny_run.write_config(tmp_path / "tiny.py", tiny_run.settings(tmp_path, train__wandb="toys"))
    monkeypatch.setattr(loop.tasks, "make", lambda *_: pytest.fail("data were built"))
    for absent in (None, type(sys)("wandb")):  # not installed; a folder of that name
        monkeypatch.setitem(sys.modules, "wandb", absent)
        assert main.main([f"--config={path}", f"--workdir={tmp_path / 'run'}"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: config.train.wandb=toys needs the package wandb: pip install wandb")
        assert error.count("\n") == 1


@pytest.mark.full
def test_the_real_package_takes_every_row_offline(home, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed (pip install wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    home.run("offline", stop_at=5, **PROJECT)
    run, summary = home.run("offline", **PROJECT)
    assert summary["finished"]
    noted = json.loads((run / "wandb.json").read_text())
    assert noted["project"] == "toys" and noted["step"] == STEPS and noted["kinds"][-1] == "samples"
    parts = sorted(Path(run / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and all(part.name.endswith(noted["id"]) for part in parts)
    logged = [row for part in parts for row in offline_rows(part)]
    assert logged == [(row["step"], row["kind"]) for row in rows(run)]


def offline_rows(folder: Path) -> list[tuple[int, str]]:
    """(step, kind) of the rows in the transaction log of an offline run."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    found = []
    for data in log_records(path.read_bytes()[7:], first_block=32768 - 7):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            names = {"/".join([item.key, *item.nested_key]).strip("/"): item.value_json for item in record.history.item}
            kind = next(name for name in names if name.split("/")[0] in ("train", "validation", "samples", "final"))
            found.append((int(float(names["step"])), kind.split("/")[0]))
    return found


def log_records(content: bytes, first_block: int):
    """The records of a log in LevelDB's format, W&B's: blocks of 32 KiB with parts of records, each after 7 bytes."""
    at, block_end, whole = 0, first_block, b""
    while at + 7 <= len(content):
        if block_end - at < 7:
            at, block_end = block_end, block_end + 32768
            continue
        size, part = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if at >= block_end:
            block_end += 32768
        if part in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""
