"""Every command that writes, run twice, and run where something else is: it goes on, replaces or refuses, and says so."""
import os
import re
from pathlib import Path

import pytest

from softmask_jax.convert import outputs, tiny, tiny_dream
from softmask_jax.convert.__main__ import main as convert
from tests.helpers import crafted_run, tiny_run
from tests.helpers.commands import command_module

ROOT = Path(__file__).parent.parent.parent
PLAN = "--config={root}/configs/stdlib.py:smoke --vocab_size=258"
MODEL = "--checkpoint={runs}/run --steps=2"
# Command, words, and what the second time does to what {out} names.
QUICK = {
    "tiny_dream": ("tiny_dream", "--out={out}", "keeps"),
    "convert": ("convert", "--src={runs}/dream/hf --dst={out}", "refuses"),
    "convert, int8": ("convert", "--src={runs}/dream/hf --dst={out} --int8", "refuses"),
    "convert, back": ("convert", "--src={runs}/model --dst={out}", "refuses"),
    "prepare": ("data.prepare", "--source=files --paths={runs}/texts/*.txt --workers=1 --validation_rule=last "
                "--validation_documents=2 --out={out}", "keeps"),
    "report": ("report", "{runs}/a --out={out}", "replaces"),
    "compare": ("compare", "{runs}/a {runs}/b --curves_only --out={out}", "replaces"),
    "plan": ("plan", PLAN + " --json={out}", "replaces"),
}  # fmt: skip
SLOW = {
    "train": ("main", "--config={runs}/tiny.py --workdir={out}", "keeps"),
    "evaluate": ("evaluate", "--checkpoint={runs}/run --tasks=perplexity --out={out} --config.perplexity.draws=1", "goes on"),
    "answers": ("generate", MODEL + " --prompts={runs}/prompts.jsonl --out={out}", "keeps"),
    "trajectory": ("generate", MODEL + " --prompt=a --trajectory={out}", "replaces"),
}  # fmt: skip
# Tried only where something else is: what takes a TPU's compiler, or longer.
ELSEWHERE = {
    "compile": ("compile", "--config={root}/configs/stdlib.py:smoke --topology=v5e:1x1 --json={out}", "replaces"),
    "scaling": ("compile", "--scaling --out={out}", "replaces"),
    "benchmark of the loader": ("benchmarks.loader", "--json={out}", "replaces"),
    "benchmark of two passes": ("benchmarks.two_pass", "--json={out}", "replaces"),
    "benchmark of generation": ("benchmarks.generate", "--json={out}", "replaces"),
    "benchmark of int8": ("benchmarks.int8", "--folder={out}", "keeps"),
}  # fmt: skip
# What people have in their folders, under every name that is written here.
NAMES = (
    "notes.txt", "hf/config.json", "chats.jsonl", "config.json", "tokenizer/tokenizer.json", "manifest.json", "results.json",
    "checkpoints/7/weights.bin", "metrics.jsonl", "report.html", "summary.json", "train-00000.arrayrecord", "run/a.txt",
)  # fmt: skip
REFUSALS = "of something else|not the config of a run|exists|another .* than|manifest|[Ii]s a directory"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tiny_dream.make(folder / "dream", conversations=2)
    assert convert([f"--src={folder / 'dream' / 'hf'}", f"--dst={folder / 'model'}"]) == 0
    for name in "ab":
        crafted_run.write(folder / name)
    tiny_run.write_texts(folder / "texts")
    tiny_run.write_config(folder / "tiny.py", tiny_run.settings(folder, train__steps=4))
    (folder / "prompts.jsonl").write_text('"mask"\n')
    return folder


@pytest.fixture(scope="module")
def trained(runs):
    assert call("main", "--config={runs}/tiny.py --workdir={runs}/run", runs) == 0
    return runs


def call(command: str, words: str, runs: Path, out: Path = Path()) -> int:
    return command_module(f"softmask_jax.{command}").main([word.format(runs=runs, out=out, root=ROOT) for word in words.split()])


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    """Of a file, or of the files in a folder: bytes and times, those of hidden files and folders left out."""
    found = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return {
        str(one): (one.read_bytes(), one.stat().st_mtime_ns) for one in found
        if not any(part.startswith(".") for part in one.relative_to(path).parts)
    }  # fmt: skip


def check_twice(command: str, words: str, verdict: str, runs: Path, out: Path, capsys) -> None:
    assert call(command, words, runs, out) == 0
    before = contents(out)
    if verdict == "replaces":
        out.write_text("an older page")
    capsys.readouterr()
    status, said = call(command, words, runs, out), capsys.readouterr().err.strip().splitlines()
    assert status == (verdict == "refuses") and before
    after = contents(out)
    if verdict in ("keeps", "refuses"):
        assert after == before
    if verdict == "refuses":
        assert len(said) == 1 and said[0].startswith("Error: ") and "exists" in said[0]
    if verdict == "replaces":
        assert b"an older page" not in after[str(out)][0] and after[str(out)][0]
    assert not [path.name for path in out.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", QUICK)
def test_a_second_time_goes_on_replaces_or_refuses(runs, tmp_path, capsys, name):
    check_twice(*QUICK[name], runs, tmp_path / "out", capsys)


@pytest.mark.full
@pytest.mark.parametrize("name", SLOW)
def test_a_second_time_with_a_trained_model_goes_on_or_replaces(trained, tmp_path, capsys, name):
    check_twice(*SLOW[name], trained, tmp_path / "out", capsys)


EVERYWHERE = QUICK | SLOW | ELSEWHERE


@pytest.mark.parametrize("absent", [(), ("config.json", "manifest.json")])
@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_folder_of_something_else_is_refused_in_one_line_and_left_alone(runs, tmp_path, capsys, name, absent):
    out = tmp_path / "out"
    for file in sorted({*NAMES} - {*absent}):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text('{"mine": 1}')
    before, (command, words, _) = contents(out), EVERYWHERE[name]
    assert call(command, words.replace("/run ", "/a "), runs, out) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "Error" in line]
    assert len(said) == 1 and re.match(f"Error: .*({REFUSALS})", said[0])
    assert contents(out) == before


@pytest.mark.parametrize("name", [name for name, (*_, verdict) in EVERYWHERE.items() if verdict != "replaces"])
def test_a_file_in_the_place_of_a_folder_is_refused_in_one_line_and_left_alone(runs, tmp_path, capsys, name):
    out = tmp_path / "out"
    out.write_text("mine")
    command, words, _ = EVERYWHERE[name]
    assert call(command, words.replace("/run ", "/a "), runs, out) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert len(said) == 1 and out.read_text() == "mine" and os.listdir(tmp_path) == ["out"]


def test_a_tiny_dream_that_was_killed_is_not_taken_for_whole(tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(outputs.shutil, "rmtree", lambda *_, **__: None)  # a killed process removes nothing
        patch.setattr(tiny, "_chats", die)
        tiny_dream.make(tmp_path / "killed")
    assert os.listdir(tmp_path / "killed") == [".hf.partial"]
    tiny_dream.make(tmp_path / "killed")
    tiny_dream.make(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "killed")) == ["chats.jsonl", "hf"]
    for name in ("chats.jsonl", "hf/model.safetensors", "hf/config.json", "hf/tokenizer.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_benchmark_does_not_remove_a_folder_that_it_did_not_make(tmp_path, capsys):
    (tmp_path / "softmask_jax_convert").mkdir()
    (tmp_path / "softmask_jax_convert" / "mine").write_text("mine")
    assert call("benchmarks.convert", "--folder={out} --layers=1", tmp_path, tmp_path) == 1
    assert "exists; remove it" in capsys.readouterr().err
    assert (tmp_path / "softmask_jax_convert" / "mine").read_text() == "mine"
