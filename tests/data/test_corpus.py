"""The corpus: duplicates, the split by document, the wrap rule, and the caches on disk."""
import dataclasses
import errno
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from softmask_jax import data
from softmask_jax.config import Data, Texts
from softmask_jax.data import BadRow, ByteTokenizer, Document, SplitRule, Windows, build, read_corpus
from softmask_jax.data.shards import cache
from softmask_jax.data.sources import corpus as corpus_module
from softmask_jax.data.sources.corpus import TRAIN, VALIDATION

BOS = EOS = 256


class ListSource:
    name = "list"

    def __init__(self, texts, per_part=1000):
        self.texts, self.per_part = list(texts), per_part

    def identity(self):
        return repr(self.texts)

    def num_parts(self):
        return max(1, -(-len(self.texts) // self.per_part))

    def read(self, part):
        numbers = range(len(self.texts))[part * self.per_part : (part + 1) * self.per_part]
        return (
            self.texts[n] if isinstance(self.texts[n], BadRow) else Document(f"document {n}", self.texts[n])
            for n in numbers
        )

    def __iter__(self):
        return (item for part in range(self.num_parts()) for item in self.read(part))


def numbered(count):
    return [f"document number {number}: " + "word " * (number % 7 + 1) for number in range(count)]


def splits_of(texts, rule, **options):
    corpus = read_corpus(ListSource(texts), rule, **options)
    return list(corpus.documents(TRAIN)), list(corpus.documents(VALIDATION))


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(numbered(60)):
        (folder / f"{number:03}.txt").write_text(text)
    return Texts(
        source="files", paths=str(folder / "*.txt"), seq_len=16, validation_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )


def test_every_document_is_followed_by_an_end_and_windows_are_wrapped(tmp_path):
    corpus = read_corpus(ListSource(["abc", "de", "fghij", "Z"]), SplitRule("last", documents=1))
    stream = corpus.stream(TRAIN, ByteTokenizer(), tmp_path)
    expected = [*b"abc", EOS, *b"de", EOS, *b"fghij", EOS]
    assert stream.dtype == np.uint16 and stream.tolist() == expected
    windows = Windows(stream, 6, BOS, EOS)
    assert len(windows) == 3  # 13 tokens make three windows of four; the last token is dropped
    rows = windows.gather(np.arange(3))
    assert rows.dtype == np.int32
    assert rows.tolist() == [
        [BOS, *b"abc", EOS, EOS],
        [BOS, *b"de", EOS, ord("f"), EOS],
        [BOS, *b"ghij", EOS],
    ]
    assert windows.gather(np.array([2, 0])).tolist() == rows[[2, 0]].tolist()
    assert corpus.stream(VALIDATION, ByteTokenizer(), tmp_path).tolist() == [ord("Z"), EOS]


def test_an_end_follows_every_document_however_documents_are_grouped(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "ENCODE_CHARACTERS", 40)
    texts = numbered(30)
    corpus = read_corpus(ListSource(texts), SplitRule("last", documents=2))
    stream = corpus.stream(TRAIN, ByteTokenizer(), tmp_path)
    assert ByteTokenizer().decode(stream, eos="\0").split("\0") == [*texts[:-2], ""]


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path):
    class Large(ByteTokenizer):
        vocab_size, eos_id = 100_000, 99_998

    corpus = read_corpus(ListSource(["ab", "cd"]), SplitRule("last", documents=1))
    stream = corpus.stream(TRAIN, Large(), tmp_path)
    assert stream.dtype == np.uint32 and stream.tolist() == [*b"ab", 99_998]


@pytest.mark.parametrize("rule", [SplitRule("hash", fraction=0.3), SplitRule("last", documents=20)])
def test_no_text_is_in_both_splits_even_when_documents_repeat(rule):
    texts = numbered(50)
    spaced = [f" {text}\r\n" for text in texts]
    train, validation = splits_of(texts + texts[::3] + ["", " \n"] + spaced + texts[::-1], rule)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(texts)


def test_dropped_documents_are_counted():
    corpus = read_corpus(ListSource(["a", "", "b", "a", "a", "\n\t"]), SplitRule("last", documents=1))
    assert (corpus.duplicates, corpus.blank, corpus.count(TRAIN), corpus.count(VALIDATION)) == (2, 2, 1, 1)


def test_the_hash_rule_keeps_documents_in_their_split_when_others_come_and_go():
    texts = numbered(80)
    rule = SplitRule("hash", fraction=0.25)
    _, some = splits_of(texts[20:60], rule)
    train, validation = splits_of(texts[::-1], rule)
    assert set(some) <= set(validation)
    assert 5 < len(validation) < 40 and len(train) + len(validation) == 80


def test_the_last_rule_takes_the_last_distinct_documents():
    assert splits_of(["a", "b", "c", "a", "d"], SplitRule("last", documents=2)) == (["a", "b"], ["c", "d"])


def test_max_documents_keeps_the_first_distinct_ones():
    texts = ["a", "a", "", "b", "c", "d"]
    assert splits_of(texts, SplitRule("last", documents=1), max_documents=3) == (["a", "b"], ["c"])


def test_a_document_that_changes_between_passes_is_an_error():
    source = ListSource(["a", "b", "c"])
    corpus = read_corpus(source, SplitRule("last", documents=1))
    source.texts[1] = "changed"
    with pytest.raises(ValueError, match="document 1: changed"):
        list(corpus.documents(TRAIN))


@pytest.mark.parametrize(("texts", "rule", "message"), [
    (["", " ", "\n"], ("last", 0.1, 1), "no document of data.source=list has text .3 read, 0"),
    (["a"], ("last", 0.1, 1), "no document for train"),
    (["a", "b"], ("last", 0.1, 5), "no document for train"),
    (["a", "b"], ("hash", 1e-9, 0), "no document for validation"),
    (["a"], ("last", 0.1, 0), "at least 1"),
    (["a"], ("hash", 1.5, 0), "between 0 and 1"),
    (["a"], ("random", 0.1, 0), "choose hash, last or paths"),
])
def test_a_corpus_that_cannot_be_split_is_one_clear_line(texts, rule, message):
    with pytest.raises(ValueError, match=message) as error:
        read_corpus(ListSource(texts), SplitRule(*rule))
    assert "\n" not in str(error.value)


def test_a_corpus_smaller_than_one_window_is_an_error():
    with pytest.raises(ValueError, match="validation split has 5 tokens, less than one window of 6"):
        Windows(np.zeros(5, np.uint16), 8, BOS, EOS, "validation")
    with pytest.raises(ValueError, match="at least 3"):
        Windows(np.zeros(5, np.uint16), 2, BOS, EOS)


def test_bpe_learns_from_the_training_split_only(files, monkeypatch):
    seen = []
    train = data.train_bpe
    monkeypatch.setattr(data, "train_bpe", lambda texts, size: train(seen.extend(texts) or seen, size))
    built = build(files, tokenizer="bpe", bpe_vocab_size=270)
    corpus = read_corpus(data.make_source("files", files.paths), SplitRule("hash", 0.2))
    assert seen == list(corpus.documents(TRAIN)) and built.info["train_documents"] == len(seen)
    # Whatever happens in validation text, the merges stay what they were.
    (victim,) = [path for path in os.scandir(os.path.dirname(files.paths)) if
                 open(path).read() == next(corpus.documents(VALIDATION))]
    os.remove(victim)
    assert build(files, tokenizer="bpe", bpe_vocab_size=270).info["tokenizer_fingerprint"] == (
        built.info["tokenizer_fingerprint"]
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_second_build_is_identical_and_tokenizes_nothing(files, tokenizer, monkeypatch):
    first = build(files, tokenizer=tokenizer, bpe_vocab_size=270)
    for owner, name in [(data, "train_bpe"), (data.BPETokenizer, "encode_batch"), (ByteTokenizer, "encode_batch")]:
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("the cache was not used"))
    second = build(files, tokenizer=tokenizer, bpe_vocab_size=270)
    assert first.info == second.info
    for name in ("train", "validation"):
        one, two = getattr(first, name), getattr(second, name)
        np.testing.assert_array_equal(one.gather(np.arange(len(one))), two.gather(np.arange(len(two))))


def test_changed_text_tokenizer_or_split_is_another_fingerprint(files):
    fingerprints = {build(files, **change).info["fingerprint"] for change in [
        {}, {"tokenizer": "bpe", "bpe_vocab_size": 270}, {"validation_fraction": 0.3}, {"seq_len": 12},
        {"validation_rule": "last", "validation_documents": 7}, {"max_documents": 50},
    ]}
    assert len(fingerprints) == 6


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 4
    path.write_bytes(content[: len(content) // 2] if how == "truncated" else content)
    if how == "missing":
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("file", ["train-*.bin", "validation-*.bin", "train-*.json", "bpe-*/tokenizer.json"])
def test_a_damaged_cache_is_built_again_with_a_message(files, tmp_path, how, file, caplog):
    first = build(files, tokenizer="bpe", bpe_vocab_size=270)
    (path,) = (tmp_path / "cache").glob(file)
    whole = path.read_bytes()
    damage(path, how)
    with caplog.at_level(logging.WARNING):
        second = build(files, tokenizer="bpe", bpe_vocab_size=270)
    # A stream without its commit marker is what a killed build leaves: nothing to complain about.
    assert ("damaged" in caplog.text) == ((how, file) != ("missing", "train-*.json"))
    assert path.read_bytes() == whole and second.info == first.info


def test_what_a_killed_build_left_is_ignored_and_later_removed(files, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    fresh, stale = folder / ".train-1.bin.99-aa.tmp", folder / ".train-1.bin.99-bb.tmp"
    for leftover in (fresh, stale):
        leftover.write_bytes(b"half")
    os.utime(stale, (0, 0))
    build(files)
    assert fresh.exists() and not stale.exists()
    assert sorted(path.suffix for path in folder.glob("[!.]*")) == [".bin", ".bin", ".json", ".json"]


def test_a_full_disk_is_one_line_that_names_the_folder_and_leaves_nothing(files, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device while writing") as error:
        build(files)
    message = str(error.value)
    assert str(tmp_path / "cache") in message and "SOFTMASK_JAX_CACHE" in message and "\n" not in message
    assert error.value.errno == errno.ENOSPC
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.undo()
    build(files)


def test_a_cache_folder_that_cannot_be_made_is_one_line(files, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="writing .*file.*Point config.data.cache_dir"):
        build(files, cache_dir=str(tmp_path / "file"))


def test_two_builds_at_once_both_succeed(files, tmp_path):
    code = (
        "import sys; from softmask_jax.data import build;"
        "print(build(source='files', paths=sys.argv[1], cache_dir=sys.argv[2], seq_len=16, validation_fraction=.2,"
        "tokenizer='bpe', bpe_vocab_size=270).info['fingerprint'], 'jax' in sys.modules)"
    )
    command = [sys.executable, "-c", code, files.paths, files.cache_dir]
    builds = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].split() for process in builds]
    # The second word: nothing on the way to the windows loads JAX.
    assert outputs == [[build(files, tokenizer="bpe", bpe_vocab_size=270).info["fingerprint"], "False"]] * 2


def test_the_cache_folder_follows_config_then_environment_then_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("SOFTMASK_JAX_CACHE", "/env")
    assert str(cache.cache_folder("/own")) == "/own"
    assert str(cache.cache_folder()) == "/env"
    monkeypatch.delenv("SOFTMASK_JAX_CACHE")
    assert str(cache.cache_folder()) == "/xdg/softmask_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "softmask_jax"


def test_the_data_section_of_a_config_is_enough_and_an_unknown_key_is_refused(files):
    assert build(Data(**dataclasses.asdict(files))).info == build(files).info
    with pytest.raises(TypeError, match="no_such_field"):
        build(files, no_such_field=1)


def test_a_saved_tokenizers_folder_can_be_the_tokenizer(files, tmp_path):
    first = build(files, tokenizer="bpe", bpe_vocab_size=270)
    first.tokenizer.save(tmp_path / "saved")
    second = build(files, tokenizer=str(tmp_path / "saved"))
    assert second.info["fingerprint"] == first.info["fingerprint"]
    with pytest.raises(ValueError, match="choose bytes, bpe or"):
        build(files, tokenizer="words")


def test_the_standard_library_becomes_windows_of_python_source(tmp_path):
    built = build(max_documents=40, seq_len=128, validation_fraction=0.1, cache_dir=str(tmp_path))
    assert built.info["train_documents"] + built.info["validation_documents"] == 40
    assert len(built.train) > 1000 and len(built.validation) > 10
    text = built.tokenizer.decode(built.train.gather(np.arange(len(built.train))).reshape(-1), eos="")
    assert "import" in text and "def " in text and "\ufffd" not in built.tokenizer.decode(built.train.gather([0])[0])
