"""What notebooks call: commands that fail loudly, pages in frames, curves of a run that goes on, answers side by side."""
import html
import json
import re
import shutil
import sys
import threading
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest

import softmask_jax
from softmask_jax import config
from softmask_jax.config.progress import Progress
from softmask_jax.diffusion import soft_masking
from softmask_jax.generate import notebook
from softmask_jax.generate.notebook import Page, SideBySide
from softmask_jax.report import page
from softmask_jax.samplers import Options, SoftMask
from tests.helpers import browsing, crafted_run, crafted_trace
from tests.helpers.browsing import browser  # noqa: F401 (a fixture)
from tests.helpers.fake_model import FakeModel, MASK

HOSTILE = '"></iframe><script>document.title="owned"</script>'


def framed(shown) -> str:
    """The page in the frame that something shows."""
    (source,) = re.findall('srcdoc="([^"]*)"', shown._repr_html_())
    return html.unescape(source)


def texts(table: SideBySide) -> list[str]:
    return [html.unescape(text) for text in re.findall(r"<td><pre>\n(.*?)</pre></td>", framed(table), re.DOTALL)]


def test_a_command_runs_in_this_process_and_its_failure_is_an_error(tmp_path, capsys):
    notebook.run("report", str(crafted_run.write(tmp_path / "run")), f"--out={tmp_path / 'page.html'}")
    assert "100 steps" in framed(notebook.read_page(tmp_path / "page.html"))
    with pytest.raises(RuntimeError, match=r"^python -m softmask_jax.report ended with status 1; its message is above.$"):
        notebook.run("report", str(tmp_path / "nothing"))
    assert "Error: No run in" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="softmask_jax.convert ended with status 2"):
        notebook.run("convert", "--source=typo")
    assert "--src" in capsys.readouterr().err
    notebook.run("convert", "--help")
    assert "Convert weights" in capsys.readouterr().out


def test_memory_is_the_accelerators_or_the_machines(monkeypatch):
    (machine,) = re.findall(r"MemTotal: +(\d+) kB", open("/proc/meminfo").read())
    assert notebook.memory_gib() == pytest.approx(int(machine) / 2**20, rel=0.05)
    chip = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 16 * 2**30, "bytes_in_use": 5})
    monkeypatch.setattr(jax, "local_devices", lambda: [chip])
    assert notebook.memory_gib() == 16


def test_a_page_stays_inside_its_frame(tmp_path):
    source = f"<!DOCTYPE html><p>{HOSTILE} &amp; caf\u00e9</p>"
    (tmp_path / "page.html").write_text(source, "utf-8")
    read = notebook.read_page(tmp_path / "page.html", height=321)
    shown = read._repr_html_()
    assert framed(read) == source and shown.count("<") == 2 and 'height="321"' in shown
    assert 'sandbox="allow-scripts"' in shown and len(repr(read)) < 60
    with pytest.raises(FileNotFoundError):
        notebook.read_page(tmp_path / "none.html")


@pytest.mark.parametrize("soft", [True, False])
def test_the_curves_are_those_of_the_run_so_far(tmp_path, soft):
    assert "Starting" in framed(notebook.curves_page(tmp_path / "run"))
    run = crafted_run.write(tmp_path / "run", soft=soft, finished=False)
    source = framed(notebook.curves_page(run))
    titles = re.findall("<figcaption>(.*?)</figcaption>", source)
    assert titles == ["Training loss", "Validation perplexity"] + ["Mean \u03bb"] * soft and "Step 100 of 100" in source
    assert ("two passes" in source) == soft


def test_the_curves_of_fine_tuning_are_losses(tmp_path):
    run = crafted_run.write(tmp_path / "run", soft=False, finished=False)
    rows = ((5, "train", 3.0), (5, "validation", 2.5), (7, "train", 2.0))
    lines = (json.dumps({"step": step, "kind": kind, "loss": loss}) + "\n" for step, kind, loss in rows)
    (run / "metrics.jsonl").write_text("".join(lines))
    source = framed(notebook.curves_page(run))
    assert re.findall("<figcaption>(.*?)</figcaption>", source) == ["Training loss", "Validation loss"]
    assert "Step 7 of 100" in source


@pytest.fixture
def shown(monkeypatch):
    """What a notebook's display was given, and an event that it was given something anew."""
    seen, anew = [], threading.Event()

    def update(value):
        seen.append(framed(value))
        anew.set()

    def display(value, display_id):
        assert display_id is True
        seen.append(framed(value))
        return SimpleNamespace(update=update)

    module = ModuleType("IPython.display")
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return seen, anew


def test_a_run_is_watched_while_it_goes_on_and_to_its_end(tmp_path, shown, capsys):
    seen, anew = shown
    with notebook.watch(tmp_path / "run", every=0.01):
        assert "Starting" in seen[0]
        with Progress(50, "Step") as hidden:  # the curves show it
            hidden.update(50)
        crafted_run.write(tmp_path / "run", finished=False, steps=50)
        for _ in range(2):  # the one that is being drawn may not know of it yet
            anew.clear()
            assert anew.wait(60)
        assert "Step 50 of 50" in seen[-1]
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        crafted_run.write(tmp_path / "run", finished=True, steps=100)
    assert "Step 100 of 100" in seen[-1] and not capsys.readouterr().err
    assert not [thread for thread in threading.enumerate() if "follow" in thread.name]


def test_watching_ends_with_a_run_that_fails(tmp_path, shown):
    with pytest.raises(RuntimeError, match="status 1"), notebook.watch(tmp_path / "run", every=60):
        notebook.run("report", str(tmp_path / "run"))
    assert len(shown[0]) == 2 and not [thread for thread in threading.enumerate() if "follow" in thread.name]


class Chat(FakeModel):
    """A fake that answers chats: the prompt's letters behind a mark."""

    template = "user:"

    def encode_chat(self, messages):
        (message,) = messages
        return self.tokenizer.encode("user:" + message["content"])


WAYS = {"plain": Options(steps=4, soft_mask="none"), "<soft>": Options(steps=4)}


@pytest.mark.parametrize("make", [FakeModel, Chat])
def test_every_way_answers_every_prompt_and_says_what_it_cost(make):
    model = make()
    table = notebook.side_by_side(model, ["def f(", "x" * 100, "y"], WAYS, max_new_tokens=5)
    assert list(table.answers) == list(WAYS)
    assert [row["index"] for row in table.answers["plain"]] == [0, 1, 2]
    assert all(len(row["text"]) == 5 for rows in table.answers.values() for row in rows)
    assert texts(table) == [table.answers[way][i]["text"] for i in range(3) for way in WAYS]
    source = framed(table)
    assert "&lt;soft&gt;<br>" in source and source.count("4.0 calls, 1.25 tokens a call, ") == 2
    assert [options for options in model.options[::4]] == list(WAYS.values()) and len(model.options) == 8  # each way twice
    again = notebook.side_by_side(make(), ["def f(", "x" * 100, "y"], WAYS, max_new_tokens=5)
    assert texts(again) == texts(table)
    assert texts(notebook.side_by_side(make(), ["def f(", "x" * 100, "y"], WAYS, max_new_tokens=5, seed=1)) != texts(table)


def test_a_model_of_fixed_length_continues_up_to_it():
    model = FakeModel("right")
    (row,) = notebook.side_by_side(model, ["abc"], {"one": Options()}).answers["one"]
    assert len(row["tokens"]) == model.max_length - 4  # BOS and three letters


def test_texts_of_models_are_inert_in_the_table():
    model = FakeModel(write=lambda count: np.frombuffer(HOSTILE.encode(), np.uint8)[:count].astype(np.int32))
    table = notebook.side_by_side(model, [HOSTILE], {HOSTILE: Options()}, max_new_tokens=len(HOSTILE))
    assert texts(table) == [HOSTILE] and framed(table).count("owned") == 3
    assert "<script>document" not in framed(table)


def test_nothing_to_compare_is_refused():
    for prompts, ways in (([], WAYS), (["a"], {})):
        with pytest.raises(ValueError, match="needs a prompt and a way"):
            notebook.side_by_side(FakeModel(), prompts, ways)
    with pytest.raises(ValueError, match="prompt 2: the prompt's 301 tokens"):
        notebook.side_by_side(FakeModel(), ["a", "x" * 300], WAYS, max_new_tokens=5)


SCALARS = {"transparency_scale": 0.3, "transparency_centre": -2.0, "transparency_steepness": 4.0}


def dream() -> softmask_jax.Model:
    params = {"backbone": {"w": np.ones(2)}, "soft_mask": soft_masking.init_scalars()}
    settings = config.Config(config.Model(kind="dream"), config.SoftMask("none", 1))
    return softmask_jax.Model(settings, None, None, params, 0)


def test_a_dream_takes_the_soft_masking_of_a_transparency_config():
    model = dream()
    found = notebook.soft_masked(model, {"transparency_alg": "mixinputs_with_topk", "mixinputs_k": 2, **SCALARS})
    assert found.soft_mask == SoftMask("topk", 2) and found.params["backbone"] is model.params["backbone"]
    values = soft_masking.effective(found.params["soft_mask"])
    np.testing.assert_allclose([values.scale, values.centre, values.steepness], [0.3, -2.0, 4.0], rtol=1e-5)
    assert model.soft_mask == SoftMask()
    off = notebook.soft_masked(found, {"transparency_alg": "none"})
    assert off.soft_mask == SoftMask() and off.params is found.params
    with pytest.raises(ValueError, match="lack transparency_scale"):
        notebook.soft_masked(model, {"transparency_alg": "mixinputs_with_topk", "mixinputs_k": 1})


class Traced(FakeModel):
    """A fake that keeps a trace, whatever it is given."""

    def fill(self, tokens, attention_mask, *, keys, options, prompt_length=0, trace=False):
        assert trace and len(tokens) == 1
        self.seen.append((tokens.shape, attention_mask.sum()))
        return crafted_trace.generated(rows=1, length=tokens.shape[1], mask=MASK)


def test_the_page_of_an_answer_has_its_steps_and_not_its_padding():
    model = Traced()
    shown = notebook.trajectory(model, "abc", Options(alg="entropy", steps=9), max_new_tokens=5, height=777)
    assert shown.height == 777 and model.seen == [((1, 69), 9)]  # BOS, three letters, five masks; 60 of padding
    source = framed(shown)
    for name, value in (("sampler", f"entropy, {crafted_trace.STEPS} steps"), ("network calls", crafted_trace.STEPS - 1)):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in source
    trace = json.loads(re.search('id="trace">(.*?)</script>', source, re.DOTALL)[1])
    assert len(trace["rows"][0]["start"]) == 9 and len(trace["rows"][0]["changes"]) == crafted_trace.STEPS


@pytest.mark.full
def test_a_framed_page_runs_its_script_and_reaches_nothing_outside(browser, tmp_path):  # noqa: F811
    script = """let seen = "closed"; try { parent.document.title = "owned"; seen = "open"; } catch {}
      parent.postMessage("ran, " + seen, "*");"""
    framed_page = Page(page.document("inside", "<p>text</p>", script=script))
    (tmp_path / "outer.html").write_text(
        "<!DOCTYPE html><title>outer</title><pre></pre><script>addEventListener('message', event => {"
        f"document.querySelector('pre').textContent = event.data; }});</script>{framed_page._repr_html_()}", "utf-8"
    )
    dom, console = browsing.dumped(browser, tmp_path / "outer.html")
    assert "<pre>ran, closed</pre>" in dom and "<title>outer</title>" in dom and "Refused" not in console
