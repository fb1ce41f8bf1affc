"""The base of a run: the command that makes it, and --fetch, which does so from a folder or from the hub."""
import contextlib
import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from softmask_jax import config, main
from softmask_jax.config import Model
from softmask_jax.convert import bases, outputs, tiny_dream
from softmask_jax.convert.__main__ import main as convert, parse
from softmask_jax.io.files import locked
from softmask_jax.training import loop
from softmask_jax.training.tasks.task import read_base
from tests.helpers.pretended_hub import Hub, serving
from tests.helpers.waiting import until
from tests.helpers.xla_flags import ONE_DEVICE

ROOT = Path(__file__).parents[2]
REPOSITORY = "Dream-org/Dream-v0-Instruct-7B"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder with a tiny Dream and conversations."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_dream.make(folder, conversations=60)
    return folder


@pytest.fixture
def model(tiny, tmp_path):
    return Model(kind="dream", base=str(tmp_path / "base"), base_source=str(tiny / "hf"))


def refused(model: Model, *parts: str, fetch: bool = False, processes: int = 1) -> None:
    """`ensure` fails with one line that has all parts."""
    with pytest.raises((ValueError, OSError, RuntimeError)) as error:
        bases.ensure(model, fetch=fetch, processes=processes)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name, overrides, wanted", [
    ("dream7b.py", [], "--src=hf://Dream-org/Dream-v0-Instruct-7B --dst=models/dream"),
    ("dream7b.py:int8", [], "--src=hf://Dream-org/Dream-v0-Instruct-7B --dst=models/dream_int8 --int8"),
    ("dream_coder7b.py", [], "--src=hf://Dream-org/Dream-Coder-v0-Instruct-7B --dst=models/dream_coder"),
    ("dream_coder7b.py", ["model.base=~/my models/x", "model.base_dtype=int8"],
     "--src=hf://Dream-org/Dream-Coder-v0-Instruct-7B '--dst=~/my models/x' --int8"),
    ("dream7b.py:smoke", [], "--src=runs/tiny_dream/hf --dst=runs/tiny_dream/model"),
    ("dream7b.py", ["model.base_source="], "--src=hf://OWNER/NAME --dst=models/dream"),
])  # fmt: skip
def test_a_base_that_is_not_there_is_offered_with_the_command_that_makes_it(name, overrides, wanted, tmp_path, monkeypatch):
    settings = config.load(f"{ROOT}/configs/{name}", overrides)
    monkeypatch.chdir(tmp_path)
    refused(settings.model, f"python -m softmask_jax.convert {wanted} makes one", "--fetch")
    assert parse(shlex.split(bases.command_line(settings.model))[3:]).dst == settings.model.base


def test_the_command_says_so_first_and_a_finished_run_needs_no_base(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "Trainer", None)
    command = [f"--config={ROOT}/configs/dream7b.py"]
    assert main.main(command) == 1
    where, error = capsys.readouterr().err.splitlines()[:2]
    assert where.startswith("The run is in runs/dream7b ") and error.startswith("Error: config.model.base: no converted")
    assert main.main([*command, "--fetch", "--config.model.base_source="]) == 1
    assert "config.model.base_source must name" in capsys.readouterr().err
    Path("runs/dream7b/summary.json").write_text('{"step": 33500, "validation": {"loss": 1.0}, "samples": [], "finished": true}')
    assert main.main(command) == 0 and "This run is done" in capsys.readouterr().out


def test_a_base_is_fetched_once_and_is_what_the_command_makes(model, tmp_path, capsys):
    bases.ensure(model, fetch=True, processes=1)
    assert capsys.readouterr().out.splitlines()[0].endswith(bases.command_line(model))
    assert convert([*bases.command(model), "--verify"]) == 0
    capsys.readouterr()
    for fetch, processes in ((True, 1), (False, 1), (True, 2)):
        bases.ensure(model, fetch=fetch, processes=processes)
    assert capsys.readouterr().out == "" and sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    bases.ensure(Model(), fetch=True, processes=1)  # a model without a base


def test_what_cannot_be_fetched_is_one_line_and_nothing_is_touched(model, tmp_path):
    refused(model, "for a single process", bases.command_line(model), fetch=True, processes=2)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine").write_text("")
    for fetch in (False, True):
        refused(model, "holds something else than a converted model", "--dst=FOLDER makes one", fetch=fetch)
    (tmp_path / "file").write_text("mine")
    refused(Model(kind="dream", base=str(tmp_path / "file"), base_source=model.base_source), "something else", fetch=True)
    below = Model(kind="dream", base=str(tmp_path / "file" / "base"), base_source=model.base_source)
    refused(below, "Not a directory", fetch=True)
    gone = Model(kind="dream", base=str(tmp_path / "new"), base_source=str(tmp_path / "gone"))
    refused(gone, f"{tmp_path / 'gone'} does not exist", fetch=True)
    (tmp_path / ".new.partial").mkdir()
    with locked(tmp_path / ".new.partial", "wait"):
        refused(Model(kind="dream", base=gone.base, base_source=model.base_source), "is in use by process", fetch=True)
    assert not (tmp_path / "new").exists() and (tmp_path / "file").read_text() == "mine"


def test_a_conversion_that_ends_early_leaves_no_base_and_the_next_one_makes_it(model, tmp_path, monkeypatch):
    for end in (KeyboardInterrupt(), OSError(errno.ENOSPC, "full")):

        def broken(folder, *_, **__):
            (folder / "config.json").write_text("{}")
            raise end

        with monkeypatch.context() as patch, pytest.raises(type(end)):
            patch.setattr(outputs, "write", broken)
            bases.ensure(model, fetch=True, processes=1)
        assert list(tmp_path.iterdir()) == []
    # As a kill leaves it.
    (tmp_path / ".base.partial" / "folder").mkdir(parents=True)
    (tmp_path / ".base.partial" / "folder" / "config.json").write_text("{}")
    assert not bases.exists(model)
    bases.ensure(model, fetch=True, processes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"] and read_base(model)["kind"] == "dream"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """`asked(hub)`: this process asks `hub` from now on."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with contextlib.ExitStack() as stack:

        def ask(hub: Hub | None) -> None:
            address = stack.enter_context(serving(hub)) if hub else "http://127.0.0.1:9"
            monkeypatch.setattr(constants, "ENDPOINT", address)
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

        yield ask


def test_a_base_comes_from_the_hub_without_its_code(tiny, tmp_path, asked):
    shutil.copytree(tiny / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "modeling_dream.py").write_text("")
    asked(hub := Hub(REPOSITORY, tmp_path / "hf"))
    model = Model(kind="dream", base=str(tmp_path / "base"), base_source=f"hf://{REPOSITORY}", base_dtype="int8")
    bases.ensure(model, fetch=True, processes=1)
    assert read_base(model)["base_dtype"] == "int8" and (tmp_path / "base/tokenizer/tokenizer.json").is_file()
    assert "model.safetensors" in hub.asked and not any(name.endswith(".py") for name in hub.asked)


def test_a_hub_that_refuses_or_is_not_there_is_one_line(tiny, tmp_path, asked, monkeypatch):
    model = Model(kind="dream", base=str(tmp_path / "base"), base_source=f"hf://{REPOSITORY}")
    for status, part in ((403, "403"), (401, "401"), (404, "404"), (503, "503"), (0, "Connection refused")):
        asked(Hub(REPOSITORY, tiny / "hf", status=status) if status else None)
        refused(model, f"--src=hf://{REPOSITORY} cannot be downloaded (", part, fetch=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(model, "pip install 'softmask_jax[hub]'", fetch=True)
    assert not bases.exists(model)


@pytest.mark.full
def test_a_download_killed_in_the_middle_goes_on_with_the_same_command_and_trains(tiny, tmp_path):
    pytest.importorskip("huggingface_hub")
    command = [
        sys.executable, "-m", "softmask_jax.main", f"--config={ROOT}/configs/dream7b.py:smoke", "--fetch",
        f"--config.model.base_source=hf://{REPOSITORY}", f"--config.data.paths=jsonl:{tiny / 'chats.jsonl'}",
        "--config.model.base=base", "--config.train.micro_batches=1", "--config.train.steps=2", "--config.sample.count=0",
    ]  # fmt: skip
    variables = {
        "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_DEVICE,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip
    hub = Hub(REPOSITORY, tiny / "hf", halts=1)
    with serving(hub) as address:
        options = {"cwd": tmp_path, "env": os.environ | variables | {"HF_ENDPOINT": address}}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        until(lambda: hub.half_sent.is_set() or process.poll() is not None, seconds=300)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (tmp_path / "base").exists()
        hub.go_on.set()
        done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0 and "base: 27 tensors" in done.stdout, done.stderr
    assert convert([f"--src={tiny / 'hf'}", f"--dst={tmp_path / 'base'}", "--verify"]) == 0
    assert (tmp_path / "runs/dream7b-smoke/summary.json").is_file()
    again = subprocess.run(command, capture_output=True, text=True, **options)  # the hub is gone
    assert again.returncode == 0 and "This run is done" in again.stdout and "fetching it" not in again.stdout
