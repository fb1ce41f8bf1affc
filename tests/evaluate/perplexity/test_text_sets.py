"""Texts to measure on: a run's own split, if it is still what it was, and others cut as training cuts."""
import json
import shutil

import numpy as np
import pytest

import softmask_jax
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.evaluate.perplexity import text_sets
from softmask_jax.evaluate.perplexity.task import Validation
from softmask_jax.evaluate.perplexity.text_sets import OWN, Text, evenly_spaced, other_text, own_text, sources
from tests.evaluate.test_compare import write_run
from tests.golden import FOLDER
from tests.helpers import tiny_run
from tests.helpers.validated import columns, work

EOS = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs on different text, and a converted model without a tokenizer."""
    at = tmp_path_factory.mktemp("texts")
    tiny_run.write_texts(at / "texts")
    tiny_run.write_texts(at / "else" / "texts", seed=1)
    write_run(at / "run", at, 6, seed=1)
    write_run(at / "other", at / "else", 6, seed=2)
    assert convert([f"--src={FOLDER / 'mdlm_dit/mdlm.ckpt'}", f"--dst={at / 'converted'}"]) == 0
    return at


@pytest.fixture(scope="module")
def model(folder):
    return softmask_jax.load(folder / "run")


def write(folder, *texts):
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return f"files:{folder}/*.txt"


def test_another_text_is_cut_as_training_cuts_with_all_of_its_documents(tmp_path, model):
    where = write(tmp_path / "poems", "one two three four", "  \n", "five six seven", "one two three four", "eight")
    text = other_text("poems", sources(f"poems={where}")["poems"], model)
    stream = b"".join(b"%s\0" % one for one in (b"one two three four", b"five six seven", b"one two three four", b"eight"))
    ids = [EOS if byte == 0 else byte for byte in stream]
    wanted = [[EOS, *ids[start : start + 14], EOS] for start in range(0, len(ids) - 13, 14)]
    assert model.tokenizer.bos_id == EOS and len(wanted) == 4
    np.testing.assert_array_equal(text.windows.gather(np.arange(len(text.windows))), wanted)
    assert text.notes == ("Of poems these documents are left out: 1 blank.",)


def test_options_behind_a_bar_say_how_a_text_is_read(tmp_path, model):
    rows = [json.dumps({"story": "do n't stop , go . " + letter}) + "\n" for letter in "abc"]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    plain, undone = (
        other_text("rows", sources(f"rows=jsonl:{tmp_path}/rows.jsonl|text_key=story{more}")["rows"], model)
        for more in ("", " | detokenizer=lm1b")
    )
    assert plain.windows.num_tokens > undone.windows.num_tokens
    assert b"do n't stop" in bytes(plain.windows.gather([0]).clip(0, 255).astype(np.uint8))


def test_every_text_has_estimates_of_its_own(tmp_path, folder, model):
    where = write(tmp_path / "songs", "la la la la la la " * 20)
    given = {"texts": f"songs={where}", "max_windows": 9, "draws": 1}
    result = Validation().run(work(tmp_path / "both", folder / "run", model, **given))
    assert list(result.estimates)[:2] == ["perplexity", "nelbo"]
    assert [name for name in result.estimates if name.startswith("songs/")] == [
        "songs/perplexity", "songs/nelbo", "songs/one_pass/perplexity", "songs/one_pass/nelbo", "songs/gain/nelbo"
    ]  # fmt: skip
    assert set(result.details["cross_entropy_by_t"]) == {OWN, "songs"}
    alone = Validation().run(work(tmp_path / "alone", folder / "run", model, own=False, **given))
    assert list(alone.estimates)[0] == "songs/perplexity"
    assert alone.estimates["songs/nelbo"] == result.estimates["songs/nelbo"]


def test_models_of_other_runs_are_compared_on_the_texts_they_share(tmp_path, folder, model):
    given = {"texts": f"songs={write(tmp_path / 'songs', 'la la la la la la ' * 20)}", "max_windows": 9, "draws": 1}
    works = [work(tmp_path / name, folder / name, softmask_jax.load(folder / name), **given) for name in ("run", "other")]
    a, b = (Validation().run(one).estimates for one in works)
    made = Validation().compare(*works)
    assert list(made) == ["songs/nelbo", "songs/one_pass/nelbo", "songs/gain/nelbo"]
    assert made["songs/nelbo"].value == pytest.approx(b["songs/nelbo"].value - a["songs/nelbo"].value)
    np.testing.assert_array_equal(columns(works[0], "songs").t, columns(works[1], "songs").t)


def test_text_that_changed_since_the_run_is_refused(tmp_path, folder, model):
    copy = tmp_path / "home"
    tiny_run.write_texts(copy / "texts")
    write_run(copy / "run", copy, 6, seed=1)
    loaded = softmask_jax.load(copy / "run")
    assert len(own_text(copy / "run", loaded).windows) > 9
    (copy / "texts" / "7.txt").write_text("something else entirely, and long enough to be a window")
    with pytest.raises(ValueError, match="has changed since the run.*config.perplexity.texts="):
        own_text(copy / "run", loaded)
    shutil.rmtree(copy / "texts")
    with pytest.raises(ValueError, match="cannot be read here .*config.perplexity.texts="):
        Validation().run(work(tmp_path / "gone", copy / "run", loaded))


def test_a_converted_model_has_no_split_of_its_own(tmp_path, folder, model):
    converted = softmask_jax.load(folder / "converted")
    with pytest.raises(ValueError, match="converted model or an adapter and brings no validation text.*config.perplexity.texts="):
        Validation().run(work(tmp_path / "none", folder / "converted", converted))
    where = write(tmp_path / "songs", "la la la la la la " * 20)
    with pytest.raises(ValueError, match="converted without a tokenizer"):
        Validation().run(work(tmp_path / "some", folder / "converted", converted, texts=f"songs={where}"))


def test_a_model_without_a_split_is_measured_on_the_others_with_a_note(tmp_path, folder, model, monkeypatch):
    monkeypatch.setattr(text_sets, "is_run", lambda path: False)
    where = write(tmp_path / "songs", "la la la la la la " * 20)
    given = {"texts": f"songs={where}", "draws": 1, "max_windows": 9}
    result = Validation().run(work(tmp_path / "noted", folder / "run", model, **given))
    assert list(result.estimates)[0] == "songs/perplexity" and "is a converted model" in result.notes[0]


@pytest.mark.parametrize("texts, message", [
    (("short",), "the t split has 6 tokens, less than one window"),
    (("", " \n"), "t holds no document with text .2 read, 0 bad"),
])  # fmt: skip
def test_texts_too_small_to_measure_say_so(tmp_path, model, texts, message):
    with pytest.raises(ValueError, match=message):
        other_text("t", sources(f"t={write(tmp_path / 't', *texts)}")["t"], model)


def test_a_fingerprint_is_of_the_chosen_windows_tokens(tmp_path, model):
    source = sources(f"t={write(tmp_path / 't', 'la la la la la la ' * 20)}")["t"]
    text, same = other_text("t", source, model), Text("u", other_text("u", source, model).windows)
    some, every = (evenly_spaced(len(text.windows), most) for most in (3, 0))
    assert text.fingerprint(every) == same.fingerprint(every) != text.fingerprint(some) and len(some) == 3
