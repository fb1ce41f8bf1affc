"""Hostile programs in the sandbox: none gets anywhere, none passes, and nothing outside is changed or left."""
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softmask_jax.evaluate.code import running, sandbox
from softmask_jax.evaluate.code.running import Limits, Program
from tests.helpers import hostile_programs as hostile

ROOT = Path(__file__).parents[3]
WORKERS = 6
LIMITS = Limits(timeout=3.0, memory=256)

pytestmark = pytest.mark.skipif(bool(sandbox.available()), reason=f"no sandbox here: {sandbox.available()}")


def descendants() -> set[int]:
    """Processes that this one has started, and that these have."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def gone(pids: set[int]) -> bool:
    """Whether processes end, soon."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder with a file and a listening socket, and a word in the environment."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "canary").write_text("SECRET")
    with socket.socket(socket.AF_UNIX) as path, socket.socket(socket.AF_UNIX) as abstract:
        for server, address in ((path, str(folder / "s")), (abstract, "\0" + str(folder / "s"))):
            server.bind(address)
            server.listen()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOSTILE_TEST", "SECRET")
            yield folder


def placed(text: str, folder: Path) -> str:
    names = {"CANARY": repr(str(folder / "canary")), "SOCKET": repr(str(folder / "s")), "PARENT": str(os.getpid())}
    for name, value in names.items():
        text = text.replace(name, value)
    return text


def whole(program: str, folder: Path) -> Program:
    return Program(hostile.HEAD + placed(program, folder), hostile.TESTS)


@pytest.fixture(scope="module")
def verdicts(outside):
    """Of every program, by name, tried many at a time; and what was there before and after."""
    programs = {name: program for name, (program, _) in hostile.PROGRAMS.items()} | hostile.CHEATS
    before = sorted(os.listdir(ROOT)), descendants()
    found = dict(sandbox.run([whole(text, outside) for text in programs.values()], LIMITS, workers=WORKERS))
    after = sorted(os.listdir(ROOT)), descendants()
    return {name: found[place] for place, name in enumerate(programs)}, before, after


def test_a_program_has_begun_even_if_its_report_is_first_read_when_flooded(outside):
    program, _ = hostile.PROGRAMS["a flood into every open file"]
    with selectors.DefaultSelector() as selector:
        one = running.Running(0, whole(program, outside), LIMITS, False, selector)
        time.sleep(2.0)  # a pipe is full by then
        while not (verdict := one.verdict()):
            for key, _ in selector.select(1.0):
                one.read(key.fd)
    assert verdict.kind == "too much output"


@pytest.mark.parametrize("name", hostile.PROGRAMS)
def test_no_hostile_program_gets_anywhere(verdicts, name):
    verdict, expected = verdicts[0][name], hostile.PROGRAMS[name][1]
    if expected == hostile.NOWHERE:
        assert (verdict.kind, verdict.detail) == ("failed", hostile.NOWHERE)
    else:
        assert f"{verdict.kind}:{verdict.detail}".startswith(tuple(expected.split("|")))


@pytest.mark.parametrize("name", hostile.CHEATS)
def test_no_program_passes_by_ending_early_or_by_saying_so(verdicts, name):
    assert verdicts[0][name].kind == "failed"


def test_the_word_of_a_pass_is_in_no_frame_no_module_and_nothing_that_is_collected(outside, monkeypatch):
    monkeypatch.setattr(running.secrets, "token_hex", lambda size: "f00d" * (size // 2))
    planted = "planted = [('f0' + '0d') * 16]\n"
    programs = [whole(text, outside) for text in (hostile.SEARCH, planted + hostile.SEARCH)]
    found = dict(sandbox.run(programs, LIMITS, workers=2))
    assert found[0].kind == "failed"
    # What is to be found is found.
    assert found[1].passed


def test_nothing_outside_is_changed_and_no_process_is_left(verdicts, outside):
    _, before, after = verdicts
    assert before[0] == after[0]
    assert gone(after[1] - before[1])
    assert (outside / "canary").read_text() == "SECRET" and sorted(os.listdir(outside)) == ["canary", "s"]
    assert not any(Path(folder, "written").exists() for folder in ("/", "/usr", "/usr/lib", "/etc", "/dev", "/home"))


@pytest.mark.parametrize("name", ["reading a file outside", "finding other processes", "a way up and out"])
def test_without_the_sandbox_the_same_programs_get_somewhere(outside, name):
    program = whole(hostile.PROGRAMS[name][0], outside)
    ((_, verdict),) = sandbox.run([program], LIMITS, isolated=False)
    assert verdict.passed


def test_without_the_sandbox_limits_still_hold(outside):
    names = ["an endless loop", "much memory", "a flood of output", "a fork bomb", "a connection to the internet"]
    programs = [whole(hostile.PROGRAMS[name][0], outside) for name in names]
    found = dict(sandbox.run(programs, Limits(2.0, 256), isolated=False, workers=WORKERS))
    assert [found[place].kind for place in range(5)] == ["timed out", "failed", "too much output", "failed", "failed"]
    assert all(found[place].detail == hostile.NOWHERE for place in (1, 3, 4))


RUN = """
import signal, sys
# A shell's background job inherits that it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from softmask_jax.evaluate.code import sandbox
from softmask_jax.evaluate.code.running import Limits, Program
program = Program("import os, signal; signal.pthread_sigmask(0, range(1, 65))\\nwhile True: pass")
list(sandbox.run([program] * 2, Limits(600.0), isolated=sys.argv[1] == "True", workers=2))
"""


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_parent_that_dies_leaves_no_program_behind(tmp_path, isolated, number):
    command, where = [sys.executable, "-c", RUN, str(isolated)], os.environ | {"TMPDIR": str(tmp_path)}
    others = descendants()
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=where)
    wanted, until = 6 if isolated else 2, time.monotonic() + 60
    while len(started := descendants() - others - {parent.pid}) < wanted and time.monotonic() < until:
        time.sleep(0.02)
    assert len(started) >= wanted
    parent.send_signal(number)
    parent.wait(60)
    assert gone(started)


def test_a_sandbox_that_cannot_be_made_is_an_error_and_no_verdict(monkeypatch):
    monkeypatch.setattr(running, "_binds", lambda: [("/there/is/no/such", "/x")])
    with pytest.raises(RuntimeError, match="could not be started.*No such file"):
        list(sandbox.run([Program("x = 1")], LIMITS))
    assert "No such file" in sandbox.available.__wrapped__()


def test_closing_the_iterator_ends_what_still_runs():
    others = descendants()
    verdicts = sandbox.run([Program("while True: pass"), Program("x = 1")], Limits(600.0), workers=2)
    assert next(verdicts)[1].passed
    started = descendants() - others
    verdicts.close()
    assert started and gone(started)
