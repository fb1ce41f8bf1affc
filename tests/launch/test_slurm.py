"""launch/slurm.sh beside a SLURM that refuses, warns, preempts and forgets; its job script is run for real."""
import os
import signal
import subprocess
import time

import pytest

from tests.launch import toy_project
from tests.launch.world import World

PATIENCE = 60
# srun: the training on one host, which gets srun's signals as the processes of a job do.
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do echo "srun $1"; shift; done
exec "$@"
"""


class Login(World):
    """A login node with a copy of the project that is set up."""

    def __init__(self, folder, **more):
        super().__init__(folder, **more)
        self.project = toy_project.make(folder / "project with a space")
        self.workdir = folder / "runs" / "a b"

    def go(self, action, *words, **more):
        script = self.project / "launch" / "slurm.sh"
        return self.run(script, action, "--name=owt", f"--workdir={self.workdir}", "--poll=0", *words, **more)

    @property
    def script(self):
        return self.workdir / "launch" / "owt.sbatch"


@pytest.fixture
def login(tmp_path):
    return Login(tmp_path)


def submitted(login, *words, **more):
    login.answer("sbatch", "", {"out": "4711;cluster\n"})
    done = login.go("start", "--config=c", "--nodes=2", "--gpus=4", "--partition=gpu", "--account=me", *words, **more)
    assert done.returncode == 0, done.stderr
    return done


def test_start_writes_a_script_and_submits_it(login):
    done = submitted(login, "--sbatch=--constraint=a100", "--", "--note=it's a $(word)")
    assert "Job 4711." in done.stderr
    lines = login.script.read_text().splitlines()
    assert {"#SBATCH --job-name=owt", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4",
            "#SBATCH --requeue", "#SBATCH --signal=B:USR1@120", "#SBATCH --export=NONE", "#SBATCH --partition=gpu",
            "#SBATCH --account=me", "#SBATCH --constraint=a100"} <= set(lines)  # fmt: skip
    first = next(i for i, line in enumerate(lines) if i and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]  # SLURM would not read them
    (call,) = login.calls("sbatch")
    assert call["words"] == ["--parsable", f"--output={login.workdir}/logs/owt.sbatch.log", str(login.script)]


def test_a_secret_lies_in_a_file_of_mode_600_that_the_job_reads(login):
    secret = "hf_it's; a $(secret)"
    submitted(login, "--secret=HF_TOKEN", HF_TOKEN=secret)
    path = login.folder / "home" / ".softmask_jax" / "secrets"
    assert path.stat().st_mode & 0o777 == 0o600
    assert secret not in login.everything() + login.script.read_text()
    toy_project.plan(login.workdir, "finish")
    code, out = job(login)
    assert code == 0 and f"token {secret}" in out


def job(login, *signals, plan="wait"):
    """The job script as SLURM runs it; signals as they come. Its status and what it printed."""
    if signals:
        toy_project.plan(login.workdir, plan)
    (login.bin / "srun").write_text(SRUN)
    environment = login.environment(SLURM_JOB_ID="4711")
    process = subprocess.Popen(
        ["bash", str(login.script)], env=environment, cwd="/", text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + PATIENCE
    while signals and not (login.workdir / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in signals:
        process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, out


def test_before_its_time_is_up_a_job_saves_and_goes_back_into_the_queue(login):
    submitted(login)
    code, out = job(login, signal.SIGUSR1)
    assert code == 0 and "Stopped and saved" in out
    assert [call["words"] for call in login.calls("scontrol")] == [["requeue", "4711"]]
    assert "srun --export=ALL" in out  # else the job's processes would have no environment


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(login):
    submitted(login)
    code, out = job(login, signal.SIGTERM)
    assert code == 0 and "Stopped and saved" in out and not login.calls("scontrol")


def test_a_finished_job_does_not_come_back_and_a_failed_one_keeps_its_status(login):
    submitted(login)
    toy_project.plan(login.workdir, "finish")
    assert job(login)[0] == 0
    toy_project.plan(login.workdir, "exit 3")
    assert job(login)[0] == 3 and not login.calls("scontrol")


def test_the_training_gets_its_words_one_by_one(login):
    submitted(login, "--", "--note=it's a $(word)")
    toy_project.plan(login.workdir, "finish")
    assert '"--note=it\'s a $(word)"' in job(login)[1]


def test_a_refusal_is_one_line_and_leaves_nothing_in_the_queue(login):
    login.answer("sbatch", "", {"err": "sbatch: error: invalid partition specified: gpu\n", "code": 1})
    done = login.go("start", "--config=c", "--partition=gpu")
    assert done.returncode == 1 and "invalid partition" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: sbatch refused the job")
    assert login.go("follow").returncode == 1  # there is no job


def test_a_job_that_is_in_the_queue_is_not_submitted_twice(login):
    login.answer("squeue", "--name=owt", {"out": "4711\n"})
    done = login.go("start", "--config=c")
    assert done.returncode == 1 and "in the queue already (job 4711)" in done.stderr and not login.calls("sbatch")


def test_without_slurm_or_an_installation_one_line_says_so(tmp_path):
    login = Login(tmp_path, without=("sbatch",))
    done = login.go("start", "--config=c")
    assert done.returncode == 1 and "Error: sbatch: command not found. Run this on a login node" in done.stderr
    (login.project / ".venv" / "bin" / "python").unlink()
    done = login.go("start", "--config=c")
    assert done.returncode == 1 and "setup comes first" in done.stderr


def test_follow_waits_for_the_job_and_says_whether_the_run_is_finished(login):
    submitted(login)
    toy_project.plan(login.workdir, "finish")
    job(login)
    login.answer("squeue", "--job=4711", {"out": "PENDING\n"}, {"out": "RUNNING\n", "sleep": 0.3}, {"out": "COMPLETED\n"})
    (login.workdir / "logs" / "owt-0.log").write_text("step 20\n")
    done = login.go("follow")
    assert done.returncode == 0 and "step 20" in done.stdout
    assert done.stderr.splitlines() == ["Job 4711: PENDING", "Job 4711: RUNNING", "Job 4711: COMPLETED", "Finished."]


def test_a_controller_that_is_busy_is_asked_again_and_no_job_is_taken_for_over(login):
    submitted(login)
    toy_project.plan(login.workdir, "finish")
    job(login)
    busy = {"err": "slurm_load_jobs error: Socket timed out on send/recv operation\n", "code": 1}
    gone = {"err": "slurm_load_jobs error: Invalid job id specified\n", "code": 1}
    login.answer("squeue", "--job=4711", {"out": "RUNNING\n"}, busy, busy, {"out": "RUNNING\n"}, gone)
    done = login.go("follow")
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["Job 4711: RUNNING", "Job 4711: not in the queue", "Finished."]
    login.rules[-1]["answers"] = [busy]
    done = login.go("follow")
    assert done.returncode == 1 and "squeue does not answer (slurm_load_jobs error: Socket timed out" in done.stderr


def test_the_lines_of_a_dry_run_pasted_into_a_shell_write_the_same_script_and_submit_it(login):
    more = ["--config=c", "--sbatch=--constraint=a100", "--sbatch=--mem=0", "--", "--note=it's a $(word)"]
    done = login.go("start", "--dry-run", *more)
    assert not login.workdir.exists() and not login.calls()
    (login.folder / "lines").write_text(done.stdout)
    assert login.run(login.folder / "lines", cwd=login.project).returncode == 0
    pasted, calls = login.script.read_text(), login.calls("sbatch")
    assert "#SBATCH --constraint=a100\n#SBATCH --mem=0\n" in pasted
    assert login.go("start", *more).returncode == 0
    assert login.script.read_text() == pasted and login.calls("sbatch") == 2 * calls


def test_follow_tells_of_a_job_that_is_over_before_the_run_is_finished(login):
    submitted(login)
    login.answer("squeue", "--job=4711", {"out": "NODE_FAIL\n"})
    done = login.go("follow")
    assert done.returncode == 1 and "not finished (NODE_FAIL)" in done.stderr
    login.answer("sbatch", "", {"out": "4712\n"})
    assert login.go("resume").returncode == 0 and len(login.calls("sbatch")) == 2  # the same script
    assert login.calls("sbatch")[0]["words"] == login.calls("sbatch")[1]["words"]


def test_delete_cancels_by_name(login):
    assert login.go("delete").returncode == 0
    assert login.calls("scancel")[0]["words"] == ["--me", "--name=owt"]
    assert os.path.exists(login.project)
