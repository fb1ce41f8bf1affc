"""Checkpoints and answers in buckets, against an emulator."""
import json
import sys

import pytest

from softmask_jax.io import appended, tree_files
from softmask_jax.io.answers import AnswerFile, Hosts
from softmask_jax.io.checkpoint import Checkpoints
from tests.helpers.checkpoint_states import ABSTRACT, STATES, assert_same, trees


def test_checkpoints_are_kept_damaged_ones_set_aside_and_saved_again(emulator, bucket, caplog):
    folder = bucket / "checkpoints"
    with Checkpoints(folder, keep=2, keep_best=1) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, STATES[step], {"step": step}, {"validation/nelbo": float(step)})
    (folder / "7" / "params").mkdir()
    (folder / "7" / "params" / "_METADATA").write_bytes(b"{}")  # a killed save
    assert Checkpoints(folder).all_steps() == [1, 2, 3]
    chunk = next(name for name in (folder / "3").objects() if name.startswith("params/d/"))
    (folder / "3" / chunk).write_bytes(b"other")
    with Checkpoints(folder, keep=2, keep_best=0) as checkpoints:
        step, restored, cursor = checkpoints.restore_latest(ABSTRACT)
        assert (step, cursor) == (2, {"step": 2}) and "has 5 bytes instead of" in caplog.text
        assert_same(restored, trees(STATES[2]))
        assert checkpoints.save(3, STATES[3], {"step": 3})
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "3.damaged-1"]
    assert (folder / "3.damaged-1" / chunk).read_bytes() == b"other"
    Checkpoints(folder, keep=1, keep_best=0).restore_latest(ABSTRACT)  # of a run that was killed before it had tidied
    assert sorted(path.name for path in folder.iterdir()) == ["3", "3.damaged-1"]
    emulator.faults = lambda method, path: 403
    with pytest.raises(OSError, match="refused"):
        Checkpoints(folder).restore_latest(ABSTRACT)  # no answer is no damage
    emulator.faults = lambda method, path: None
    assert Checkpoints(folder).restore_params()[0] == 3


def test_a_copy_on_a_disk_is_checked_by_the_bucket_s_checksums(bucket, tmp_path, monkeypatch, caplog):
    with Checkpoints(bucket / "checkpoints") as checkpoints:
        checkpoints.save(1, STATES[1], {})
    for name in bucket.objects():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((bucket / name).read_bytes())
    copy = Checkpoints(tmp_path / "checkpoints")
    assert_same(copy.restore_params(items=("params",))[1], {"params": trees(STATES[1])["params"]})
    metadata = tmp_path / "checkpoints" / "1" / "data" / "metadata"
    changed = bytearray(metadata.read_bytes())
    changed[-2] ^= 1
    metadata.write_bytes(changed)
    with pytest.raises(tree_files.Damaged, match="data/metadata has changed"):
        tree_files.verify(copy.folder / "1")
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    tree_files._crc32c.cache_clear()
    assert tree_files.verify(copy.folder / "1") and "compared by size only; pip install" in caplog.text
    tree_files._crc32c.cache_clear()


def test_answers_are_kept_in_pieces_until_they_are_whole(bucket):
    path = bucket / "out.jsonl"
    row = {"sample": 0, "empty": False, "ended": True, "new_tokens": 2, "calls": 1, "filled": 2, "seconds": 1.0}
    for indices in ((2, 0), (1,)):
        with AnswerFile(path, {"seed": 1}, 3) as file:
            file.settle({"step": 5})
            file.add([row | {"index": index} for index in indices])
            with pytest.raises(RuntimeError, match="is in use by"), AnswerFile(path, {"seed": 1}, 3):
                pass
    with pytest.raises(ValueError, match="seed: 1 -> 2"), AnswerFile(path, {"seed": 2}, 3):
        pass
    with AnswerFile(path, {"seed": 1}, 3) as file:
        assert file.complete and not path.exists()
        file.finish({"rows": 3})
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert not (bucket / "out.jsonl.pieces").exists() and (bucket / "out.jsonl.summary.json").exists()


def test_answers_of_several_hosts_are_merged_in_a_bucket(bucket):
    path = bucket / "out.jsonl"
    for processes, indices in ((3, (None, 2, 3)), (2, (0, 1))):
        for process, index in reversed(list(enumerate(indices))):
            with AnswerFile(path, {"seed": 1}, 4, Hosts(process, processes)) as file:
                file.settle({"step": 5})
                file.add([] if index is None else [{"index": index, "sample": 0}])
    file.gather()
    assert [json.loads(line)["index"] for line in appended.read(path).splitlines()] == [2, 3, 1, 0]
    left = {name.split("/")[0] for name in bucket.objects() if ".lock" not in name}
    assert left == {"out.jsonl.pieces", "out.jsonl.settings.json"}
