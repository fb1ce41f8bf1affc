"""launch/tpu.sh follows a run: to its end, through preemptions, until restarts bring nothing."""
import os
import signal
import time
from pathlib import Path

import pytest

from tests.launch.cloud import PLACE, RUN, STATE, says, status, steps
from tests.launch.world import ROOT, World, value


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_follow_ends_with_the_run_and_tells_how_it_ended(world):
    world.answer("gcloud", STATE, *says("ACTIVE"))
    world.answer("gcloud", "node.sh status", status("running - 100 no"), status("running - 200 no"),
                 status("ended 0 300 yes"))  # fmt: skip
    world.answer("gcloud", "node.sh follow", {"out": "step 100\n"})
    done = world.run("tpu.sh", "follow", *PLACE)
    assert done.returncode == 0 and "Finished at step 300." in done.stderr and "step 100" in done.stdout


@pytest.mark.parametrize(
    "said, code, part",
    [
        ("ended 1 40 no", 1, "ended with status 1 after step 40"),
        ("ended 2 -1 no", 2, "ended with status 2"),
        ("ended 0 40 no", 1, "Stopped and saved at step 40, not finished"),
        ("lost - 40 no", 1, "ended without a word after step 40"),
        ("absent - -1 no", 1, "was not started there"),
    ],
)
def test_follow_without_a_watch_says_how_a_run_ended_and_changes_nothing(said, code, part, world):
    world.answer("gcloud", STATE, *says("ACTIVE"))
    world.answer("gcloud", "node.sh status", status(said))
    done = world.run("tpu.sh", "follow", *PLACE)
    assert done.returncode == code and part in done.stderr and set(steps(world)) <= {"follow"}


def test_a_run_that_is_preempted_in_the_middle_comes_back_and_finishes(world):
    world.answer("gcloud", STATE, *says(
        "ACTIVE", "SUSPENDING",  # while it runs
        "SUSPENDED", "NONE", "WAITING_FOR_RESOURCES", "ACTIVE",  # resume: what it finds; create again, waiting
        "ACTIVE",
    ))  # fmt: skip
    world.answer("gcloud", "node.sh status", status("running - 100 no"), status("running - 100 no"),
                 status("ended 0 300 yes"))  # fmt: skip
    more = ["--spot", "--watch", "--secret=HF_TOKEN", "--", "--restarts=7"]
    done = world.run("tpu.sh", "follow", *PLACE, *RUN, *more, HF_TOKEN="t")
    assert done.returncode == 0, done.stderr
    assert "The machines of dream are gone (SUSPENDING). Restart 1 of 5" in done.stderr
    assert "Finished at step 300" in done.stderr
    assert steps(world) == ["follow", "delete", "create", "setup", "start", "follow"]
    (deleted,) = world.calls("gcloud", "queued-resources delete")
    assert "--force" in deleted["words"]
    (started,) = world.calls("gcloud", "node.sh start")
    assert "--workdir=gs://my-bucket/runs/dream" in value(started, "--command") and "--restarts=7" in value(started, "--command")
    assert "--spot" in world.calls("gcloud", "queued-resources create")[0]["words"]
    assert len(world.calls("gcloud", "softmask_jax-secrets &&")) == 1  # a new machine needs them anew


def test_a_watch_restarts_a_run_on_machines_that_are_there_without_a_new_setup(world):
    world.answer("gcloud", STATE, *says("ACTIVE"))
    world.answer("gcloud", "node.sh status", status("running - 5 no"), status("ended 1 9 no"), status("ended 1 9 no"),
                 status("running - 9 no"), status("ended 0 20 yes"))  # fmt: skip
    done = world.run("tpu.sh", "follow", *PLACE, *RUN, "--watch")
    assert done.returncode == 0, done.stderr
    assert steps(world) == ["follow", "stop", "start", "follow"]


def test_a_watch_brings_a_run_back_from_whatever_folder_it_was_called(world):
    world.answer("gcloud", STATE, *says("ACTIVE"))
    world.answer("gcloud", "node.sh status", status("ended 1 9 no"), status("ended 1 9 no"), status("ended 0 20 yes"))
    words = ["follow", *PLACE, *RUN, "--watch", "--extras="]
    done = world.run(Path("..") / "launch" / "tpu.sh", *words, cwd=ROOT / "tests")
    assert done.returncode == 0 and "Finished at step 20" in done.stderr, done.stderr
    assert steps(world) == ["follow", "stop", "start", "follow"]


def test_ctrl_c_while_a_watch_sets_up_anew_is_told_once(world):
    world.answer("gcloud", STATE, *says("SUSPENDED", "SUSPENDED", "NONE", "ACTIVE"))
    world.answer("gcloud", "node.sh setup", {"sleep": 60})
    process = world.start("tpu.sh", "follow", *PLACE, *RUN, "--watch", "--extras=")
    deadline = time.monotonic() + 60
    while not world.calls("gcloud", "node.sh setup") and time.monotonic() < deadline:
        time.sleep(0.05)
    (setup,) = world.calls("gcloud", "node.sh setup")
    assert "setup --extras=gcs --bucket" in value(setup, "--command")  # what was given empty stays so
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    told = [line for line in err.splitlines() if "Interrupted" in line]
    assert process.returncode == 130 and len(told) == 1 and "'resume' of dream may be half done" in told[0]


def test_a_watch_gives_up_after_restarts_that_came_no_further(world):
    world.answer("gcloud", STATE, *says("ACTIVE"))
    world.answer("gcloud", "node.sh status", status("ended 1 40 no"))
    done = world.run("tpu.sh", "follow", *PLACE, *RUN, "--watch", "--restarts=2")
    assert done.returncode == 1
    assert "Given up: 2 restarts in a row came to no newer checkpoint than step 40." in done.stderr
    assert steps(world).count("start") == 2


@pytest.mark.parametrize("code", [2, 130])
def test_a_watch_never_restarts_what_a_restart_cannot_mend(code, world):
    world.answer("gcloud", STATE, *says("ACTIVE"))
    world.answer("gcloud", "node.sh status", status(f"ended {code} 40 no"))
    done = world.run("tpu.sh", "follow", *PLACE, *RUN, "--watch")
    assert done.returncode == code and steps(world) == ["follow"]


def test_a_watch_outlives_a_setup_that_fails_on_the_new_machine(world):
    world.answer("gcloud", STATE, *says("ACTIVE", "SUSPENDED", "SUSPENDED", "NONE", "ACTIVE"))
    world.answer("gcloud", "worker=all .*node.sh setup", {"code": 1}, {})
    world.answer("gcloud", "node.sh status", status("running - 5 no"), status("absent - -1 no"), status("absent - -1 no"),
                 status("running - 5 no"), status("ended 0 9 yes"))  # fmt: skip
    done = world.run("tpu.sh", "follow", *PLACE, *RUN, "--watch")
    assert done.returncode == 0, done.stderr
    assert "Setup failed" in done.stderr and "Restart 2 of 5" in done.stderr
    assert steps(world)[-3:] == ["setup", "start", "follow"], done.stderr


def test_a_service_that_falls_silent_for_a_moment_is_asked_again(world):
    world.answer("gcloud", STATE, {"out": "ACTIVE\n"}, {"err": "ERROR: connection reset\n", "code": 1}, {"out": "ACTIVE\n"})
    world.answer("gcloud", "node.sh status", status("running - 5 no"), {"code": 255}, status("ended 0 9 yes"))
    done = world.run("tpu.sh", "follow", *PLACE)
    assert done.returncode == 0 and steps(world) == ["follow"]
    # And for ever: given up, nothing changed.
    world.rules.clear()
    for count in world.bin.glob("count-*"):
        count.unlink()
    world.answer("gcloud", STATE, {"err": "ERROR: connection reset\n", "code": 1})
    done = world.run("tpu.sh", "follow", *PLACE)
    assert done.returncode == 1 and "does not answer; nothing was changed" in done.stderr


def test_a_watch_does_not_bring_back_what_somebody_deleted(world):
    world.answer("gcloud", STATE, *says("ACTIVE", "NONE"))
    world.answer("gcloud", "node.sh status", status("running - 5 no"))
    done = world.run("tpu.sh", "follow", *PLACE, *RUN, "--watch")
    assert done.returncode == 3 and "was deleted" in done.stderr and steps(world) == ["follow"]


def test_a_watch_tries_again_where_the_new_machine_was_refused(world):
    world.answer("gcloud", STATE, *says("ACTIVE", "SUSPENDED", "SUSPENDED", "NONE"))
    world.answer("gcloud", "queued-resources create", {"err": "RESOURCE_EXHAUSTED\n", "code": 1})
    world.answer("gcloud", "node.sh status", status("running - 5 no"))
    done = world.run("tpu.sh", "follow", *PLACE, *RUN, "--watch", "--restarts=2")
    assert done.returncode == 3 and "Given up: 2 restarts in a row" in done.stderr
    assert steps(world) == ["follow", "delete", "create", "create"]


def test_resume_leaves_a_run_alone_that_goes_on(world):
    world.answer("gcloud", STATE, *says("ACTIVE"))
    world.answer("gcloud", "node.sh status", status("running - 5 no"))
    done = world.run("tpu.sh", "resume", *PLACE, *RUN)
    assert done.returncode == 0 and "runs already" in done.stderr and steps(world) == []
