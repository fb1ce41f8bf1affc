"""Folders in buckets, against an emulator: objects, faults of the network, the lock, pieces of metrics."""
import collections
import json
import os
import sys
import threading

import pytest

from softmask_jax.benchmarks.emulator import DROP, DROP_ANSWER
from softmask_jax.io import bucket_lock, files, metrics, paths, run_log, uploads
from softmask_jax.io.checkpoint import Checkpoints
from softmask_jax.io.run_folder import RunFolder
from tests.helpers.held_folder import held

CONFIG = {"model": {"kind": "dit", "hidden_size": 64}, "train": {"steps": 10}}


@pytest.fixture
def impatient(monkeypatch):
    """Retries without the pauses between them."""
    import gcsfs.retry

    async def no_pause(seconds):
        pass

    monkeypatch.setattr(gcsfs.retry.asyncio, "sleep", no_pause)


def faulty(emulator, *faults):
    """Requests meet these faults in turn, then none."""
    left = list(faults)
    emulator.faults = lambda method, path: left.pop(0) if left else None
    return left


# Paths


def test_local_paths_stay_pathlib_s_and_other_urls_are_refused(tmp_path):
    assert type(paths.to_path(tmp_path)) is type(tmp_path) and paths.to_path("~") == paths.Path.home()
    with pytest.raises(ValueError, match="s3://a/b: only gs:// and folders of mounted"):
        paths.to_path("s3://a/b")
    assert paths.to_path("name=gs://a").name == "a"


def test_an_object_has_the_methods_of_a_path(bucket):
    path = bucket / "a" / "b.bin"
    assert (path.parent, path.name, str(path)) == (bucket / "a", "b.bin", f"{bucket}/a/b.bin")
    assert not (path.exists() or path.parent.is_dir() or list(bucket.glob("*")))
    content = bytes(range(256)) * 40
    files.write_atomically(path, [content, b"end"])
    assert path.read_bytes() == content + b"end" and path.stat().length == len(content) + 3
    assert path.is_file() and path.parent.is_dir() and list(bucket.iterdir()) == [bucket / "a"]
    with path.open("rb") as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"end" and file.seek(300) == 300 and file.read(2) == content[300:302]
    files.write_json(bucket / "c.json", {"é": 1.5})
    assert json.loads((bucket / "c.json").read_text("utf-8")) == {"é": 1.5}
    with pytest.raises(KeyError), (bucket / "half").open("wb") as file:
        file.write(content)
        raise KeyError
    assert sorted(path.name for path in bucket.iterdir()) == ["a", "c.json"]
    with pytest.raises(FileNotFoundError, match="half"):
        (bucket / "half").read_bytes()
    bucket.rmtree()
    assert not bucket.exists()


@pytest.mark.parametrize("name", ["a*", "a#1", "a//b", "a/../b", "a[0]", "", "a\\b"])
def test_a_folder_whose_name_would_be_misread_is_refused(name):
    with pytest.raises(ValueError, match="--workdir=gs://runs/.*give gs://BUCKET/FOLDER"):
        files.check_folder(f"gs://runs/{name}", "--workdir=")


def test_without_gcsfs_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    paths.filesystem.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'softmask_jax\[gcs\]'"):
        paths.to_path("gs://runs/a").read_bytes()


# Faults


@pytest.mark.parametrize("fault", [429, 503, DROP, DROP_ANSWER, 0.2])
def test_a_passing_fault_is_retried_and_nothing_is_lost(emulator, bucket, impatient, fault):
    left = faulty(emulator, fault)
    (bucket / "a").write_bytes(b"1")
    assert not left and (bucket / "a").read_bytes() == b"1"
    left = faulty(emulator, fault)
    assert (bucket / "once").create(b"2") and not left
    assert not (bucket / "once").create(b"3") and (bucket / "once").read_bytes() == b"2"


@pytest.mark.parametrize(("status", "reason"), [
    (403, r"refused \(403\); grant roles/storage.objectAdmin"), (401, "no valid credentials; run `gcloud auth"),
])  # fmt: skip
def test_a_refusal_is_one_line_at_once(emulator, bucket, status, reason):
    folder, asked = bucket.with_name(f"refused-{status}"), collections.Counter()
    emulator.faults = lambda method, path: asked.update([path] * (folder.name in path)) or status
    for use in (lambda: RunFolder(folder), lambda: files.check_writable(str(folder / "a")),
                lambda: run_log.read(folder), lambda: Checkpoints(folder / "checkpoints").all_steps()):  # fmt: skip
        with pytest.raises(OSError, match=reason) as error:
            use()
        assert "\n" not in str(error.value)
    # gcsfs asks about a path in three ways at once; of those, no request is made again.
    assert set(asked.values()) == {1}


def test_a_missing_bucket_and_one_that_never_answers_are_one_line(emulator, bucket, impatient):
    with pytest.raises(OSError, match="gs://nowhere/x.*there is no such bucket"):
        RunFolder("gs://nowhere/x")
    emulator.faults = lambda method, path: 503
    with pytest.raises(OSError, match="does not answer .*run the same command again") as error:
        RunFolder(bucket)
    assert "\n" not in str(error.value)


# The lock


def test_a_second_process_is_refused_at_once_and_a_dead_one_s_lock_taken_over(bucket):
    with held(bucket) as child:
        with pytest.raises(RuntimeError, match=f"in use by process {child.pid} on .*--workdir"):
            RunFolder(bucket)
        RunFolder(bucket, lock=False)
    for _ in range(2):  # after a kill, after a release
        with RunFolder(bucket):
            pass
    assert [path.name for path in (bucket / ".lock").iterdir()] == ["3"]


def test_the_lock_of_another_host_is_taken_over_once_it_is_silent(bucket, monkeypatch):
    for name, seconds in (("RENEWAL", 0.05), ("SILENCE", 0.4), ("POLL", 0.02)):
        monkeypatch.setattr(bucket_lock, name, seconds)
    elsewhere = iter({"where": f"host {number}", "pid": 1, "start": "0"} for number in range(9))
    monkeypatch.setattr(bucket_lock, "_here", lambda: next(elsewhere))
    first, second, third = (bucket_lock.Lock(bucket / ".lock", "wait") for _ in range(3))
    first.acquire()
    with pytest.raises(RuntimeError, match="is in use by process .* Wait for it to end"):
        second.acquire()
    first._ended.set()  # stopped: it renews no more
    first._thread.join()
    third.acquire()
    first.check()
    first._ended.clear()
    first._renew()  # and wakes up
    with pytest.raises(RuntimeError, match="was taken over by another process"):
        first.check()
    first.release()
    third.check()
    third.release()
    assert json.loads((bucket / ".lock" / "2").read_text())["released"]


def test_of_many_that_race_for_a_lock_one_has_it(bucket):
    locks, refused = [bucket_lock.Lock(bucket / ".lock", "wait") for _ in range(6)], []

    def race(lock):
        try:
            lock.acquire()
        except RuntimeError as error:
            refused.append(error)

    threads = [threading.Thread(target=race, args=(lock,)) for lock in locks]
    for step in ("start", "join"):
        for thread in threads:
            getattr(thread, step)()
    winners = [lock for lock in locks if lock.turn]
    assert len(winners) == 1 and len(refused) == 5
    winners[0].release()


# A run's folder


def test_rows_are_put_in_bounded_pieces_and_truncated_after_a_resume(emulator, bucket, monkeypatch):
    monkeypatch.setattr(metrics, "PIECE_BYTES", 400)
    monkeypatch.setattr(metrics, "PUT_SECONDS", 0.0)
    with RunFolder(bucket) as folder:
        folder.write_config(CONFIG)
        for step in range(1, 41):
            emulator.requests.clear()
            folder.append({"step": step, "kind": "train", "loss": 1 / step})
            own = emulator.naming(bucket.name)  # others may come late from an earlier test
            assert 0 < sum(request.size for request in own) < 900  # never the history
    assert len(metrics.files(bucket)) > 4
    with RunFolder(bucket) as folder:
        assert folder.truncate_metrics(25) == 15
        folder.append({"step": 26, "kind": "train", "loss": float("nan")})
        folder.append({"step": 26, "kind": "validation", "loss": 2.0})
    with RunFolder(bucket) as folder:
        assert folder.truncate_metrics(26, again=["validation"]) == 1
    steps, values = run_log.read(bucket).column("train", "loss")
    assert steps.tolist() == list(range(1, 27)) and values[:3].tolist() == [1, 1 / 2, 1 / 3]
    assert RunFolder(bucket, lock=False).read_config() == CONFIG


def test_rows_wait_for_the_next_put_and_are_there_after_a_flush(bucket):
    with RunFolder(bucket) as folder:
        folder.append({"step": 1, "kind": "train"})
        folder.append({"step": 2, "kind": "train"})
        assert len(list(metrics.lines(bucket))) == 1
        folder.flush()
        assert len(list(metrics.lines(bucket))) == 2


def test_files_of_other_libraries_are_uploaded_as_they_grow_and_at_the_end(bucket, monkeypatch):
    monkeypatch.setattr(uploads, "EVERY", 0.01)
    mirror = uploads.mirror(bucket)
    (mirror.folder / "a").mkdir()
    (mirror.folder / "a" / "events").write_bytes(b"1")
    while not (bucket / "a" / "events").exists():
        pass
    with open(mirror.folder / "a" / "events", "ab") as file:
        file.write(b"2")
    mirror.close()
    assert (bucket / "a" / "events").read_bytes() == b"12" and not mirror.folder.exists()
