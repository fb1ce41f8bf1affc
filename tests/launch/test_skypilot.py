"""launch/skypilot.yaml: its commands are ours, and SkyPilot's own schema takes it."""
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from softmask_jax import config, main, supervise

ROOT = Path(__file__).parents[2]
FILE = ROOT / "launch" / "skypilot.yaml"
VERSION = "0.14.1"
# Arguments: a task's file. Offline; the exit status is 1, with a message, where a schema refuses it.
VALIDATE = """
import sys, yaml
from sky.utils import common_utils, schemas
task = yaml.safe_load(open(sys.argv[1], encoding="utf-8"))
common_utils.validate_schema(task, schemas.get_task_schema(), "task: ")
common_utils.validate_schema(task["resources"], schemas.get_resources_schema(), "resources: ")
"""


def test_the_training_and_the_setup_are_commands_that_there_are():
    task = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    words = shlex.split(task["run"].replace("$RUNS", "/runs"))
    assert words[:3] == [".venv/bin/python", "-m", "softmask_jax.supervise"]
    _, rest = supervise.parse(words[3:])
    flags, overrides = main.parse(rest)
    config.load(str(ROOT / flags.config), overrides)
    assert flags.fetch and flags.workdir == "/runs/dream7b" and set(task["envs"]) == {"RUNS"}
    script, action, extras = shlex.split(task["setup"])[1:]
    assert (ROOT / script).is_file() and action == "setup" and extras.startswith("--extras=tpu,")


@pytest.mark.full
def test_skypilots_schema_takes_the_task_and_refuses_a_misspelt_key(tmp_path):
    python, task = str(tmp_path / "venv" / "bin" / "python"), tmp_path / "task.yaml"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = [python, "-m", "pip", "install", "--quiet", f"skypilot=={VERSION}"]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"SkyPilot cannot be installed here: {installed.stderr.strip()[-200:]}")
    for right, wrong in (("", ""), ("workdir:", "workdri:"), ("use_spot:", "use_spots:")):
        task.write_text(FILE.read_text(encoding="utf-8").replace(right, wrong) if right else FILE.read_text(encoding="utf-8"))
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        done = subprocess.run([python, "-c", VALIDATE, task], capture_output=True, text=True, env=environment)
        assert done.returncode == bool(right) and (not right or f"did you mean '{right[:-1]}'" in done.stderr), done.stderr
