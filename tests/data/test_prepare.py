"""Prepared corpora: the same batches as from the text, resumable, verified, refused with one line where they don't fit."""
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import fsspec
import numpy as np
import pytest

from softmask_jax.config import Texts
from softmask_jax.data import build, prepare as prepare_module, shards
from softmask_jax.data.prepare import main, prepare
from softmask_jax.data.shards.verifier import verify
from softmask_jax.data.sources.storage import Folder
from tests.helpers.prepared import SETTINGS, all_windows, bpe_folder, files, from_shards, made, texts, write_jsonl
from tests.helpers.prepared import corpus as corpus  # the fixture


@pytest.mark.parametrize("rule", [
    {"validation_fraction": 0.15}, {"validation_rule": "last", "validation_documents": 30}, {"max_documents": 57},
    {"tokenizer": "bpe", "bpe_vocab_size": 300},
])
def test_shards_give_the_windows_splits_and_fingerprint_of_the_text(corpus, tmp_path, rule):
    config = replace(corpus, **rule)
    manifest = made(config, tmp_path / "out")
    text, prepared = build(config), from_shards(config, tmp_path / "out")
    for split in ("train", "validation"):
        np.testing.assert_array_equal(all_windows(getattr(prepared, split)), all_windows(getattr(text, split)))
    same = text.info.keys() - {"source", "tokenizer"}
    assert {key: prepared.info[key] for key in same} == {key: text.info[key] for key in same}
    assert len(manifest.splits["train"].shards) > 1


@pytest.mark.parametrize("seq_len", [3, 64, 102, 1000])
def test_windows_of_any_length_cross_records_and_shards(corpus, tmp_path, seq_len):
    made(corpus, tmp_path / "out")
    text = build(corpus, seq_len=seq_len)
    prepared = from_shards(corpus, tmp_path / "out", seq_len=seq_len)
    order = np.random.default_rng(0).permutation(len(text.train))
    np.testing.assert_array_equal(prepared.train.gather(order), text.train.gather(order))


def test_one_process_and_several_write_the_same_bytes(tmp_path):
    # Spawned workers do not see a test's patches: real sizes, and texts that fill several shards.
    paths = write_jsonl(tmp_path / "texts.jsonl", [f"{n} {text * 30}" for n, text in enumerate(texts(500))])
    config = Texts(**SETTINGS, paths=paths, cache_dir=str(tmp_path / "cache"))
    for workers in (1, 2):
        made(config, tmp_path / f"{workers}", workers=workers)
    one, two = files(tmp_path / "1"), files(tmp_path / "2")
    assert one == two
    assert sum(name.startswith("train") for name in one) > 2


def test_preparing_again_does_nothing_and_other_settings_are_refused(corpus, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    first = made(corpus, out)
    monkeypatch.setattr(prepare_module, "_scan", lambda *_: pytest.fail("it was read again"))
    assert made(corpus, out) == first and "prepared already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="prepared with other settings .validation_fraction.; give another --out"):
        made(replace(corpus, validation_fraction=0.3), out)
    write_jsonl(tmp_path / "texts.jsonl", texts(10))
    with pytest.raises(ValueError, match="the files of the source"):
        made(corpus, out)


def test_a_preparation_that_began_otherwise_is_refused(corpus, tmp_path, monkeypatch):
    write = prepare_module.write_shards

    def stop_at_the_second(job, task, progress):
        if task.number:
            raise KeyboardInterrupt
        return write(job, task, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "write_shards", stop_at_the_second)
        made(corpus, tmp_path / "out")
    with pytest.raises(ValueError, match="preparation that began with other settings .shard_megabytes"):
        made(corpus, tmp_path / "out", shard_megabytes=7)


def test_a_stopped_preparation_goes_on_where_it_was(corpus, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    made(corpus, whole)
    write = prepare_module.write_shards
    written = []

    def stop_at_the_third(job, task, progress):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(task.number)
        return write(job, task, progress)

    monkeypatch.setattr(prepare_module, "write_shards", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        made(corpus, out)
    assert not (out / "manifest.json").exists()
    rest = []
    monkeypatch.setattr(prepare_module, "write_shards", lambda *a: rest.append(a[1].number) or write(*a))
    monkeypatch.setattr(prepare_module, "scan_part", lambda *_: pytest.fail("it was read again"))
    made(corpus, out)
    assert written == [0, 1] and rest[0] == 2 and not set(written) & set(rest)
    assert files(out) == files(whole)


def test_prepared_folders_can_be_joined_but_not_with_the_same_shard_twice(corpus, tmp_path):
    other = replace(corpus, paths=write_jsonl(tmp_path / "other.jsonl", texts(90, seed=1)))
    made(corpus, tmp_path / "a")
    made(other, tmp_path / "b")
    both = from_shards(corpus, f"{tmp_path / 'a'},{tmp_path / 'b'}", seq_len=3)
    alone = [from_shards(corpus, tmp_path / name, seq_len=3) for name in "ab"]
    np.testing.assert_array_equal(
        all_windows(both.train), np.concatenate([all_windows(built.train) for built in alone])
    )
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    with pytest.raises(ValueError, match="c/train-00000.arrayrecord and .*a/train-00000.arrayrecord are the same shard"):
        from_shards(corpus, f"{tmp_path / 'a'},{tmp_path / 'b'},{tmp_path / 'c'}")
    prepare(replace(other, tokenizer=str(bpe_folder(corpus, tmp_path))), str(tmp_path / "d"), workers=1)
    with pytest.raises(ValueError, match="different tokenizers"):
        from_shards(corpus, f"{tmp_path / 'a'},{tmp_path / 'd'}")


def test_a_document_longer_than_a_shard_is_one_shard_whole(corpus, tmp_path):
    long = "long word " * 2000
    config = replace(
        corpus, paths=write_jsonl(tmp_path / "long.jsonl", ["short", long, "short too", "for validation"]),
        validation_rule="last", validation_documents=1,
    )
    manifest = made(config, tmp_path / "out")
    sizes = [(shard.documents, shard.tokens) for shard in manifest.splits["train"].shards]
    assert (1, len(long) + 1) in sizes and sum(documents for documents, _ in sizes) == 3
    np.testing.assert_array_equal(
        all_windows(from_shards(config, tmp_path / "out", seq_len=16).train), all_windows(build(config, seq_len=16).train)
    )


def test_bad_rows_are_counted_and_shown(corpus, tmp_path, capsys):
    path = tmp_path / "texts.jsonl"
    path.write_text(path.read_text() + '{"text": 3}\nnot json\n{"text": "half a pair \\ud800"}\n')
    manifest = made(corpus, tmp_path / "out")
    said = capsys.readouterr().out
    assert manifest.bad_rows == 3 and "3 bad rows left out" in said and "texts.jsonl:" in said
    np.testing.assert_array_equal(
        all_windows(from_shards(corpus, tmp_path / "out").train), all_windows(build(corpus).train)
    )


def test_validation_documents_may_come_from_other_paths(corpus, tmp_path):
    held_out = [*texts(30, seed=3), texts(400)[5]]  # the last one is in the training text, too
    config = replace(
        corpus, validation_rule="paths", validation_paths=write_jsonl(tmp_path / "held-out.jsonl", held_out)
    )
    manifest = made(config, tmp_path / "out")
    assert manifest.splits["validation"].documents == 30 and manifest.splits["train"].documents == 400
    text, prepared = build(config), from_shards(config, tmp_path / "out")
    for split in ("train", "validation"):
        np.testing.assert_array_equal(all_windows(getattr(prepared, split)), all_windows(getattr(text, split)))
    decoded = text.tokenizer.decode(all_windows(text.validation)[:, 1:-1].reshape(-1), eos="\n")
    assert decoded.splitlines()[:5] == held_out[:5]


def test_a_remote_folder_goes_through_the_same_code(corpus, tmp_path):
    store = fsspec.filesystem("memory")
    manifest = made(corpus, "memory://bucket/corpus")
    made(corpus, tmp_path / "out")
    assert manifest == shards.read_manifest(Folder(tmp_path / "out"))
    assert verify(Folder("memory://bucket/corpus")) == []
    remote, local = from_shards(corpus, "memory://bucket/corpus"), from_shards(corpus, tmp_path / "out")
    assert remote.info == local.info
    np.testing.assert_array_equal(all_windows(remote.train), all_windows(local.train))
    name = manifest.splits["train"].shards[0].name
    store.pipe_file(f"/bucket/corpus/{name}", b"short")
    with pytest.raises(ValueError, match=f"memory://bucket/corpus/{name} has 5 bytes"):
        from_shards(corpus, "memory://bucket/corpus")
    store.rm("/bucket", recursive=True)


def test_a_protocol_without_its_package_says_what_to_install():
    with pytest.raises(ValueError, match="nowhere://x: .*gs:// folders need"):
        Folder("nowhere://x")


@pytest.mark.parametrize("arguments, said", [
    (["--source=mixture"], "prepare each text by itself"),
    (["--source=jsonl", "--paths=nothing-here-*.jsonl"], "no file matches"),
    (["--source=stdlib", "--workers=-1"], "--workers 0 (one a core) or more"),
    (["--source=stdlib", "--tokenizer=no/such/folder"], "no/such/folder"),
    (["--source=stdlib", "--validation_rule=last"], "validation_documents of at least 1"),
])
def test_a_wrong_command_is_one_line(tmp_path, capsys, arguments, said):
    assert main([*arguments, f"--out={tmp_path / 'out'}"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert said in line


def test_shards_cannot_be_read_without_the_words_of_what_to_do(corpus, tmp_path):
    made(corpus, tmp_path / "out")
    built = from_shards(corpus, tmp_path / "out")
    for path in (tmp_path / "out").glob("train-*.arrayrecord"):
        path.unlink()
    with pytest.raises(OSError, match="cannot be read .*prepare --verify --out="):
        built.train.gather([0])


@pytest.mark.full
@pytest.mark.parametrize("moments", [3, pytest.param(10, marks=pytest.mark.soak)])
def test_a_preparation_killed_at_random_moments_ends_with_the_same_bytes(tmp_path, moments):
    documents = [f"{n} {text * 40}" for n, text in enumerate(texts(1500))]
    paths = write_jsonl(tmp_path / "texts.jsonl", documents)

    def command(out):
        return [
            sys.executable, "-m", "softmask_jax.data.prepare", "--source=jsonl", f"--paths={paths}", "--tokenizer=bpe",
            "--bpe_vocab_size=400", f"--out={tmp_path / out}", "--workers=2", "--shard_megabytes=1",
            f"--cache_dir={tmp_path / 'cache'}",
        ]  # fmt: skip

    def compare():
        assert files(tmp_path / "out") == files(tmp_path / "whole")

    subprocess.run(command("whole"), check=True, capture_output=True)  # the BPE is trained here
    started = time.monotonic()
    subprocess.run(command("out"), check=True, capture_output=True)
    seconds = time.monotonic() - started
    compare()
    random, killed = np.random.default_rng(), 0
    while killed < moments:
        process = subprocess.Popen(command("out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(random.uniform(0.2, seconds)) == 0
            compare()
            shutil.rmtree(tmp_path / "out")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    assert subprocess.run(command("out"), capture_output=True).returncode == 0
    compare()
    manifest = shards.read_manifest(Folder(tmp_path / "out"))
    assert sum(split.documents for split in manifest.splits.values()) == len(documents)
    built = build(source="shards", paths=str(tmp_path / "out"), tokenizer="shards", seq_len=3)
    streams = [all_windows(part)[:, 1] for part in (built.train, built.validation)]
    decoded = "".join(built.tokenizer.decode(stream, eos="\0") for stream in streams).split("\0")
    assert sorted(decoded[:-1]) == sorted(documents)
