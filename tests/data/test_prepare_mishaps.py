"""Preparing after mistakes in the command, stops and damage: one line each, and a way on."""
import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from softmask_jax.config import Texts
from softmask_jax.data import build
from softmask_jax.data.prepare import main, prepare
from softmask_jax.data.shards.verifier import verify
from softmask_jax.data.sources.storage import Folder


def write_jsonl(path: Path, documents: int, words: int = 20, word: str = "mask") -> str:
    path.write_text("".join(json.dumps({"text": f"{n} {f'{word} ' * words}"}) + "\n" for n in range(documents)))
    return str(path)


def config_of(folder: Path, **changes) -> Texts:
    settings = dict(source="jsonl", paths=write_jsonl(folder / "texts.jsonl", 60), cache_dir=str(folder / "cache"))
    return Texts(**settings | dict(validation_rule="last", validation_documents=9) | changes)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mistake", [
    dict(text_key="txet"), dict(validation_documents=60), dict(max_documents=-1), dict(paths="latin.jsonl"),
])
def test_a_mistake_in_the_command_does_not_stand_in_the_way_of_the_corrected_one(tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    Path("latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    config, out = config_of(tmp_path), tmp_path / "out"
    with pytest.raises(ValueError):
        prepare(config_of(tmp_path, **mistake), str(out), workers=1)
    prepare(config, str(out), workers=1)
    prepare(config, str(tmp_path / "other"), workers=1)
    assert files(out) == files(tmp_path / "other")


def test_preparing_again_mends_a_tokenizer_that_is_missing_or_damaged(tmp_path):
    config, out = config_of(tmp_path, tokenizer="bpe", bpe_vocab_size=260), tmp_path / "out"
    prepare(config, str(out), workers=1)
    whole = files(out)
    for path in sorted((out / "tokenizer").iterdir()):
        for content in (None, path.read_bytes()[:-9]):
            path.unlink() if content is None else path.write_bytes(content)
            assert len(verify(Folder(out))) == 1
            prepare(config, str(out), workers=1)
            assert files(out) == whole and verify(Folder(out)) == []


def test_a_changed_character_of_the_manifest_is_found(tmp_path):
    out = tmp_path / "out"
    prepare(config_of(tmp_path), str(out), workers=1)
    path = out / "manifest.json"
    whole = path.read_text()
    for place in range(0, len(whole), 7):
        if whole[place].isalnum():
            path.write_text(whole[:place] + ("7" if whole[place] != "7" else "8") + whole[place + 1 :])
            with pytest.raises(ValueError, match="manifest.json is damaged"):
                verify(Folder(out))


@pytest.mark.parametrize("arguments, said", [
    (["--out="], "path of a folder is empty"),
    (["--out=."], "holds files that data.paths names"),
    (["--out=out", "--paths=with, comma.jsonl"], r"\? stands for one in a name"),
    (["--out=out", "--validation_paths=texts.jsonl"], "belong together"),
    (["--out=out", "--validation_rule=paths"], "belong together"),
    (["--out=out", "--source=stdlib"], "reads no data.paths"),
    (["--out=out", "--paths=gone.jsonl"], "link to a file that does not exist"),
])
def test_paths_that_cannot_be_meant_are_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "texts.jsonl", 60)
    Path("gone.jsonl").symlink_to("nowhere.jsonl")
    before = set(tmp_path.iterdir())
    assert main(["--source=jsonl", "--paths=texts.jsonl", "--workers=1", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ") and re.search(said, line)
    assert not any(path.suffix == ".arrayrecord" for path in {*tmp_path.iterdir()} - before)


def test_a_limit_that_a_shard_reaches_while_it_grows_is_one_line_with_a_remedy(tmp_path, capfd):
    write_jsonl(tmp_path / "texts.jsonl", 3, words=1_200_000)
    command = [
        "--source=jsonl", f"--paths={tmp_path}/texts.jsonl", f"--out={tmp_path}/out", "--validation_rule=last",
        "--validation_documents=1", "--workers=1",
    ]  # fmt: skip
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        assert main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("Error: ") and "train-00000.arrayrecord. Free space and run the same command" in line
    assert main(command) == 0 and verify(Folder(tmp_path / "out")) == []


def test_sigterm_ends_like_ctrl_c_in_one_line_and_leaves_nothing_behind_for_the_next(tmp_path):
    command = [
        sys.executable, "-m", "softmask_jax.data.prepare", "--source=jsonl", f"--out={tmp_path}/out", "--workers=2",
        f"--paths={write_jsonl(tmp_path / 'texts.jsonl', 40_000, words=100)}", "--shard_megabytes=1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob("out/.prepare/.*.arrayrecord.*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    lines = process.communicate(timeout=60)[1].replace("\r", "\n").split("\n")
    said = [line for line in lines if line.strip() and not line.startswith(("Reading", "Tokenizing"))]
    assert process.returncode == 130
    assert said == ["Interrupted. The same command goes on where it was."]
    (tmp_path / "out/.prepare/.train-00000.arrayrecord.1.tmp").write_bytes(b"left by a kill")
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    assert verify(Folder(tmp_path / "out")) == []


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_another_corpus_at_the_same_address_is_not_read_from_copies_of_the_first(tmp_path, tokenizer):
    remote = fsspec.filesystem("memory")
    windows = {}
    for word in ("mask", "blur"):
        write_jsonl(tmp_path / "texts.jsonl", 60, word=word)
        config = dict(source="jsonl", paths=str(tmp_path / "texts.jsonl"), cache_dir=str(tmp_path / "cache"))
        config |= dict(tokenizer=tokenizer, bpe_vocab_size=270, seq_len=16)
        prepare(Texts(**config), "memory://again/corpus", workers=1)
        sizes = {path: remote.size(path) for path in remote.find("/again") if path.endswith("arrayrecord")}
        built = build(Texts(**config | dict(source="shards", paths="memory://again/corpus", tokenizer="shards")))
        windows[word] = built.tokenizer.decode(built.train.gather([0])[0])
        remote.rm("/again", recursive=True)
    assert len(sizes) == 2 and "mask" in windows["mask"] and "blur" in windows["blur"]
