"""Data sets of TFDS and Hugging Face: rows in parts, and what is said when they are not there."""
import pickle
import sys
import types
from pathlib import Path

import pytest

from softmask_jax.data.sources import BadRow, hubs, make_source
from tests.helpers.source_files import TEXTS, build_tfds, one_line


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path


def contents(source) -> list[str]:
    return [item.reason if type(item) is BadRow else item.text for item in source]


def check_parts(source, expected: list[str], monkeypatch):
    assert contents(source) == expected and source.num_parts() == 1
    monkeypatch.setattr(hubs, "BATCH_ROWS", 3)
    for rows in (1, 7, len(expected) - 1, len(expected)):
        monkeypatch.setattr(hubs, "PART_ROWS", rows)
        copy = pickle.loads(pickle.dumps(source))
        parts = [list(copy.read(part)) for part in range(copy.num_parts())]
        assert [len(part) for part in parts[:-1]] == [rows] * (len(parts) - 1)
        assert [item for part in parts for item in part] == list(source)
        assert contents(copy) == expected


def test_tfds_reads_by_name_or_folder_without_tensorflow(folder, monkeypatch):
    built = build_tfds(folder / "tfds", TEXTS)
    for name in ("tiny_texts", "tiny_texts:1.0.0", str(built.data_path), "tfds/tiny_texts/1.0.0"):
        assert contents(make_source("tfds", f"{name}:train")) == TEXTS
    assert contents(make_source("tfds", "tiny_texts:train[:9]")) == TEXTS[:9]
    assert contents(make_source("tfds", "tiny_texts:1.0.0:train[:3]+test")) == TEXTS[:3] * 2
    assert contents(make_source("tfds", "tiny_texts:test", text_key="label")) == ["0", "1", "2"]
    assert "tensorflow" not in sys.modules
    check_parts(make_source("tfds", "tiny_texts:train"), TEXTS, monkeypatch)


def test_rows_of_tfds_that_are_not_utf8_are_bad_rows(folder):
    build_tfds(folder / "tfds", ["fine", b"a\xff", "é"])
    first, bad, last = make_source("tfds", "tiny_texts:train")
    assert (first.text, last.text) == ("fine", "é")
    assert bad == BadRow("tiny_texts:train#1", "is not UTF-8 at byte 1 of 'text'")


def test_the_identity_of_tfds_follows_split_key_and_length(folder):
    built = build_tfds(folder / "tfds", TEXTS)
    paths = ("tiny_texts:train", "tiny_texts:test", "tiny_texts:train[:9]", f"{built.data_path}:train")
    identities = {make_source("tfds", path).identity() for path in paths}
    identities.add(make_source("tfds", "tiny_texts:train", text_key="label").identity())
    build_tfds(folder / "other", TEXTS[1:])
    identities.add(make_source("tfds", "other/tiny_texts/1.0.0:train").identity())
    assert len(identities) == 6


@pytest.mark.parametrize("name", ["lm1b", "lm1b:1.1.0", "lm1b:9.9.9", "no_such_set", "Weird name!"])
def test_a_data_set_that_is_not_built_is_named_with_the_command_that_builds_it(folder, name):
    with pytest.raises(FileNotFoundError) as error:
        make_source("tfds", f"{name}:train")
    message = one_line(error)
    assert f"{name!r} is not built in {folder}" in message
    assert f"tfds.builder('{name}', file_format='array_record').download_and_prepare()" in message
    assert not (folder / "tfds").exists()


def test_a_data_set_without_random_access_says_how_to_build_it(folder):
    built = build_tfds(folder / "tfds", ["a", "b", "c"]).data_path
    info = built / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError) as error:
        make_source("tfds", f"{built}:train")
    assert "is stored as tfrecord, which has no rows by number" in one_line(error)


def test_a_split_or_column_that_tfds_lacks_is_named(folder):
    build_tfds(folder / "tfds", TEXTS)
    wrong = {"trian": "Unknown split 'trian'", "train[:": "names no split", "train[:x]": "Error parsing"}
    for split, said in wrong.items():
        with pytest.raises(ValueError, match=said) as error:
            make_source("tfds", f"tiny_texts:{split}")
        assert "train" in one_line(error)
    with pytest.raises(ValueError, match=r"has no column 'texts' \(data.text_key\); the nearest is 'text'"):
        make_source("tfds", "tiny_texts:train", text_key="texts")
    with pytest.raises(ValueError, match=r"tiny_texts:train\[:0\]: holds no row"):
        make_source("tfds", "tiny_texts:train[:0]")


@pytest.mark.parametrize("kind", ["tfds", "hf"])
@pytest.mark.parametrize("paths", ["", "a:b,c:d", ("a:b", "c:d")])
def test_paths_of_a_hub_are_one_name_and_split(kind, paths, fake):
    with pytest.raises(ValueError, match="needs one NAME:SPLIT in data.paths, such as .* use data.source=mixture"):
        make_source(kind, paths)
    with pytest.raises(ValueError, match="'owner/name' names no split"):
        make_source(kind, "owner/name")


def test_hubs_without_their_package_say_what_to_install(monkeypatch):
    for kind, package in {"tfds": "tensorflow_datasets", "hf": "datasets"}.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError) as error:
                make_source(kind, "name:train")
        assert f"pip install 'softmask_jax[{kind}]'" in one_line(error)


class FakeRows:
    """What `datasets.Dataset` offers here."""

    def __init__(self, columns: dict, version: str = "1.0.0"):
        self.columns, self.column_names = columns, list(columns)
        self.info = types.SimpleNamespace(version=version, download_checksums=None)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def select_columns(self, names):
        return FakeRows({name: self.columns[name] for name in names})

    def __getitem__(self, rows: slice):
        return {name: values[rows] for name, values in self.columns.items()}


@pytest.fixture
def fake(monkeypatch):
    """A `datasets` module whose Hub has owner/name, with train and empty splits; it notes what it was asked for."""
    module = types.ModuleType("datasets")
    module.asked, module.texts = [], list(TEXTS)

    def load_dataset(path, name=None, *, split):
        module.asked.append((path, name, split))
        if path != "owner/name":
            raise ConnectionError(f"Couldn't reach {path!r} on the Hub\n(offline)")
        if split not in ("train", "train[:1%]", "empty"):
            raise ValueError(f'Unknown split "{split}". Should be one of [\'train\'].')
        texts = [] if split == "empty" else module.texts
        return FakeRows({"text": texts, "id": list(range(len(texts)))})

    def load_from_disk(path):
        rows = FakeRows({"text": module.texts})
        return {"train": rows, "test": rows} if "dict" in str(path) else rows

    module.load_dataset, module.load_from_disk = load_dataset, load_from_disk
    monkeypatch.setitem(sys.modules, "datasets", module)
    hubs._opened.cache_clear()
    return module


def test_hugging_face_data_sets_are_read_by_name_config_and_split(fake, monkeypatch):
    for paths, asked in {
        "owner/name:train": ("owner/name", None, "train"),
        "owner/name/en:train": ("owner/name", "en", "train"),
        "owner/name:train[:1%]": ("owner/name", None, "train[:1%]"),
    }.items():
        assert contents(make_source("hf", paths)) == TEXTS
        assert fake.asked[-1] == asked
    check_parts(make_source("hf", "owner/name:train"), TEXTS, monkeypatch)


def test_a_hugging_face_data_set_is_opened_once_for_many_parts(fake, monkeypatch):
    monkeypatch.setattr(hubs, "PART_ROWS", 5)
    source = make_source("hf", "owner/name:train")
    list(source)
    assert source.num_parts() > 5 and len(fake.asked) == 2


def test_what_the_hub_answers_is_one_line(fake):
    with pytest.raises(OSError) as error:
        make_source("hf", "owner/other:train")
    assert "'owner/other:train' cannot be loaded (Couldn't reach 'owner/other' on the Hub); check" in one_line(error)
    for paths, said in {"owner/name:trian": "Unknown split", "owner/name:empty": "holds no row"}.items():
        with pytest.raises(ValueError, match=said) as error:
            make_source("hf", paths)
        one_line(error)
    with pytest.raises(ValueError, match="has no column 'body'.*there are 'text', 'id'"):
        make_source("hf", "owner/name:train", text_key="body")
    with pytest.raises(ValueError, match="column 'id' holds int, not text"):
        make_source("hf", "owner/name:train", text_key="id")


def test_rows_without_text_are_bad_and_a_data_set_that_changed_is_an_error(fake):
    fake.texts[1] = None
    source = make_source("hf", "owner/name:train")
    assert contents(source)[:3] == ["one", "has no text in 'text' but null", TEXTS[2]]
    fake.texts.append("new")
    hubs._opened.cache_clear()
    with pytest.raises(ValueError, match="start again"):
        list(source)


def test_folders_of_save_to_disk_are_read_with_the_split_they_need(fake, folder):
    for name, mark in {"saved": "state.json", "saved_dict": "dataset_dict.json"}.items():
        Path(name).mkdir()
        Path(name, mark).write_text("{}")
    assert contents(make_source("hf", "saved")) == TEXTS
    assert contents(make_source("hf", f"{folder}/saved_dict:test")) == TEXTS
    before = make_source("hf", "saved").identity()
    Path("saved", "state.json").write_text("{ }")
    assert make_source("hf", "saved").identity() != before
    for paths, said in {
        "saved:train": "holds one split; leave ':train' away",
        "saved_dict": "write saved_dict:SPLIT with one of its splits: train, test",
        "saved_dict:valid": "one of its splits: train, test",
    }.items():
        with pytest.raises(ValueError, match=said):
            make_source("hf", paths)


def test_the_real_package_reads_what_it_saved(folder, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": text, "id": n} for n, text in enumerate(TEXTS)])
    rows.save_to_disk("saved")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk("saved_dict")
    check_parts(make_source("hf", "saved"), TEXTS, monkeypatch)
    assert contents(make_source("hf", "saved_dict:test")) == TEXTS[:3]
    with pytest.raises(ValueError, match="column 'id' holds int"):
        make_source("hf", "saved", text_key="id")
