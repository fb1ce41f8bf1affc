"""The answer file: every row once, whatever happens in between."""
import json
import os

import pytest

from softmask_jax.io import answers, appended
from softmask_jax.io.answers import AnswerFile, Hosts, described, summarize

SETTINGS = {"steps": 8, "prompts": "abc", "base": None, "soft_mask": {"k": 3}}


def row(index, sample=0, **more):
    values = {"index": index, "sample": sample, "text": f"ä{index}\u2028", "new_tokens": 4, "ended": False, "empty": False}
    return values | {"calls": 2, "filled": 6, "seconds": 0.5} | more


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


def opened(path, settings=SETTINGS, total=4):
    return AnswerFile(path, settings, total)


def begin(path, *indices, total=4):
    with opened(path, total=total) as file:
        file.settle({"step": 3})
        file.add([row(index) for index in indices])



def indices(path):
    return [json.loads(line)["index"] for line in path.read_bytes().split(b"\n") if line]


def test_rows_are_appended_and_at_the_end_put_in_order(path):
    begin(path, 2, 0)
    with opened(path) as file:
        assert set(file.rows) == {(2, 0), (0, 0)} and file.rows[2, 0] == row(2) and not file.complete
        file.settle({"step": 3})
        file.add([row(3), row(1)])
        assert file.complete and indices(path) == [2, 0, 3, 1]
        file.finish({"rows": 4})
    assert indices(path) == [0, 1, 2, 3]
    assert json.loads(file.summary_path.read_text()) == {"rows": 4}
    assert sorted(os.listdir(path.parent)) == ["out.jsonl", "out.jsonl.settings.json", "out.jsonl.summary.json"]


def test_samples_of_a_row_stand_side_by_side(path):
    with opened(path) as file:
        file.settle({})
        file.add([row(1, 1), row(0, 1), row(1, 0), row(0, 0)])
        file.finish({})
    with opened(path) as file:
        assert list(file.rows) == [(0, 0), (0, 1), (1, 0), (1, 1)] and file.complete


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("module", "function"), [(appended, "write_atomically"), (answers, "write_json")])
def test_a_death_at_the_end_leaves_all_rows_and_the_end_is_made_again(path, monkeypatch, module, function):
    begin(path, 2, 0, 3, 1)

    def die(*_, **__):
        (path.parent / ".out.jsonl.17-abc.tmp").write_text("half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, function, die)
        with pytest.raises(Killed), opened(path) as file:
            file.finish({})
    with opened(path) as file:
        assert file.complete
        file.finish({"rows": 4})
    assert indices(path) == [0, 1, 2, 3]
    assert sorted(os.listdir(path.parent)) == ["out.jsonl", "out.jsonl.settings.json", "out.jsonl.summary.json"]


@pytest.mark.parametrize("cut", [1, 10, -1])
def test_half_a_last_line_is_dropped_and_written_again(path, cut):
    begin(path, 0, 1)
    content = path.read_bytes()
    second = content.index(b"\n") + 1
    path.write_bytes(content[: second + cut] if cut > 0 else content[:cut])
    with opened(path) as file:
        assert set(file.rows) == {(0, 0)}
        file.settle({"step": 3})
        file.add([row(1)])
    assert path.read_bytes() == content


def test_a_kill_within_the_first_line_leaves_nothing_in_the_way(path):
    begin(path, 0)
    path.write_bytes(path.read_bytes()[:5])
    with opened(path, {"steps": 9}) as file:
        assert not file.rows
        file.settle({"step": 1})
        file.add([row(0)])
    assert json.loads(file.settings_path.read_text()) == {"steps": 9, "step": 1}


def test_zeros_that_a_power_cut_left_are_dropped_but_damage_inside_is_an_error(path):
    begin(path, 0, 1)
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * 40)
    with opened(path) as file:
        assert set(file.rows) == {(0, 0), (1, 0)}
    path.write_bytes(b"{]" + content[2:])
    with pytest.raises(ValueError, match="out.jsonl:1 is no answer of this command; give another --out"), opened(path):
        pass


@pytest.mark.parametrize("settings, said", [
    (SETTINGS | {"steps": 9}, r"\(steps: 8 -> 9\)"),
    (SETTINGS | {"prompts": "x" * 64}, r'prompts: "abc" -> "xxx.*\.\.\.\)'),
    (SETTINGS | {"base": "b", "soft_mask": {"k": 1}}, r'base: null -> "b"; soft_mask: {"k": 3} -> {"k": 1}'),
    (SETTINGS | {"new": 1}, r"new: \(absent\) -> 1"),
])
def test_rows_of_other_settings_are_not_continued(path, settings, said):
    begin(path, 0)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=said) as error, opened(path, settings):
        pass
    assert "give another --out" in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == content


def test_settings_that_are_known_late_are_compared_too(path):
    begin(path, 0)
    with opened(path) as file, pytest.raises(ValueError, match="step: 3 -> 4"):
        file.settle({"step": 4})


def test_an_attempt_that_wrote_nothing_leaves_nothing_behind(path):
    with pytest.raises(ZeroDivisionError), opened(path) as file:
        file.settle({"step": 3})
        raise ZeroDivisionError
    assert os.listdir(path.parent) == []


def test_another_file_is_never_written_to(path):
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="out.jsonl:1 is no answer"), opened(path):
        pass
    assert path.read_text() == '{"prompt": "a"}\n'
    path.write_text("no newline")
    with pytest.raises(ValueError, match="out.jsonl:1 is no answer"), opened(path):
        pass
    assert path.read_text() == "no newline"


def test_rows_whose_settings_are_gone_are_not_continued(path):
    begin(path, 0)
    opened(path).settings_path.unlink()
    with pytest.raises(ValueError, match="not to be read in out.jsonl.settings.json"), opened(path):
        pass


def test_one_process_at_a_time_writes_a_file(path):
    with opened(path) as file:
        file.settle({})
        file.add([row(0)])
        with pytest.raises(RuntimeError, match="being written by another process"), opened(path):
            pass
    with opened(path) as file:
        assert set(file.rows) == {(0, 0)}


def test_a_file_that_vanishes_while_it_is_opened_is_no_place_to_write(path, monkeypatch):
    monkeypatch.setattr(appended, "try_lock", lambda handle, path: path.unlink() or True)
    with pytest.raises(RuntimeError, match="has just ended"), opened(path):
        pass


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Give another --out"), opened(tmp_path / "file" / "out.jsonl"):
        pass
    with pytest.raises(OSError, match="Is a directory while writing"), opened(tmp_path):
        pass
    with opened(tmp_path / "new" / "out.jsonl") as file:
        file.settle({})
        file.add([row(0)])


def test_a_full_disk_is_one_line_and_what_was_written_stays(path):
    begin(path, 0)
    with opened(path) as file:
        file.settle({"step": 3})
        file._file._file = open("/dev/full", "ab", buffering=0)
        with pytest.raises(OSError, match="No space left on device while writing .*give another --out"):
            file.add([row(1)])
    assert indices(path) == [0]


def test_the_summary_is_of_the_rows_without_errors():
    rows = [
        row(0, empty=True, new_tokens=0), row(1, ended=True, calls=4), row(2), row(3),
        row(4, error="NaN", new_tokens=0, calls=9),
    ]  # fmt: skip
    found = summarize(rows)
    assert found == {
        "rows": 5, "errors": 1, "empty": 0.25, "ended": 0.25, "new_tokens": 3.0, "calls": 2.5, "tokens_per_call": 2.4,
        "seconds": 2.5, "tokens_per_second": 4.8,
    }  # fmt: skip
    said = described(found)
    assert "5 answers, 1 of them failed" in said and "25.0% empty, 25.0% ended" in said and "2.40 tokens" in said


def test_a_summary_of_failures_alone_has_numbers():
    assert summarize([row(0, error="NaN", seconds=0.0)])["tokens_per_call"] == 0


def test_keys_are_of_index_and_sample():
    assert answers.key_of({"index": 3}) == (3, 0) and answers.key_of({"index": 3, "sample": 2}) == (3, 2)


def of_host(path, process, processes=2, settings=SETTINGS, **more):
    return AnswerFile(path, settings, 4, Hosts(process, processes, **more))


def test_hosts_write_files_of_their_own_and_the_first_merges_them(path):
    with of_host(path, 0) as first, of_host(path, 1) as second:
        for file in (first, second):
            file.settle({"step": 3})
        second.add([row(3), row(1)])
        first.add([row(0), row(2)])
        assert indices(path) == [0, 2] and indices(path.with_name("out.jsonl.hosts") / "1.jsonl") == [3, 1]
        first.gather()
        second.gather()
        assert first.rows == second.rows and first.complete
        first.finish({})
    assert indices(path) == [0, 1, 2, 3]
    assert sorted(os.listdir(path.parent)) == ["out.jsonl", "out.jsonl.settings.json", "out.jsonl.summary.json"]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_rows_of_hosts_that_were_killed_count_for_any_number_of_hosts(path, processes):
    for process in (2, 1):  # the first host wrote nothing
        with of_host(path, process, 3) as file:
            file.settle({"step": 3})
            file.add([row(process)])
    piece = path.with_name("out.jsonl.hosts") / "2.jsonl"
    piece.write_bytes(piece.read_bytes() + b'{"index": 3, "sam')
    for process in range(processes):
        with of_host(path, process, processes) as file:
            file.settle({"step": 3})
            assert set(file.rows) == {(1, 0), (2, 0)}
    with of_host(path, 0, processes) as file:
        file.settle({"step": 3})
        file.add([row(0), row(3)])
        file.gather()
    assert indices(path) == [1, 2, 0, 3] and not path.with_name("out.jsonl.hosts").exists()
    assert json.loads(file.settings_path.read_text()) == SETTINGS | {"step": 3}


def test_rows_of_other_settings_on_another_host_are_refused(path):
    with of_host(path, 1) as file:
        file.settle({"step": 3})
        file.add([row(1)])
    with pytest.raises(ValueError, match="1.jsonl has rows that were made with other settings .steps: 8 -> 9"):
        of_host(path, 0, settings=SETTINGS | {"steps": 9}).__enter__()
    with of_host(path, 0) as file:
        with pytest.raises(ValueError, match="step: 3 -> 4"):
            file.settle({"step": 4})


def test_waiting_for_rows_ends_when_a_host_is_lost(path):
    def check():
        raise RuntimeError("Host 1 has ended.")

    with of_host(path, 0, check=check) as file:
        file.settle({})
        file.add([row(0)])
        with pytest.raises(RuntimeError, match="Host 1"):
            file.gather()
