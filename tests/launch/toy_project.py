"""A copy of the launch scripts beside a Python whose softmask_jax.supervise is a toy."""
import json
import shutil
import sys
from pathlib import Path

from softmask_jax import config
from softmask_jax.io.paths import to_path
from tests.launch.world import ROOT

# By <workdir>/plan: "finish" makes all steps; "exit N"; "wait" until SIGTERM, then saves. It prints its arguments.
TOY = """
import json, os, signal, sys, time
from softmask_jax.io.paths import to_path
def flag(name):
    return next(word.partition("=")[2] for word in sys.argv if word.startswith(f"--{name}="))
folder = to_path(flag("workdir"))
plan = (folder / "plan").read_text().split()
signal.signal(signal.SIGTERM, lambda *_: (print("Stopped and saved"), sys.exit(0)))
print("arguments", json.dumps(sys.argv[1:]), "token", os.environ.get("HF_TOKEN"), flush=True)
def save(step):
    (folder / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / str(step) / "commit_success.txt").write_text("")
save(3)
while plan[0] == "wait":
    time.sleep(0.05)
if plan[0] == "exit":
    sys.exit(int(plan[1]))
save(20)
(folder / "summary.json").write_text(json.dumps({"step": 20}))
print("Validation ...")
"""


def make(folder: Path) -> Path:
    """The project's folder, set up."""
    (folder / "launch").mkdir(parents=True)
    for script in (ROOT / "launch").glob("*.sh"):
        shutil.copy(script, folder / "launch")
    (folder / "softmask_jax").symlink_to(ROOT / "softmask_jax")
    (folder / "toy.py").write_text(TOY)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *softmask_jax.supervise*) exec {sys.executable} "{folder}/toy.py" "$@" ;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return folder


def plan(workdir: Path | str, what: str, steps: int = 20) -> Path:
    """What the next run in `workdir` does."""
    workdir = to_path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "plan").write_text(what)
    settings = config.from_dict({"train": {"steps": steps}})
    (workdir / "config.json").write_text(json.dumps(settings.to_dict()))
    return workdir
