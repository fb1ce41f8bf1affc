"""The Colab notebooks: what is in their files, and what each leaves when a kernel runs it from top to bottom at toy size."""
import ast
import base64
import copy
import html
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import types
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from safetensors.numpy import load_file

from softmask_jax import config
from softmask_jax.generate import notebook
from softmask_jax.io import run_log
from tests.helpers import crafted_run
from tests.helpers.xla_flags import ONE_DEVICE

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "launch" / "colab"
PATHS = sorted(FOLDER.glob("*.ipynb"))
MOST_LINES = 15


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
class TestFile:
    def test_it_is_valid_has_no_outputs_and_opens_in_the_right_runtime(self, path):
        text = path.read_text("utf-8")
        book = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
        nbformat.validate(book)
        assert (book.nbformat, book.nbformat_minor) == (4, 5)
        assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"  # as Jupyter writes it
        assert book.metadata.kernelspec.name == "python3"
        runtime = book.metadata.get("accelerator"), book.metadata.colab.get("gpuType")
        assert runtime == (("TPU", "V5E1") if "dream" in path.stem else (None, None))
        ids = [cell.id for cell in book.cells]
        assert len(set(ids)) == len(ids) and all(re.fullmatch("[a-z-]+", id_) for id_ in ids)
        code = [cell for cell in book.cells if cell.cell_type == "code"]
        assert code and all(not cell.outputs and cell.execution_count is None for cell in code)

    def test_it_opens_with_what_it_needs_and_costs_and_what_was_run(self, path):
        first = nbformat.read(path, as_version=4).cells[0]
        assert first.cell_type == "markdown" and first.source.startswith("# ")
        for what in ("runtime", "memory", "downloads", "minutes", "compute units"):
            assert re.search(rf"^\| {what}[^|]* \| .+ \|$", first.source, re.MULTILINE), what
        assert "What was run:" in first.source and "Not yet:" in first.source

    def test_its_cells_are_short_parse_and_are_explained(self, path):
        cells = nbformat.read(path, as_version=4).cells
        for before, cell in zip(cells, cells[1:]):
            if cell.cell_type == "code":
                ast.parse(TransformerManager().transform_cell(cell.source))
                lines = cell.source.splitlines()
                assert len(lines) <= MOST_LINES and max(map(len, lines)) <= 125, cell.id
                assert before.cell_type == "markdown" or cell.id in ("install", "loss"), cell.id

    def test_its_paths_are_the_projects_and_what_it_names_exists(self, path):
        source = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
        assert not re.findall(r"(?<![\w.:/{}])/(?!content/drive|dev/)[a-z]+/", source)
        assert all((ROOT / name).exists() for name in re.findall(r"(?:configs|launch)/[\w./]+\.\w+", source))
        assert all((FOLDER / name).exists() for name in re.findall(r"\d_\w+\.ipynb", source))


def test_the_picture_is_there_before_anything_runs():
    (cell,) = (cell for cell in nbformat.read(PATHS[0], as_version=4).cells if cell.id == "picture-text")
    (content,) = re.findall(r"\(data:image/png;base64,([^)]+)\)", cell.source)
    assert base64.b64decode(content).startswith(b"\x89PNG") and len(content) < 40_000


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
@pytest.mark.parametrize("source, files, chosen, installed", [
    ("", ["softmask_jax-0.1.0-py3-none-any.whl", "softmask_jax.zip"], [], "softmask_jax-0.1.0-py3-none-any.whl"),
    ("", ["softmask_jax-main.zip"], [], "softmask_jax-main.zip"), ("", [], ["mine.zip"], "mine.zip"),
    ("https://example.org/softmask_jax.git", [], [], "git+https://example.org/softmask_jax.git"),
])  # fmt: skip
def test_the_package_is_installed_from_a_clone_a_file_or_what_the_user_chooses(
    path, source, files, chosen, installed, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in files:
        (tmp_path / name).touch()
    colab = types.SimpleNamespace(files=types.SimpleNamespace(upload=lambda: dict.fromkeys(chosen, b"")))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (cell,) = (cell for cell in nbformat.read(path, as_version=4).cells if cell.id == "install")
    pip: list = []
    kernel = types.SimpleNamespace(run_line_magic=lambda *words: pip.append(words))
    exec(TransformerManager().transform_cell(cell.source), names := {"SOURCE": source, "get_ipython": lambda: kernel})
    where = installed if "://" in installed else (tmp_path / installed).as_uri()
    assert names["source"] == where and names["extras"].endswith("hub,chat,hf")
    assert pip == [("pip", 'install --quiet "softmask_jax[{extras}] @ {source}"')]


@pytest.mark.parametrize("family", ["dream", "llada"])
@pytest.mark.parametrize("int8", [True, False])
def test_the_settings_of_fine_tuning_at_full_size_are_a_run(int8, family):
    book = nbformat.read(FOLDER / "3_finetune_dream.ipynb", as_version=4)
    names = {"SMOKE": False, "INT8": int8, "BASE": f"models/{family}", "FAMILY": family}
    exec(*(cell.source for cell in book.cells if cell.id == "settings"), names)
    made = config.load(names["CONFIG"], [word.removeprefix("--config.") for word in names["WORDS"]])
    assert (made.model.kind, made.model.base) == (family, f"models/{family}")
    assert made.model.base_dtype == ("int8" if int8 else "float")
    assert (made.model.adapter, made.soft_mask.variant, made.data.buckets) == ("dora", "topk", "640")
    train, _, validation = made.data.paths.partition(" | ")
    assert train.endswith(":train") and validation.endswith(":test")
    assert made.updates % made.eval.every == 0 and made.eval.every % made.checkpoint.every == 0


def test_a_training_that_was_stopped_before_its_first_validation_is_told_of_and_reported(tmp_path, capsys):
    book = nbformat.read(FOLDER / "3_finetune_dream.ipynb", as_version=4)
    run = crafted_run.write(tmp_path / "run", steps=40, finished=False)
    exec(*(cell.source for cell in book.cells if cell.id == "loss"), {"RUN": str(run), "notebook": notebook})
    assert "No validation loss yet" in capsys.readouterr().out
    assert "has not been validated yet" in (run / "report.html").read_text("utf-8")


class Kernels(AsyncKernelManager):
    """Of this very interpreter, whatever kernels the user has installed."""

    @property
    def kernel_spec(self):
        words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=words, display_name="Python 3", language="python")


class Executed:
    """A notebook whose cells were run in `folder`, as often as `times` in one kernel, with the package installed."""

    def __init__(self, name: str, folder: Path, monkeypatch, times: int = 1, family: str = "dream"):
        monkeypatch.setenv("SOFTMASK_JAX_SMOKE", "1")
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
        monkeypatch.setenv("XLA_FLAGS", ONE_DEVICE)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        self.folder, self.runs, self.book = folder, folder / "runs", nbformat.read(FOLDER / name, as_version=4)
        for cell in self.book.cells:
            cell.source = cell.source.replace('FAMILY = "dream"', f'FAMILY = "{family}"')
        self.book.cells = [cell for _ in range(times) for cell in copy.deepcopy(self.book.cells)]
        # A socket's path must be short, and pytest's folders are not.
        with tempfile.TemporaryDirectory() as sockets:
            kernels = Kernels(transport="ipc", ip=f"{sockets}/kernel")
            client = NotebookClient(self.book, km=kernels, timeout=300, resources={"metadata": {"path": str(folder)}})
            # Otherwise a kernel that the client did not make itself would live on.
            client.execute(cleanup_kc=True)

    def output(self, cell_id: str, mime: str) -> str:
        """The last output of a cell that has this form."""
        cell = self.last(cell_id)
        return [out.data[mime] for out in cell.outputs if mime in out.get("data", {})][-1]

    def last(self, cell_id: str):
        return [cell for cell in self.book.cells if cell.id == cell_id][-1]

    def printed(self, cell_id: str) -> str:
        cell = self.last(cell_id)
        return "".join(out.text for out in cell.outputs if out.output_type == "stream")

    def page(self, cell_id: str) -> str:
        """The page that a cell shows, taken out of its frame."""
        (source,) = re.findall('srcdoc="([^"]*)"', self.output(cell_id, "text/html"))
        return html.unescape(source)

    def steps_and_losses(self, run: str, kind: str = "validation", name: str = "loss"):
        return run_log.read(self.runs / run).column(kind, name)


@pytest.fixture
def execute(tmp_path, monkeypatch):
    return lambda name, **options: Executed(name, tmp_path, monkeypatch, **options)


def assert_four_ways(source: str, steps: int, answers: int = 1) -> list[str]:
    """Checks the table of a page; returns its texts."""
    wanted = [f"{name} masks, {count} steps" for count in (steps, steps // 4) for name in ("plain", "soft")]
    cost = r'<span class="pale">([\d.]+) calls, [\d.]+ tokens a call, [\d.]+ s an answer</span>'
    heads = re.findall(rf'<th scope="col">([^<]*)<br>{cost}', source)
    assert [name for name, _ in heads] == wanted
    calls = [float(count) for _, count in heads]
    assert calls[0] > 3 * calls[2] > 0 and calls[1] > 3 * calls[3] > 0 and max(calls) <= steps + 1
    texts = re.findall(r"<td><pre>\n(.*?)</pre></td>", source, re.DOTALL)
    assert len(texts) == 4 * answers
    return texts


def assert_readable(done: Executed) -> None:
    """Checks that the demo has played, which is readable in smoke mode, too."""
    assert done.page("demo") == (done.folder / "demo.html").read_text("utf-8")
    assert "--- plain masks, 16 steps\ndef main(" in done.printed("demo")


@pytest.mark.full
def test_a_small_model_learns_in_the_notebook_and_is_watched(execute):
    done = execute("1_train_small.ipynb", times=2)
    assert_readable(done)
    steps, losses = done.steps_and_losses("notebook_small", "train")
    assert steps[-1] == 36 and losses[-4:].mean() < losses[:2].mean() - 1
    _, nelbos = done.steps_and_losses("notebook_small", name="two_pass/nelbo")
    assert len(nelbos) == 4 and nelbos[-1] < nelbos[0]
    watched = done.page("train")
    assert "Step 36 of 36" in watched and "Mean \u03bb" in watched and "Validation perplexity" in watched
    assert done.page("report") == (done.runs / "notebook_small" / "report.html").read_text("utf-8")
    played = done.page("trajectory")
    assert played == (done.runs / "notebook_small" / "text.html").read_text("utf-8")
    assert 'id="trace"' in played and ", the largest on this page" in played  # lambda is above 0
    assert_four_ways(done.page("compare"), 8)


@pytest.mark.full
def test_dream_answers_in_four_ways_in_the_notebook(execute):
    done = execute("2_generate_with_dream.ipynb", times=2)
    assert_readable(done)
    assert "models/tiny_dream: bfloat16 kernels" in done.printed("convert")
    assert "variant='topk', k=1" in done.printed("load")
    texts = assert_four_ways(done.page("compare"), 16)
    assert texts[0] != texts[1] and texts[0] != texts[2]
    assert done.page("compare") == (done.runs / "side_by_side.html").read_text("utf-8")
    played = done.page("trajectory")
    assert played == (done.runs / "trajectory.html").read_text("utf-8")
    assert "entropy, 4 steps" in played and ", the largest on this page" in played


@pytest.mark.full
def test_so_does_llada(execute):
    done = execute("2_generate_with_dream.ipynb", family="llada")
    assert "models/tiny_llada: bfloat16 kernels" in done.printed("convert")
    assert_four_ways(done.page("compare"), 16)
    assert "low_confidence, 4 steps" in done.page("trajectory")


@pytest.mark.full
def test_llada_learns_in_the_notebook_is_exported_and_chats(execute):
    done = execute("3_finetune_dream.ipynb", family="llada")
    assert "models/tiny_llada_int8: int8 kernels" in done.printed("convert")
    steps, losses = done.steps_and_losses("notebook_llada/run")
    assert list(steps) == [10, 20, 30, 40] and losses[-1] < losses[0]
    assert "low_confidence, 8 steps" in done.page("chat")


@pytest.mark.full
def test_dream_learns_in_the_notebook_survives_a_disconnection_is_exported_and_chats(execute):
    done = execute("3_finetune_dream.ipynb", times=2)
    assert_readable(done)
    assert "models/tiny_dream_int8: int8 kernels" in done.printed("convert")
    work = done.runs / "notebook_dream"
    steps, losses = done.steps_and_losses("notebook_dream/run")
    assert list(steps) == [10, 20, 30, 40] and losses[-1] < losses[0] - 0.1
    assert f"{losses[0]:.4f} after 10 steps, {losses[-1]:.4f} after 40" in done.printed("loss")
    assert done.page("loss") == (work / "run" / "report.html").read_text("utf-8")
    assert "Step 40 of 40" in done.page("train")
    tensors = load_file(work / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 4 * 3 and all(abs(value).max() > 0 for value in tensors.values())
    assert json.loads((work / "adapter" / "adapter_config.json").read_text())["use_dora"] is True
    transparency = json.loads((work / "adapter" / "transparency_config.json").read_text())
    assert transparency["transparency_alg"] == "mixinputs_with_topk" and transparency["transparency_scale"] != 0.2
    assert "transparency_config.json" in done.printed("export")
    assert re.search(r"\[\d+ new tokens, 8 network calls, 2\.00 tokens a call", done.printed("chat"))
    assert done.page("chat") == (work / "chat.html").read_text("utf-8") and "entropy, 8 steps" in done.page("chat")

    # The machine is gone in the middle of it, its folder on Drive is not.
    for lost in (done.folder / "models", done.runs / "tiny_dream", work / "run" / "checkpoints" / "40", work / "adapter"):
        shutil.rmtree(lost)
    (work / "run" / "summary.json").unlink()
    again = execute("3_finetune_dream.ipynb")
    assert "Continuing from step 20." in again.printed("train")
    assert again.steps_and_losses("notebook_dream/run")[1].tolist() == losses.tolist()
    for name, value in load_file(work / "adapter" / "adapter_model.safetensors").items():
        assert value.tobytes() == tensors[name].tobytes(), name
