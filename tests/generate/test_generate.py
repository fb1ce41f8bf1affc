"""The command: what it prints and writes, how it stops and goes on, and its one answer to each thing that is wrong."""
import json
import os
import signal

import numpy as np
import pytest

import softmask_jax
from softmask_jax.generate import __main__ as generate
from tests.helpers.fake_model import END, FakeModel, MASK


class Killed(BaseException):
    """The process dies here, as far as its files can tell."""


@pytest.fixture
def model(monkeypatch):
    """The model that is loaded, whatever the checkpoint."""
    model = FakeModel()
    monkeypatch.setattr(softmask_jax, "load", lambda path, **given: model)
    return model


@pytest.fixture
def command(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *words: generate.main(["--checkpoint=model", "--max_new_tokens=5", *map(str, words)])


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--prompts={path.name}"


def rows_of(path, clock=False):
    found = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    return [{name: value for name, value in row.items() if clock or name != "seconds"} for row in found]


TEXTS = ["x" * n for n in (3, 70, 64, 65, 1, 130, 5, 9, 100, 2, 2)]


def test_the_answer_to_one_prompt_is_all_that_is_printed(command, capsys):
    assert command("--prompt=hello") == 0
    out, errors = capsys.readouterr()
    assert len(out) == 6 and out.endswith("\n") and "1 answer: 0.0% empty" in errors


def test_several_prompts_and_samples_have_headings_and_their_cost_if_wanted(command, capsys):
    assert command("--prompt=hello", "--prompt=2 + 2", "--num_samples=2", "--show_cost") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0::3] == ["--- 1, sample 1", "--- 1, sample 2", "--- 2, sample 1", "--- 2, sample 2"]
    assert lines[2].startswith("    [5 new tokens, 4 network calls, 1.25 tokens a call, 276 positions, ")
    assert lines[1] != lines[4]


def test_a_file_of_prompts_gives_a_file_of_answers_in_its_order(command, capsys, tmp_path):
    assert command(write(tmp_path / "in.jsonl", *TEXTS), "--out=out.jsonl", "--batch_size=2") == 0
    rows = rows_of(tmp_path / "out.jsonl", clock=True)
    assert [row["index"] for row in rows] == list(range(len(TEXTS))) and [row["prompt"] for row in rows] == TEXTS
    assert list(rows[0]) == [
        "index", "sample", "prompt", "text", "tokens", "new_tokens", "ended", "empty", "calls", "filled",
        "tokens_per_call", "positions", "seconds",
    ]  # fmt: skip
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert (summary["rows"], summary["calls"], summary["tokens_per_call"]) == (len(TEXTS), 4.0, 1.25)
    assert capsys.readouterr().out == ""
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert settings["step"] == 3 and settings["seed"] == 0 and settings["steps"] is None


def test_without_a_file_to_write_rows_go_to_standard_output(command, capsys, tmp_path):
    assert command(write(tmp_path / "in.jsonl", "a", {"parts": ["b", 3], "id": "two"})) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["index"] == 0 and second["id"] == "two" and len(second["fills"][0]) == 3


def test_a_finished_file_is_left_alone_and_the_model_not_loaded(command, capsys, tmp_path, monkeypatch):
    prompts = write(tmp_path / "in.jsonl", *TEXTS)
    assert command(prompts, "--out=out.jsonl") == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.setattr(softmask_jax, "load", None)
    capsys.readouterr()
    assert command(prompts, "--out=out.jsonl") == 0
    assert "has its 11 answers already" in capsys.readouterr().err and (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_batch_and_the_same_command_goes_on(
    command, model, capsys, tmp_path, monkeypatch, number
):
    prompts = write(tmp_path / "in.jsonl", *TEXTS)
    assert command(prompts, "--out=whole.jsonl") == 0
    fill = model.fill

    def signalled(*args, **kwargs):
        if len(model.seen) == 3:
            os.kill(os.getpid(), number)
        return fill(*args, **kwargs)

    model.seen.clear()
    monkeypatch.setattr(model, "fill", signalled)
    assert command(prompts, "--out=out.jsonl", "--batch_size=2") == 130
    assert len(rows_of(tmp_path / "out.jsonl")) == 6
    assert "Stopped after 6 of 11 answers. The same command goes on" in capsys.readouterr().err
    assert command(prompts, "--out=out.jsonl", "--batch_size=3") == 0
    assert rows_of(tmp_path / "out.jsonl") == rows_of(tmp_path / "whole.jsonl")


@pytest.mark.parametrize("death", range(1, 6))
def test_a_death_between_batches_repeats_and_loses_no_row(command, model, tmp_path, monkeypatch, death):
    prompts = write(tmp_path / "in.jsonl", *TEXTS)
    assert command(prompts, "--out=whole.jsonl", "--batch_size=2") == 0
    fill, batches = model.fill, len(model.seen)

    def dying(*args, **kwargs):
        if len(model.seen) == batches + death:
            raise Killed
        return fill(*args, **kwargs)

    monkeypatch.setattr(model, "fill", dying)
    with pytest.raises(Killed):
        command(prompts, "--out=out.jsonl", "--batch_size=2")
    monkeypatch.setattr(model, "fill", fill)
    before = model.seen[batches:]
    assert command(prompts, "--out=out.jsonl", "--batch_size=2") == 0
    assert before + model.seen[batches + death :] == model.seen[:batches]
    assert rows_of(tmp_path / "out.jsonl") == rows_of(tmp_path / "whole.jsonl")


def stopping(model, monkeypatch):
    """The model gets SIGTERM in every batch."""
    fill = model.fill
    monkeypatch.setattr(model, "fill", lambda *given, **named: os.kill(os.getpid(), signal.SIGTERM) or fill(*given, **named))


def test_a_stop_without_a_file_prints_what_there_is(command, model, capsys, monkeypatch):
    stopping(model, monkeypatch)
    assert command("--prompt=a", "--prompt=b", "--batch_size=1") == 130
    out, errors = capsys.readouterr()
    assert out.startswith("--- 1\n") and "--- 2" not in out and "Stopped after 1 of 2 answers." in errors


def test_answers_of_nan_end_with_status_1_and_the_others_are_kept(command, capsys, tmp_path):
    prompts = write(tmp_path / "in.jsonl", "good", "a NaN", "fine")
    for _ in range(2):  # the second time nothing is left to do
        assert command(prompts, "--out=out.jsonl") == 1
        errors = capsys.readouterr().err
        assert "Error: 1 of 3 answers failed: the model's logits were NaN or infinite (first in in.jsonl:2)." in errors
    assert ["error" in row for row in rows_of(tmp_path / "out.jsonl")] == [False, True, False]
    assert command("--prompt=a NaN") == 1 and "NaN" in capsys.readouterr().out


def test_other_settings_or_prompts_are_refused_and_another_batch_size_is_not(command, capsys, tmp_path):
    prompts = write(tmp_path / "in.jsonl", "a", "b")
    assert command(prompts, "--out=out.jsonl") == 0
    for word, said in [("--seed=1", "seed: 0 -> 1"), ("--steps=7", "steps: null -> 7"), ("--stop=x", 'stop: [] -> ["x"]')]:
        assert command(prompts, "--out=out.jsonl", word) == 1
        errors = capsys.readouterr().err
        assert said in errors and "give another --out" in errors
    assert command(prompts, "--out=out.jsonl", "--batch_size=1") == 0
    write(tmp_path / "in.jsonl", "a", "c")
    assert command(prompts, "--out=out.jsonl") == 1 and "prompts: " in capsys.readouterr().err


def test_a_run_that_went_on_since_is_not_mixed_in(command, model, capsys, tmp_path, monkeypatch):
    prompts = write(tmp_path / "in.jsonl", "a", "b")
    stopping(model, monkeypatch)
    assert command(prompts, "--out=out.jsonl", "--batch_size=1") == 130
    model.step = 4
    assert command(prompts, "--out=out.jsonl") == 1 and "step: 3 -> 4" in capsys.readouterr().err


def test_what_is_forbidden_reaches_the_sampler(command, model):
    assert command("--prompt=a", "--forbid=b", "--forbid=7", "--forbid=text:7", "--end_penalty=2.5") == 0
    assert model.options[0].forbidden == (7, ord("7"), ord("b")) and model.options[0].end_penalty == 2.5


def test_models_of_fixed_length_write_freely_and_up_to_their_length(command, model, capsys):
    model.padding = "right"
    assert command("--unconditional=3", "--length=20") == 0
    assert [len(line) for line in capsys.readouterr().out.splitlines()] == [5, 20] * 3
    assert generate.main(["--checkpoint=m", "--prompt=abc", "--length=20"]) == 0
    assert len(capsys.readouterr().out) == 20 - 4 + 1  # the prompt, BOS before it; a newline
    assert model.seen == [((3, 20), False, 0), ((1, 20), False, 0)]


def test_other_models_answer_with_256_tokens_unless_told_otherwise(command, model, capsys):
    model.max_length = 300
    assert generate.main(["--checkpoint=m", "--prompt=abc"]) == 0
    assert model.seen == [((1, 64 + 256), True, 64)]


@pytest.mark.parametrize("words, said", [
    (["--prompt="], "--prompt number 1: the prompt is empty"),
    (["--prompt=a", "--steps=0"], "at least 1 step, not 0"),
    (["--prompt=a", "--alg=magic"], "alg is 'magic'; choose one of "),
    (["--prompt=" + "a" * 252], "the prompt's 252 tokens and 5 new ones are too long for the 256 positions"),
    (["--prompt=a", "--chat"], "no chat template"),
    (["--prompt=a", "--forbid=ab"], "'ab' is 2 tokens"),
    (["--prompt=a", "--length=9"], "--length is for models that write a text of fixed length"),
    (["--unconditional=2"], "--unconditional is for models that write a text of fixed length"),
    (["--prompts=missing.jsonl"], "--prompts=missing.jsonl cannot be read"),
    (["--prompts=bad.jsonl", "--out=out.jsonl"], "bad.jsonl:2: nothing is masked"),
    (["--prompts=unknown.jsonl", "--out=out.jsonl"], "unknown.jsonl:1: 999 is no token's id"),
    (["--prompt=a", "--out=."], "Give another --out"),
    (["--prompt=a", "--trajectory=no/page.html"], "--trajectory=no/page.html cannot be written"),
])
def test_what_cannot_be_used_is_one_line_and_leaves_nothing_behind(command, model, capsys, tmp_path, words, said):
    write(tmp_path / "bad.jsonl", "a", {"parts": ["b"]})
    write(tmp_path / "unknown.jsonl", {"tokens": [999, MASK]})
    assert command(*words) == 1
    out, errors = capsys.readouterr()
    assert not out and errors.startswith("Error: ") and said in errors and errors.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "unknown.jsonl"] and not model.seen


def test_lengths_beyond_the_model_are_named(command, model, capsys):
    model.padding = "right"
    assert command("--unconditional=1", "--length=257") == 1
    assert "--length=257 is more than the 256 positions of this model" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    ([], "one of the arguments --prompt --prompts --unconditional is required"),
    (["--prompt=a", "--prompts=b"], "not allowed with"),
    (["--prompt=a", "--batch_size=0"], "must be at least 1, not 0"),
    (["--prompt=a", "--max_new_tokens=-3"], "must be at least 1, not -3"),
    (["--prompt=a", "--steps=many"], "argument --steps: invalid int value: 'many'"),
    (["--prompt=a", "--system=b"], "--system is for --chat"),
    (["--prompt=a", "--stop="], "--stop must be a text"),
    (["--prompt=a", "--seed=-1"], "--seed must be in"),
    (["--prompt=a", "--soft_mask=fuzzy"], "variant is 'fuzzy'; choose one of"),
    (["--prompt=a", "--prompting=b"], "unrecognized arguments"),
])
def test_a_wrong_command_line_ends_with_status_2(command, capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        command(*words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_device_without_memory_says_what_to_do_and_debug_shows_where(command, model, capsys, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore")

    monkeypatch.setattr(model, "fill", full)
    assert command("--prompt=a") == 1
    errors = capsys.readouterr().err
    assert "give a smaller --batch_size (--debug shows the rest)" in errors and "Traceback" not in errors
    assert command("--prompt=a", "--debug") == 1 and "Traceback" in capsys.readouterr().err


def test_text_is_cut_at_its_end_and_shares_are_reported(command, model, capsys, tmp_path):
    model.write = lambda count: np.array([END] * count)
    assert command("--prompt=a", "--out=out.jsonl") == 0
    assert "1 answer: 100.0% empty, 100.0% ended by themselves" in capsys.readouterr().err
    row, = rows_of(tmp_path / "out.jsonl")
    assert row["empty"] and row["ended"] and row["text"] == ""
