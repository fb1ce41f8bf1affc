"""Closed, full and narrow standard streams end no command, and files opened meanwhile hold their own content alone."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny_run

ROOT = Path(__file__).parent.parent.parent
TEXT = "\u03bb \u20ac \U0001d11e"
# A command that logs, writes a file and prints a row of JSON.
COMMAND = """
import contextlib, json, logging, os, sys
from tqdm import tqdm
from softmask_jax.config.command_line import command, say

@command(result="log" not in sys.argv)
def main(words):
    logging.basicConfig()
    with open(words[0], "w", encoding="utf-8") as file:
        assert all(map(os.get_inheritable, range(3)))
        with contextlib.suppress(OSError):
            os.write(2, b"from C++")
        for _ in tqdm(range(3)):
            say("a line"), logging.warning("a warning")
        sys.stdin.read()
        file.write(words[1])
    print(json.dumps(words[1], ensure_ascii=False))

sys.exit(main())
"""


@pytest.fixture
def run(tmp_path):
    """Runs the command in a shell, its streams as `streams` says. Returns the process and what its file holds."""

    def run(streams: str, *words: str, **environment: str):
        line = f'"$0" -c "$1" "$2/file" "$3" {" ".join(words)} {streams}'
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line, sys.executable, COMMAND, tmp_path, TEXT], capture_output=True,
            cwd=ROOT, env=os.environ | environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done, (tmp_path / "file").read_text("utf-8")

    return run


@pytest.mark.parametrize("streams", ["2>&-", "<&-", ">&-", "<&- >&- 2>&-", "2>/dev/full", "2> >(true)", "2</dev/null"])
def test_a_command_ends_well_without_a_usable_stream(run, streams):
    done, written = run(streams)
    assert done.returncode == 0 and written == TEXT
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    if ">&-" not in streams.replace("2>&-", ""):
        assert json.loads(done.stdout.splitlines()[-1]) == TEXT


def test_a_reader_that_wants_no_more_of_the_result_is_no_error(run):
    done, written = run("| true")
    assert done.returncode == 0 and written == TEXT and b"rror" not in done.stderr


def test_a_result_that_a_full_device_loses_is_one_line_but_a_log_is_not(run):
    done, written = run(">/dev/full")
    assert done.returncode == 1 and written == TEXT
    assert done.stderr.splitlines()[-1] == b"Error: Standard output cannot be written (No space left on device)."
    assert run(">/dev/full", "log")[0].returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict"])
def test_a_row_of_json_stays_one_in_a_narrow_encoding(run, encoding):
    done, written = run("", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and written == TEXT
    assert json.loads(done.stdout.splitlines()[-1].decode("latin-1")) == TEXT


def test_words_are_read_as_utf_8_whatever_the_locale(run):
    done, written = run("", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0 and written == TEXT and json.loads(done.stdout.splitlines()[-1]) == TEXT


@pytest.mark.full
def test_training_ends_well_without_any_stream(tmp_path):
    tiny_run.write_texts(tmp_path / "texts")
    values = tiny_run.settings(tmp_path, train__steps=2, optimizer__warmup_steps=1, eval__every=0)
    line = f"-m softmask_jax.main --config={tiny_run.write_config(tmp_path / 'config.py', values)} --workdir={tmp_path / 'run'}"
    command, quick = ["bash", "-c", f'"$0" {line} >&- 2>&- <&-', sys.executable], {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    assert subprocess.run(command, cwd=ROOT, env=os.environ | quick).returncode == 0
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "checkpoints" / "2").exists()
