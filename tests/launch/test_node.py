"""launch/node.sh on this machine, with a toy for the training: started, followed, stopped, lost, restarted; mounts."""
import json
import os
import signal
import time

import pytest

from tests.launch import toy_project
from tests.launch.world import World

PATIENCE = 60


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


class Node:
    def __init__(self, folder):
        self.world = World(folder)
        self.project = toy_project.make(folder / "project with a space")
        self.workdir = folder / "runs" / "a b"

    def __call__(self, action, *words, **more):
        return self.world.run(self.project / "launch" / "node.sh", action, *words, cwd=self.world.folder, **more)

    def start(self, plan, *words, restart=False, **more):
        toy_project.plan(self.workdir, plan, **more)
        where = f"--workdir={self.workdir}"
        restart = ["--unless-stopped"] if restart else []
        return self("start", "--name=r", where, "--label=host-0", *restart, "--", where, *words)

    def status(self, *wanted, step="", **environment):
        """Once it is one of those that are waited for, at that step."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = self("status", "--name=r", **environment).stdout.split()[1:]
            reached = (not wanted or found[0] in wanted) and step in ("", found[2])
            if reached or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

    @property
    def log(self):
        return (self.workdir / "logs" / "host-0.log").read_text()

    @property
    def pid(self):
        return int((self.world.folder / "home" / ".softmask_jax" / "r" / "pid").read_text())


def test_a_run_goes_on_without_its_starter_and_ends_as_finished(node):
    done = node.start("finish", "--config=c", "--note=it's a $(word); yes")
    assert done.returncode == 0, done.stderr
    assert node.status("ended") == ["ended", "0", "20", "yes"]
    arguments = json.loads(node.log.split("arguments ")[1].splitlines()[0].rpartition(" token")[0])
    assert arguments == ["-m", "softmask_jax.supervise", f"--workdir={node.workdir}", "--config=c", "--note=it's a $(word); yes"]
    assert node("finished", f"--workdir={node.workdir}").returncode == 0
    assert "Validation" in node("follow", "--name=r").stdout


def test_a_run_that_makes_all_steps_of_an_older_shorter_config_is_not_finished(node):
    node.start("finish", steps=30)
    assert node.status("ended") == ["ended", "0", "20", "no"]
    assert node("finished", f"--workdir={node.workdir}").returncode != 0


def test_stop_lets_it_save_and_counts_as_an_interruption_by_hand(node):
    node.start("wait")
    assert node.status("running", step="3") == ["running", "-", "3", "no"]
    done = node("stop", "--name=r")
    assert done.returncode == 0 and "ended" in done.stdout and "Stopped and saved" in node.log
    assert node.status("ended") == ["ended", "130", "3", "no"]
    assert node("stop", "--name=r").returncode == 0  # again: nothing to do
    assert node.start("finish").returncode == 0  # and it goes on
    assert node.status("ended") == ["ended", "0", "20", "yes"]


def test_a_watch_does_not_start_what_was_stopped_by_hand_meanwhile(node):
    node.start("exit 1")
    assert node.status("ended")[:2] == ["ended", "1"]
    assert node("stop", "--name=r", "--for-restart").returncode == 0
    assert node.start("exit 1", restart=True).returncode == 0
    assert node.status("ended")[:2] == ["ended", "1"]
    assert node("stop", "--name=r").returncode == 0  # nothing runs, but a restart may be on its way
    assert node.status()[:2] == ["ended", "130"]
    done = node.start("wait", restart=True)
    assert done.returncode == 1 and "r was stopped by hand" in done.stderr
    assert node.start("finish").returncode == 0  # by hand, too
    assert node.status("ended") == ["ended", "0", "20", "yes"]


def test_a_run_that_saved_because_the_machine_was_taken_is_unfinished(node):
    node.start("wait")
    assert node.status("running", step="3") == ["running", "-", "3", "no"]
    os.kill(node.pid, signal.SIGTERM)
    assert node.status("ended") == ["ended", "0", "3", "no"]


def test_an_exit_status_is_kept_and_a_kill_of_everything_is_told(node):
    node.start("exit 7")
    assert node.status("ended")[:2] == ["ended", "7"]
    node.start("wait")
    pid = node.pid
    os.kill(int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1]), signal.SIGKILL)  # who attends it
    os.kill(pid, signal.SIGKILL)
    assert node.status("lost") == ["lost", "-", "3", "no"]
    assert node("status", "--name=other").stdout == "softmask_jax absent - -1 no\n"


def test_a_second_start_of_a_run_is_refused_and_leaves_the_first_alone(node):
    node.start("wait")
    pid = node.pid
    done = node.start("wait")
    assert done.returncode == 1 and f"runs here already (process {pid})" in done.stderr
    assert node("check", "--name=r").returncode == 1
    assert node.status()[0] == "running" and node.pid == pid
    node("stop", "--name=r")


def test_follow_shows_the_log_as_it_grows_and_ends_with_the_run(node):
    node.start("wait")
    process = node.world.start(node.project / "launch" / "node.sh", "follow", "--name=r", cwd=node.world.folder)
    time.sleep(0.3)
    assert process.poll() is None
    os.kill(node.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "Stopped and saved" in out


def test_in_the_foreground_a_stopped_run_asks_to_be_tried_again(node):
    toy_project.plan(node.workdir, "wait")
    words = ["attend", "--name=r", f"--workdir={node.workdir}", "--", f"--workdir={node.workdir}"]
    process = node.world.start(node.project / "launch" / "node.sh", *words, cwd=node.world.folder)
    deadline = time.monotonic() + PATIENCE
    while not (node.workdir / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75 and "Stopped and saved" in out
    toy_project.plan(node.workdir, "finish")
    assert node(*words).returncode == 0


def test_a_run_in_a_bucket_has_its_log_here_and_there_and_is_known_by_what_it_wrote(node, bucket, emulator):
    toy_project.plan(bucket, "wait")
    words = ["start", "--name=r", f"--workdir={bucket}", "--label=host-0", "--", f"--workdir={bucket}"]
    environment = emulator.environment
    done = node(*words, **environment)
    log = node.world.folder / "home" / ".softmask_jax" / "r" / "host-0.log"
    assert done.returncode == 0 and str(log) in done.stdout
    assert node.status("running", step="3", **environment) == ["running", "-", "3", "no"]
    node("stop", "--name=r", **environment)
    assert node.status(**environment) == ["ended", "130", "3", "no"]
    assert (bucket / "logs" / "host-0.log").read_text() == log.read_text() and "Stopped and saved" in log.read_text()
    toy_project.plan(bucket, "finish")
    assert node(*words, **environment).returncode == 0
    assert node.status("ended", **environment) == ["ended", "0", "20", "yes"]
    assert node("finished", f"--workdir={bucket}", **environment).returncode == 0
    assert not list(node.world.folder.glob("**/gs:*"))


def test_a_bucket_that_the_host_cannot_write_ends_its_setup_in_one_line(node, bucket, emulator):
    setup = ("--extras=gcs", f"--bucket={bucket}")
    assert mounting(node, *setup, **emulator.environment).returncode == 0
    emulator.faults = lambda method, path: 403 if method == "POST" else None
    done = mounting(node, *setup, **emulator.environment)
    assert done.returncode == 1 and "Ready" not in done.stdout
    refused, error = done.stderr.splitlines()
    assert refused.startswith(f"{bucket}/") and "refused (403); grant roles/storage.objectAdmin on the bucket" in refused
    assert error == f"Error: {os.uname().nodename}: the run's folder cannot be in {bucket}"


def test_secrets_come_from_the_file_of_mode_600(node):
    home = node.world.folder / "home" / ".softmask_jax"
    home.mkdir(parents=True)
    (home / "secrets").write_text("HF_TOKEN='it'\\''s'\n")
    node.start("finish")
    node.status("ended")
    assert "token it's" in node.log
    assert node("run", "--", "sh", "-c", 'echo "$HF_TOKEN" "$(command -v python)"').stdout == (
        f"it's {node.project}/.venv/bin/python\n"
    )


def test_an_unknown_word_is_refused(node):
    assert node("start", "--nmae=r").returncode == 1
    assert "knows no 'dance'" in node("dance").stderr
    (node.project / ".venv" / "bin" / "python").unlink()
    assert "not set up" in node.start("wait").stderr


def mounting(node, *words, **environment):
    """Setup with stubs for what needs root, and nothing installed."""
    for program in ("sudo", "mountpoint", "lsblk", "blkid", "mount.nfs"):
        node.world.add(program)
    venv = 'make_venv() { echo "installed $*"; }\naccelerator() { echo cuda12; }\ntested_versions() { echo tested.txt; }\n'
    (node.project / "launch" / "venv.sh").write_text(venv)
    node.world.answer("mountpoint", "", {"code": 1})
    return node("setup", *words, **environment)


def test_setup_mounts_a_share_once_and_installs(node):
    done = mounting(node, "--extras=auto,chat", "--nfs=10.0.0.2:/share", "--mount=/shared")
    assert done.returncode == 0, done.stderr
    assert "installed .venv cuda12,chat tested.txt" in done.stdout
    asked = [" ".join(call["words"]) for call in node.world.calls("sudo")]
    assert asked == ["mkdir -p /shared", "mount -t nfs -o hard,noatime,lookupcache=positive 10.0.0.2:/share /shared",
                     "chmod a+rwx /shared"]  # fmt: skip
    node.world.rules[0]["answers"] = [{"code": 0}]
    assert node("setup", "--extras=chat", "--nfs=10.0.0.2:/share").returncode == 0
    assert len(node.world.calls("sudo")) == 3


@pytest.mark.parametrize("code, formatted", [(2, True), (0, False)])
def test_setup_formats_only_an_empty_disk(code, formatted, node):
    node.world.answer("lsblk", "-dnpo", {"out": "/dev/loop0 loop\n/dev/sda disk\n/dev/sdb disk\n"})
    node.world.answer("lsblk", "/dev/sda", {"out": "sda \nsda1 /\n"})
    node.world.answer("lsblk", "/dev/sdb", {"out": "sdb \n"})
    node.world.answer("sudo", "blkid /dev/sdb", {"code": code})
    done = mounting(node, "--extras=tpu", "--disk", "--mount=/data")
    assert done.returncode == 0, done.stderr
    assert bool(node.world.calls("sudo", "mkfs.ext4 .*/dev/sdb")) is formatted
    assert node.world.calls("sudo", "mount .*/dev/sdb /data")


def test_setup_touches_no_disk_where_it_is_not_clear_which_one_is_meant(node):
    node.world.answer("lsblk", "-dnpo", {"out": "/dev/sda disk\n/dev/sdb disk\n"})
    node.world.answer("lsblk", "", {"out": "sdx \n"})
    done = mounting(node, "--disk")
    assert done.returncode == 1 and "expected one free disk, found 2: /dev/sda /dev/sdb" in done.stderr
    assert not node.world.calls("sudo", "mkfs|blkid|mount ")


def test_setup_names_the_host_and_the_share_that_cannot_be_mounted(node):
    node.world.answer("sudo", "mount -t nfs", {"err": "mount.nfs: Connection timed out\n", "code": 32})
    done = mounting(node, "--nfs=10.0.0.2:/share")
    assert done.returncode == 1
    assert f"Error: {os.uname().nodename}: could not mount 10.0.0.2:/share" in done.stderr


def test_where_python_is_too_old_setup_installs_one_with_uv(node):
    for version in ("", ".11", ".12", ".13", ".14"):
        node.world.add(f"python3{version}")
        node.world.answer(f"python3{version}", "^-c", {"code": 1})
    node.world.answer("python3", "uv python find", {"out": "/opt/python3.12\n"})
    (node.project / "launch" / "venv.sh").write_text('make_venv() { echo "installed with $PYTHON"; }\ntested_versions() { true; }\n')
    done = node("setup", "--extras=tpu")
    assert done.returncode == 0 and "installed with /opt/python3.12" in done.stdout
    asked = [" ".join(call["words"]) for call in node.world.calls("python3", "^-m")]
    assert asked == ["-m pip install --quiet --user uv", "-m uv python install --quiet 3.12", "-m uv python find 3.12"]
    node.world.answer("python3", "pip", {"code": 1})
    node.world.rules.insert(0, node.world.rules.pop())
    done = node("setup", "--extras=tpu")
    assert done.returncode == 1 and "neither Python 3.11 nor pip" in done.stderr
