"""Runs in `runs/`: the default folder of a config, and the only run that there is, in every command that takes one."""
import errno
from pathlib import Path

import pytest

import softmask_jax
from softmask_jax import main, supervise
from softmask_jax.config import located
from softmask_jax.evaluate import __main__ as evaluate, runner
from softmask_jax.generate import __main__ as generate
from softmask_jax.io.run_folder import RunFolder
from softmask_jax.io.runs import default_folder, only_run
from softmask_jax.report import __main__ as report
from tests.helpers import crafted_run, tiny_run
from tests.helpers.fake_model import FakeModel


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_file(name: str) -> Path:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    return tiny_run.write_config(Path(name), tiny_run.settings(Path()))


def made(*names: str) -> None:
    """Runs with a page's worth of metrics."""
    for name in names:
        (crafted_run.write(Path(name)) / "checkpoints").mkdir()


@pytest.mark.parametrize("path, variant, folder", [
    ("configs/dream7b.py", "", "runs/dream7b"),
    ("configs/dream7b.py", ":int8", "runs/dream7b-int8"),
    ("configs/dream7b.py", ":", "runs/dream7b"),
    ("configs/v1.2 of mine.py", ":lr=1e-3, k=2", "runs/v1.2 of mine-lr=1e-3, k=2"),
    ("elsewhere/deep/a.py", "", "runs/a"),
    ("a:b.py", "", "runs/a:b"),
    ("recipe.v2", ":ü", "runs/recipe.v2-ü"),
    ("-.py", "", "runs/-"),
])  # fmt: skip
def test_a_run_is_named_by_its_config_and_variant(path, variant, folder, here, capsys):
    config_file(path)
    for given in (path, here / path):
        assert default_folder(f"{given}{variant}") == folder
    assert main.parse([f"--config={path}{variant}", "--config.train.steps=3"])[0].workdir == folder
    assert capsys.readouterr().err == f"The run is in {folder} (--workdir=FOLDER chooses another).\n" * 3


@pytest.mark.parametrize("path, variant", [
    ("a.py", ":b/c"), ("a.py", ":/"), ("a.py", ":b\nc"), ("a.py", ":\x1b[2J"), ("...py", ""), (".py", ""), ("a.py", ":\\"),
    ("a.py", ":\udcff"), ("a.py", ":.__lock"),
])  # fmt: skip
def test_a_name_that_no_folder_can_have_is_refused_in_one_line(path, variant, capsys):
    config_file(path)
    assert located(f"{path}{variant}") == (path, variant[1:])
    with pytest.raises(SystemExit, match="2"):
        main.main([f"--config={path}{variant}"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: --" in last and ("give --workdir=FOLDER" in last or "rename the folder or give another" in last)
    assert not Path("runs").exists()


def test_a_config_that_is_not_there_is_named_before_any_folder(capsys):
    for command in (main.main, supervise.supervise):
        assert command(["--config=configs/none.py"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: There is no config 'configs/none.py'") and error.count("\n") == 1


def test_a_supervisor_hands_its_process_the_same_folder(monkeypatch, capsys):
    config_file("a.py")
    commands = []

    def watched(command, **_):
        commands.append(command)
        raise ValueError("enough")

    monkeypatch.setattr(supervise, "Watched", watched)
    for words, folder in (([], "runs/a"), (["--workdir", "mine"], "mine")):
        assert supervise.supervise(["--config=a.py", *words]) == 1
        assert main.parse(commands[-1][3:])[0].workdir == folder
    assert capsys.readouterr().err.count("The run is in") == 1


def test_a_folder_that_cannot_be_made_is_one_line(monkeypatch, capsys):
    config_file("a.py")
    Path("runs").write_text("")
    assert main.main(["--config=a.py"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith("Error: ") and "Give a --workdir that can be written" in lines[1]
    Path("runs").unlink()
    # Permissions do not stop the administrator, who may be running this.
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "no")))
    assert main.main(["--config=a.py"]) == 1
    assert "Read-only file system while writing" in capsys.readouterr().err


def test_a_run_of_another_config_under_the_same_name_is_refused(capsys):
    config_file("a.py")
    with RunFolder("runs/a") as folder:
        folder.write_config(tiny_run.settings(Path(), model__hidden_size=64))
    assert main.main(["--config=a.py"]) == 1
    said = capsys.readouterr().err
    assert "model.hidden_size: 64 -> 16" in said and "another --workdir to start a new run" in said


def commands(monkeypatch) -> list:
    """(command without the name of a run, function that returns the run it took)."""
    loaded, settings = [], []

    def load(path, **_):
        loaded.append(path)
        return FakeModel()

    def evaluation(one, *_, **__):
        settings.append(one)
        raise ValueError("enough")

    monkeypatch.setattr(softmask_jax, "load", load)
    monkeypatch.setattr(runner, "Evaluation", evaluation)
    return [
        (lambda: generate.main(["--prompt=abc", "--max_new_tokens=5"]), lambda: loaded[-1]),
        (lambda: evaluate.main(["--tasks=perplexity", "--out=x"]), lambda: settings[-1].models.checkpoints),
        (lambda: report.main([]), lambda: str(next(Path("runs").rglob("report.html")).parent)),
    ]


def test_the_only_run_is_taken_and_said(monkeypatch, capsys):
    made("runs/a b")
    (Path("runs") / "tiny_dream" / "model").mkdir(parents=True)
    (Path("runs") / "begun").mkdir()
    (Path("runs") / "notes.txt").write_text("")
    for command, taken in commands(monkeypatch):
        command()
        assert capsys.readouterr().err.startswith("Taking runs/a b, the only run in runs/.\n") and taken() == "runs/a b"


def test_none_and_several_are_one_line_that_says_what_to_type(monkeypatch, capsys):
    forms = ("--checkpoint=FOLDER", "--checkpoint=FOLDER", "python -m softmask_jax.report FOLDER")
    for command, form in zip(commands(monkeypatch), forms, strict=True):
        assert command[0]() == 1
        assert capsys.readouterr().err == f"Error: There is no run in {Path('runs').absolute()}: give {form}.\n"
    made(*(f"runs/{i:02d}" for i in range(1, 12)), "runs/00 x\ny")
    for command, form in zip(commands(monkeypatch), forms, strict=True):
        assert command[0]() == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: There are 12 runs ('runs/00 x\\ny', runs/01, runs/02, ") and error.count("\n") == 1
        assert "runs/09 and 2 more)" in error and error.endswith(f"choose one with {form}.\n")


def test_runs_may_be_a_file(here):
    Path("runs").write_text("")
    with pytest.raises(FileNotFoundError, match="There is no run in "):
        only_run("{}")
