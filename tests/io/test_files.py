"""Files that are written whole, and what in a folder is another program's."""
import errno
import os
import threading

import pytest

from softmask_jax.io import files


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_pipe_stays_one_and_gets_what_is_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    files.check_writable(str(tmp_path / "pipe"))
    files.write_atomically(tmp_path / "pipe", "all of it")
    reader.join(timeout=30)
    assert read == ["all of it"] and (tmp_path / "pipe").is_fifo()


def test_only_what_a_killed_writer_left_is_removed(tmp_path):
    for name in (".a.json.17-0123abcd.tmp", ".b.json.17-0123abcd.tmp", ".a.json.tmp", ".mine.tmp", "a.json"):
        (tmp_path / name).write_text("")
    files.remove_leftovers(tmp_path, "a.json")
    assert sorted(os.listdir(tmp_path)) == [".a.json.tmp", ".b.json.17-0123abcd.tmp", ".mine.tmp", "a.json"]
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".a.json.tmp", ".mine.tmp", "a.json"]


def test_where_the_file_system_has_no_locks_one_line_warns_and_work_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with files.locked(tmp_path, "go away"):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    (record,) = caplog.records
    assert "cannot be locked (Operation not supported): let no other process use this folder" in record.message


def test_a_folder_with_files_of_those_names_is_refused_unless_it_was_locked_before(tmp_path):
    (tmp_path / "results").mkdir()
    with files.locked(tmp_path, "go away", ["results"]):
        (tmp_path / "results" / "1").write_text("ours")
    with files.locked(tmp_path, "go away", ["results"]):
        pass
    (tmp_path / ".lock").unlink()
    with pytest.raises(FileExistsError, match=r"holds files of something else \(results\); go away"):
        files.locked(tmp_path, "go away", ["other", "results"]).__enter__()
    assert os.listdir(tmp_path) == ["results"]
