"""launch/ssh.sh with hosts that are folders of this machine, reached by an ssh that runs the command there."""
import json
import shutil
import socket
import subprocess
import sys

import pytest

from tests.helpers.waiting import until
from tests.helpers.xla_flags import ONE_DEVICE
from tests.launch import toy_project
from tests.launch.world import PATIENCE, World

HOSTS = ["--name=owt", "--hosts=alpha,me@beta", "--poll=1"]


class Cluster(World):
    """Two hosts, whose homes are folders; the project is set up there with a toy training."""

    def __init__(self, folder):
        super().__init__(folder)
        self.workdir = folder / "shared" / "runs" / "a b"
        for host in ("alpha", "beta"):
            toy_project.make(folder / host / "softmask_jax")

    def reachable(self):
        self.answer("ssh", "", {"local": True})
        return self

    def go(self, action, *words, **more):
        return self.run("ssh.sh", action, *HOSTS, "--config=c", f"--workdir={self.workdir}", *words, **more)


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def arguments(cluster, host):
    """Of the training on a host."""
    log = cluster.workdir / "logs" / f"host-{host}.log"
    until(lambda: " token" in log.read_text(), PATIENCE)
    return json.loads(log.read_text().rsplit("arguments ", 1)[1].splitlines()[0].rpartition(" token")[0])


def starts(log):
    """Starts of a training that its log tells of."""
    return log.read_text().count("arguments ")


def running(cluster, host):
    script = cluster.folder / host / "softmask_jax" / "launch" / "node.sh"
    return " running " in cluster.run(script, "status", "--name=owt", HOME=str(cluster.folder / host)).stdout


def test_a_run_is_started_on_all_hosts_followed_to_its_end_and_reported(cluster):
    toy_project.plan(cluster.workdir, "finish")
    done = cluster.reachable().go("start", "--", "--note=it's a $(word)")
    assert done.returncode == 0, done.stderr
    assert "[alpha] Started on" in done.stderr and "[me@beta] Started on" in done.stderr
    done = cluster.go("follow")
    assert done.returncode == 0 and "Finished at step 20." in done.stderr and "Validation" in done.stdout
    for host in (0, 1):
        assert arguments(cluster, host)[2:] == [
            "--config=c", f"--workdir={cluster.workdir}", "--processes=2", "--coordinator=alpha:8482", f"--process={host}",
            "--note=it's a $(word)",
        ]  # fmt: skip


def test_one_host_needs_no_coordinator(cluster):
    toy_project.plan(cluster.workdir, "finish")
    cluster.reachable().run("ssh.sh", "start", "--name=owt", "--hosts=alpha", "--config=c", f"--workdir={cluster.workdir}")
    assert arguments(cluster, 0)[2:] == ["--config=c", f"--workdir={cluster.workdir}", "--processes=1"]


@pytest.mark.parametrize("action, hint", [("setup", "Nothing was done."), ("start", "Nothing was started.")])
def test_a_host_that_does_not_answer_is_named_and_nothing_is_started_anywhere(action, hint, cluster):
    cluster.answer("ssh", "me@beta", {"err": "ssh: connect to host beta port 22: Connection timed out\n", "code": 255})
    done = cluster.reachable().go(action)
    assert done.returncode == 1 and "[me@beta] ssh: connect to host beta port 22: Connection timed out" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "failed on me@beta;" in last and hint in last and "alpha" not in last
    assert not cluster.calls("ssh", "node.sh (start|setup)")
    call = cluster.calls("ssh")[0]
    assert {"BatchMode=yes", "ConnectTimeout=15"} <= set(call["words"])  # neither a password nor for ever


def test_a_start_that_fails_on_one_host_is_undone_on_the_others(cluster):
    toy_project.plan(cluster.workdir, "wait")
    cluster.answer("ssh", "me@beta .*node.sh start", {"err": "Read-only file system\n", "code": 1})
    done = cluster.reachable().go("start")
    assert done.returncode == 1 and "did not start on me@beta, and was stopped on the others" in done.stderr
    assert (cluster.workdir / "logs" / "host-0.log").exists()
    # Its attendant may still ask whether the run made all its steps.
    until(lambda: subprocess.run(["pgrep", "-f", f"workdir=?{cluster.workdir}"], stdout=subprocess.PIPE).returncode == 1, PATIENCE)


def test_a_run_that_does_not_end_on_another_host_is_named(cluster):
    toy_project.plan(cluster.workdir, "finish")
    cluster.answer("ssh", "me@beta .*node.sh start", {"code": 1})
    cluster.answer("ssh", "alpha .*node.sh stop", {"err": "Error: owt does not end within 60 s\n", "code": 1})
    done = cluster.reachable().go("start")
    assert done.returncode == 1 and "did not start on me@beta, and does not end on alpha; delete ends it." in done.stderr


def test_a_watch_starts_again_what_died_and_not_what_was_stopped_by_hand(cluster):
    toy_project.plan(cluster.workdir, "exit 1")
    cluster.reachable().go("start")
    logs = [cluster.workdir / "logs" / f"host-{i}.log" for i in range(2)]
    until(lambda: all(starts(log) == 1 for log in logs), PATIENCE)
    toy_project.plan(cluster.workdir, "wait")
    process = cluster.start("ssh.sh", "follow", *HOSTS, "--config=c", f"--workdir={cluster.workdir}", "--watch")
    until(lambda: any(starts(log) == 2 for log in logs), PATIENCE)  # the other host's may be under way
    assert cluster.go("delete").returncode == 0
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "ended with status 1" in err and "Restart 1 of 5" in err and "Restart 2" not in err
    assert not any(running(cluster, host) for host in ("alpha", "beta"))


def test_a_second_start_changes_nothing(cluster):
    toy_project.plan(cluster.workdir, "wait")
    cluster.reachable().go("start")
    done = cluster.go("start")
    assert done.returncode == 1 and "runs here already" in done.stderr and "Nothing was started" in done.stderr
    assert "runs already" in cluster.go("resume").stderr
    assert len(cluster.calls("ssh", "node.sh start")) == 2
    assert cluster.go("delete").returncode == 0


def test_a_secret_travels_by_standard_input_into_a_file_for_its_owner_alone(cluster):
    for host in ("alpha", "beta"):
        venv = cluster.folder / host / "softmask_jax" / "launch" / "venv.sh"
        venv.write_text("make_venv() { true; }\naccelerator() { true; }\ntested_versions() { true; }\n")
    secret = "hf_it's; a $(secret)"
    done = cluster.reachable().go("setup", "--secret=HF_TOKEN", "--repo=/nowhere/x.git", HF_TOKEN=secret)
    assert done.returncode == 1 and "Bringing the code failed" in done.stderr  # there is no such repository
    assert secret not in cluster.everything()
    for host in ("alpha", "beta"):
        path = cluster.folder / host / ".softmask_jax" / "secrets"
        assert path.stat().st_mode & 0o777 == 0o600
        shell = f". {path}; printf %s \"$HF_TOKEN\""
        assert subprocess.run(["sh", "-c", shell], capture_output=True, text=True).stdout == secret


def test_the_code_may_come_from_a_repository_and_is_renewed_by_another_setup(cluster):
    repo = toy_project.make(cluster.folder / "a repository")
    (repo / "launch" / "venv.sh").write_text("make_venv() { true; }\ntested_versions() { true; }\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(repo)]
    for host in ("alpha", "beta"):
        shutil.rmtree(cluster.folder / host / "softmask_jax")
    for number in (1, 2):
        (repo / "launch" / "version").write_text(str(number))
        for words in (["init", "-q"], ["add", "launch", "toy.py"], ["commit", "-q", "-m", "x"]):
            subprocess.run([*git, *words], check=True)
        done = cluster.reachable().go("setup", f"--repo={repo}", "--extras=chat", PYTHON=sys.executable)
        assert done.returncode == 0 and done.stderr.count("Ready:") == 2, done.stderr
        for host in ("alpha", "beta"):
            assert (cluster.folder / host / "softmask_jax" / "launch" / "version").read_text() == str(number)


def test_hosts_may_stand_in_a_file(cluster):
    (cluster.folder / "hosts").write_text("# ours\nalpha\n\n  me@beta  # the fast one\n")
    done = cluster.run("ssh.sh", "delete", "--name=owt", f"--hosts-file={cluster.folder}/hosts")
    assert done.returncode == 0 and sorted(call["words"][-2] for call in cluster.calls("ssh")) == ["alpha", "me@beta"]


@pytest.mark.full
def test_two_hosts_are_set_up_and_train_for_real(tmp_path):
    """The code is packed, unpacked in each home, and trains as two processes that find each other."""
    world, workdir = World(tmp_path), tmp_path / "shared" / "run"
    world.answer("ssh", "", {"local": True})
    for host in ("alpha", "beta"):
        venv = tmp_path / host / "softmask_jax" / ".venv"
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").write_text(f'#!/bin/sh\nexport PYTHONPATH="$PWD"\nexec {sys.executable} "$@"\n')
        (venv / "bin" / "python").chmod(0o755)
        (venv / ".installed-chat").touch()  # what it needs is installed
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    words = ["--name=tiny", "--hosts=alpha,beta", "--coordinator=localhost", f"--port={port}", "--extras=chat", "--poll=1",
             "--config=configs/stdlib.py:smoke", f"--workdir={workdir}"]  # fmt: skip
    base = {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ONE_DEVICE}
    done = world.run("ssh.sh", "setup", *words, **base)
    assert done.returncode == 0 and done.stderr.count("Ready:") == 2, done.stderr
    assert (tmp_path / "alpha" / "softmask_jax" / "softmask_jax" / "main.py").exists()
    done = world.run("ssh.sh", "start", *words, "--", "--config.train.steps=8", **base)
    assert done.returncode == 0, done.stderr
    process = world.start("ssh.sh", "follow", *words, **base)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    assert "Finished at step 8." in err and "Validation perplexity per token after 8 steps" in out
    assert json.loads((workdir / "summary.json").read_text())["step"] == 8
    assert sorted(path.name for path in (workdir / "logs").iterdir()) == ["host-0.log", "host-1.log"]
    # Once more with more steps: it goes on from there.
    assert world.run("ssh.sh", "resume", *words, "--", "--config.train.steps=10", **base).returncode == 0
    process = world.start("ssh.sh", "follow", *words, **base)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and "Finished at step 10." in err, out + err
