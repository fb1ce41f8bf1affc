"""Progress in a log: plain lines, few of them; a bar on a terminal; silence where curves are drawn."""
import os
import pty
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from softmask_jax.config import progress
from softmask_jax.config.progress import Progress

ROOT = Path(__file__).parent.parent.parent
# A command with a loop of 500 steps.
COMMAND = """
from softmask_jax.config.progress import Progress
with Progress(500, "Step") as shown:
    for step in range(500):
        if step == 250:
            shown.say("Step 250: halfway.")
        shown.update(1, lambda: f"loss {step}")
"""


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_the_first_step_a_line_every_half_minute_and_the_end(clock, capsys):
    asked = []
    with Progress(700, "Step") as shown:
        for step in range(1, 701):
            clock[0] += 10.0 if step == 1 else 0.5  # the first step compiles
            shown.update(1, lambda: asked.append(step) or f"loss {step / 100:.2f}, 9,000 tokens/s")
    assert capsys.readouterr().err.splitlines()[:3] == [
        "Step 1 of 700, loss 0.01, 9,000 tokens/s",
        "Step 61 of 700, loss 0.61, 9,000 tokens/s, 05:19 left",
        "Step 121 of 700, loss 1.21, 9,000 tokens/s, 04:49 left",
    ]
    assert len(asked) == 13  # the note costs nothing between lines


def test_the_end_is_a_line_once_whether_it_is_reached_or_not(capsys):
    for last in (1, 3, 5):
        with Progress(5, "Verifying", "bytes", scaled=True) as shown:
            list(shown.over(range(last)))
    first, stopped, end = ("Verifying 1.00 of 5.00 bytes", "Verifying 3.00 of 5.00 bytes", "Verifying 5.00 of 5.00 bytes")
    lines = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [first, first, stopped, first, end]


def test_a_continued_loop_is_as_fast_as_this_process_is(clock, capsys):
    with Progress(1000, "Reading", "parts", initial=900) as shown:
        for _ in range(50):
            shown.update()
            clock[0] += 1.0
    assert capsys.readouterr().err.splitlines()[1] == "Reading 931 of 1,000 parts, 01:09 left"


def test_a_brief_loop_that_is_soon_over_writes_nothing_and_one_that_is_not_all(clock, capsys):
    for seconds, lines in ((29, []), (45, ["Generating 31 of 45 answers, 00:14 left", "Generating 45 of 45 answers"])):
        with Progress(seconds, "Generating", "answers", brief=True) as shown:
            for _ in range(seconds):
                shown.update()
                clock[0] += 1.0
        assert capsys.readouterr().err.splitlines() == lines


def test_what_is_silenced_or_another_process_shows_nothing(capsys):
    with progress.silent(), Progress(5, "Step") as shown:
        list(shown.over(range(5)))
        shown.say("Step 5: done.")
    with Progress(5, "Step", disable=True) as shown:
        list(shown.over(range(5)))
    assert tuple(capsys.readouterr()) == ("Step 5: done.\n", "")


def test_bars_of_other_packages_stay_out_of_a_commands_log():
    code = """
import sys
from softmask_jax.config.command_line import command
@command()
def main(words):
    from tqdm import tqdm
    from softmask_jax.config.progress import Progress
    with Progress(3, "Ours") as shown:
        for _ in tqdm(range(3), "theirs"):
            shown.update()
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "Ours 1 of 3\nOurs 3 of 3\n"


def test_a_file_gets_lines_and_a_terminal_a_bar():
    done = subprocess.run([sys.executable, "-c", COMMAND], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "Step 250: halfway.\n" and "\r" not in done.stderr
    first, last = done.stderr.splitlines()
    assert (first, last) == ("Step 1 of 500, loss 0", "Step 500 of 500, loss 499")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    # Another test of this process may have called a command, which hides bars from logs.
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    command = [sys.executable, "-c", COMMAND]
    subprocess.run(command, cwd=ROOT, stdout=theirs, stderr=theirs, env=environment, check=True)
    shown = b""
    # What a terminal got may be lost once its last user has closed it: `theirs` stays open until all is read.
    while select.select([ours], [], [], 1.0)[0]:
        shown += os.read(ours, 10_000)
    os.close(theirs)
    os.close(ours)
    assert b"\r" in shown and b"Step 250: halfway." in shown and b"500/500" in shown
