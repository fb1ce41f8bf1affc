"""The command line: every mistake is answered by one clear line on stderr and a nonzero status."""
import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from softmask_jax import config, main
from softmask_jax.io.run_folder import RunFolder
from softmask_jax.training import loop
from tests.helpers import crafted_run, tiny_run
from tests.helpers.xla_flags import ONE_DEVICE

ROOT = Path(__file__).parent.parent


@pytest.fixture
def command(tmp_path):
    """`command("--config.train.steps=3", ...)`: arguments for a run in tmp_path; a later one overrides an earlier."""
    tiny_run.write_texts(tmp_path / "texts")
    config = tiny_run.write_config(tmp_path / "tiny.py", tiny_run.settings(tmp_path))
    return lambda *more: ["--config", str(config), "--workdir", str(tmp_path / "run"), *more]


def refused(capsys, arguments: list[str], *patterns: str) -> None:
    """The run fails with one line on stderr that matches every pattern."""
    assert main.main(arguments) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith("Error: "), errors
    for pattern in patterns:
        assert re.search(pattern, errors), errors


@pytest.mark.parametrize(
    "override, patterns",
    [
        ("train.step=3", ["config.train has no key 'step'", "nearest is 'steps'"]),
        ("trian.steps=3", ["no section 'trian'", "nearest is 'train'"]),
        ("train.steps=many", ["config.train.steps must be int", "'many' is str"]),
        ("train.steps=2.5", ["config.train.steps must be int", "2.5 is float"]),
        ("model.compute_dtype=float16", ["choose one of float32, bfloat16"]),
        ("train.steps=0", ["config.train.steps must be positive, not 0"]),
        ("train.steps", ["--config.train.steps' is not of the form --config.section.key=value"]),
        ("optimizer.ema_decay=1.5", ["at least 0 and below 1, not 1.5"]),
        ("model.num_heads=3", ["config.model.hidden_size .16. must be a multiple of twice config.model.num_heads .3."]),
        ("train.micro_batches=3", ["config.train.global_batch_size .8. must be a multiple"]),
        ("train.global_batch_size=12", ["12 rows", "8 device groups", "make it a multiple of 8"]),
        ("eval.batch_size=4", ["config.eval.batch_size is 4 rows", "make it a multiple of 8"]),
        ("mesh.tensor=3", ["config.mesh .data=-1, fsdp=1, sequence=1, tensor=3. does not fit 8 device"]),
        ("mesh.data=4", ["config.mesh .data=4, fsdp=1, sequence=1, tensor=1. does not fit 8 device", "multiply to 8"]),
        ("data.paths=nowhere/*.txt", ["no file matches 'nowhere/\\*.txt'"]),
        ("data.paths=", ["--config.data.paths="]),
        ("data.seq_len=4096", ["the train split has \\d+ tokens, less than one window", "lower data.seq_len"]),
        ("data.tokenizer=words", ["data.tokenizer='words' is unknown"]),
        ("data.validation_documents=8", ["leaves no document for train"]),
        ("init.checkpoint=nowhere", ["config.init.checkpoint: no run in nowhere"]),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(command, capsys, override, patterns):
    refused(capsys, command(f"--config.{override}"), *patterns)


def test_a_corpus_that_cannot_be_used_is_named_in_one_line(command, capsys, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    refused(capsys, command(f"--config.data.paths={tmp_path}/blank.txt"), "1 read", "give it some")
    (tmp_path / "picture.txt").write_bytes(b"GIF89a\x00\x01")
    refused(capsys, command(f"--config.data.paths={tmp_path}/picture.txt"), "picture.txt: byte 6", "is not UTF-8 text")
    refused(capsys, command(f"--config.data.paths={tmp_path}/texts"), "matches only folders; for their files use")


def test_a_config_file_that_cannot_be_read_is_named_in_one_line(command, capsys, tmp_path):
    refused(capsys, command("--config", str(tmp_path / "tny.py")), "No config file at '.*tny.py'", "tiny.py")
    (tmp_path / "empty.py").write_text("")
    refused(capsys, command("--config", str(tmp_path / "empty.py")), "has no function get_config")


def test_a_workdir_that_cannot_be_used_is_named_in_one_line(command, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    refused(capsys, command("--workdir", str(tmp_path / "file")), "file is a file; give a folder")
    refused(capsys, command("--workdir", str(tmp_path / "file" / "run")), "Not a directory while writing .*file/run")
    with monkeypatch.context() as patch:
        # Permissions do not stop the administrator, who may be running this.
        patch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))
        refused(capsys, command(), "Permission denied while writing .*run", "Give a --workdir that can be written")
    with RunFolder(tmp_path / "run"):
        refused(capsys, command(), "run is in use by process", "another --workdir")


def test_a_bucket_that_cannot_be_used_is_named_in_one_line(command, capsys, emulator, bucket):
    emulator.requests.clear()
    refused(capsys, command("--workdir=gs://nowhere/x"), "gs://nowhere/x", "there is no such bucket; give another")
    emulator.faults = lambda method, path: 403
    refused(capsys, command(f"--workdir={bucket}"), str(bucket), r"refused \(403\); grant roles/storage.objectAdmin")
    emulator.faults = lambda method, path: 401
    refused(capsys, command(f"--workdir={bucket}"), "no valid credentials; run `gcloud auth application-default login`")
    assert len(emulator.requests) < 60  # no retries
    for folder, reason in (("gs://runs", "names a bucket without a folder"), ("s3://a/b", "only gs://")):
        with pytest.raises(SystemExit):
            main.main(command(f"--workdir={folder}"))
        assert reason in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_named_in_one_line(command, capsys, tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.write_config(tiny_run.settings(tmp_path, model__hidden_size=64))
    refused(capsys, command(), "model.hidden_size: 64 -> 16", "another --workdir to start a new run")


def test_a_missing_or_unknown_flag_is_named_and_shown_with_the_usage(command, capsys):
    for arguments, pattern in (
        (["--workdir", "runs/a"], "the following arguments are required: --config"),
        (command("--wrokdir=x"), "unrecognized arguments: --wrokdir=x"),
        (command("--profle"), "unrecognized arguments: --profle"),
    ):
        with pytest.raises(SystemExit) as end:
            main.main(arguments)
        errors = capsys.readouterr().err
        assert end.value.code == 2 and pattern in errors.splitlines()[-1] and "Traceback" not in errors


def test_a_trace_is_of_a_few_steps_or_of_a_range_before_or_after_other_flags(command):
    ask = lambda *words: main.parse(command(*words))[0].profile  # noqa: E731
    assert ask() is False and ask("--profile") is True and ask("--profile", "--debug") is True
    assert ask("--profile=5:9") == ask("--profile", "5:9", "--debug") == range(5, 9)
    assert ask("--profile", "--config.train.steps=3") is True
    assert main.parse(command("--profiler_port=9999"))[0].profiler_port == 9999


@pytest.mark.parametrize("flag", ["--profile=9:5", "--profile=5:5", "--profile=0:5", "--profile=5", "--profile=5:", "--profile=a:b",
                                  "--profile=1:2:3", "--profile=-1:3", "--profiler_port=0", "--profiler_port=70000",
                                  "--profiler_port=x"])  # fmt: skip
def test_a_range_that_is_none_and_a_port_that_is_none_are_refused_with_what_they_must_be(command, capsys, flag):
    with pytest.raises(SystemExit) as end:
        main.main(command(flag))
    name, _, value = flag.partition("=")
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"argument {name}: '{value}' is not " in last and re.search("1 <= A < B|1 to 65535", last)


def test_steps_to_trace_that_the_run_does_not_have_are_refused(command, capsys):
    refused(capsys, command("--profile=8:10"), "--profile=8:10 is not within the run's 8 steps", "A < B <= 9")


def test_a_finished_run_tells_its_goodput(tmp_path):
    summary = {"step": 3, "validation": crafted_run.scores(2.0, 0.1), "samples": [], "goodput": 0.75}
    assert "Goodput" not in main.report(summary, str(tmp_path))
    crafted_run.write_account(tmp_path, steps=45.0, start=15.0)
    told = "Goodput: 75.0% training steps in 1 min 0 s, 3 starts (Start-up 25.0%)"
    assert told in main.report(summary, str(tmp_path)).splitlines()


def test_help_is_complete_and_shows_a_command_that_is_accepted(capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    for flag in ("--config", "--workdir", "--fetch", "--profile", "--profiler_port", "--debug", "--config.SECTION.KEY"):
        assert flag in said
    for key in config.flatten(config.Config().to_dict()):
        assert f"\n  {key} " in said
    example = next(line for line in said.splitlines() if line.strip().startswith("python -m softmask_jax.main"))
    flags, overrides = main.parse(shlex.split(example)[3:])
    assert (ROOT / flags.config).is_file() and flags.workdir and not overrides
    assert "--config.train.steps=200" in said


def test_a_finished_run_names_its_report_if_it_has_one(tmp_path):
    summary = {"step": 3, "validation": crafted_run.scores(2.0, 0.1), "samples": []}
    assert "Report" not in main.report(summary, str(tmp_path))
    (tmp_path / "report.html").write_text("")
    assert f"Report       {tmp_path / 'report.html'}" in main.report(summary, str(tmp_path)).splitlines()


def test_overrides_may_be_given_as_two_words():
    flags, overrides = main.parse(["--config=a.py", "--workdir=b", "--config.train.steps", "3", "--config.mesh.data=1"])
    assert overrides == ["train.steps=3", "mesh.data=1"] and flags.config == "a.py"


def test_debug_shows_the_traceback(command, capsys):
    assert main.main(command("--config.train.steps=0", "--debug")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_outside_the_loop_says_that_nothing_is_lost(command, capsys, monkeypatch):
    monkeypatch.setattr(loop, "Trainer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main.main(command()) == 130
    assert capsys.readouterr().err == "Interrupted. The same command continues from the last checkpoint.\n"


def test_mistakes_end_a_real_process_with_one_line(command):
    arguments = [sys.executable, "-m", "softmask_jax.main", *command("--config.train.step=3")]
    ended = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ONE_DEVICE})
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr == "Error: config.train has no key 'step'; the nearest is 'steps'.\n"
