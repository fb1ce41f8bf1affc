"""launch/tpu.sh beside a Google Cloud that refuses, preempts and falls silent."""
import os
import signal
import subprocess
import time

import pytest

from tests.launch.world import World, value

PLACE = ["--name=dream", "--project=my-project", "--zone=us-west4-a", "--type=v5litepod-16", "--nfs=10.0.0.2:/share",
         "--poll=0"]  # fmt: skip
RUN = ["--config=configs/dream7b.py", "--workdir=/shared/runs/dream"]
NOT_FOUND = {"err": "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found\n", "code": 1}
STATE = "queued-resources describe .*state.state"


def says(*states: str) -> list[dict]:
    return [NOT_FOUND if state == "NONE" else {"out": f"{state}\n"} for state in states]


def status(text: str) -> dict:
    return {"out": f"softmask_jax {text}\n"}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def steps(world) -> list[str]:
    """What was asked of Google, in order, without the looks."""
    names = {
        "queued-resources create": "create", "queued-resources delete": "delete", "node.sh setup": "setup",
        "node.sh start": "start", "node.sh stop": "stop", "node.sh follow": "follow",
    }  # fmt: skip
    found = []
    for call in world.calls("gcloud"):
        found += [name for part, name in names.items() if part in " ".join(call["words"])]
    return found


def test_create_asks_for_what_was_wanted_and_waits_until_it_is_there(world):
    world.answer("gcloud", STATE, *says("NONE", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"))
    done = world.run("tpu.sh", "create", *PLACE, "--spot", "--network=lan")
    assert done.returncode == 0, done.stderr
    (call,) = world.calls("gcloud", "queued-resources create")
    assert {"dream", "--node-id=dream", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite",
            "--spot", "--project=my-project", "--zone=us-west4-a", "--network=lan"} <= set(call["words"])  # fmt: skip
    assert done.stderr.split() == "dream: ACCEPTED dream: WAITING_FOR_RESOURCES dream: PROVISIONING dream: ACTIVE".split()


@pytest.mark.parametrize(
    "kind, runtime",
    [("v6e-8", "v2-alpha-tpuv6e"), ("v5p-8", "v2-alpha-tpuv5"), ("v5litepod-1", "v2-alpha-tpuv5-lite"), ("v4-8", "tpu-ubuntu2204-base")],
)
def test_each_kind_of_tpu_gets_its_software_and_a_single_host_may_have_a_disk(kind, runtime, world):
    world.answer("gcloud", STATE, *says("NONE", "ACTIVE"))
    done = world.run("tpu.sh", "create", *PLACE[:3], f"--type={kind}", "--disk=d", "--poll=0")
    assert done.returncode == 0, done.stderr
    (call,) = world.calls("gcloud", "queued-resources create")
    assert value(call, "--runtime-version") == runtime
    assert value(call, "--data-disk") == "source=projects/my-project/zones/us-west4-a/disks/d,mode=read-write"


def test_without_quota_nothing_is_left_behind_and_one_line_says_so(world):
    world.answer("gcloud", STATE, *says("NONE"))
    world.answer("gcloud", "queued-resources create", {"err": "ERROR: Quota 'TPUV5sLitepodPerProject' exceeded. Limit: 0\n", "code": 1})
    done = world.run("tpu.sh", "create", *PLACE, "--spot")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: no quota for v5litepod-16 (spot) in us-west4-a; nothing was created.")
    assert "Limit: 0" in done.stderr  # Google's own words too
    assert steps(world) == ["create"]


def test_any_other_refusal_is_shown_as_gcloud_says_it(world):
    world.answer("gcloud", STATE, *says("NONE"))
    world.answer("gcloud", "queued-resources create", {"err": "ERROR: PERMISSION_DENIED: TPU API disabled\n", "code": 1})
    done = world.run("tpu.sh", "create", *PLACE)
    assert done.returncode == 1 and "TPU API disabled" in done.stderr and "was not created" in done.stderr


def test_a_spot_tpu_that_is_never_granted_ends_the_wait_and_the_request_is_named(world):
    world.answer("gcloud", STATE, *says("NONE", "WAITING_FOR_RESOURCES"))
    done = world.run("tpu.sh", "create", *PLACE, "--spot", "--wait=0")
    assert done.returncode == 1
    assert "no TPU within 0 s (WAITING_FOR_RESOURCES). The request stands in the queue" in done.stderr
    # Again: nothing is asked for twice, it only waits on.
    done = world.run("tpu.sh", "create", *PLACE, "--spot", "--wait=0")
    assert done.returncode == 1 and steps(world) == ["create"]


def test_a_request_that_failed_says_why_and_that_it_still_stands(world):
    world.answer("gcloud", STATE, *says("NONE", "PROVISIONING", "FAILED"))
    world.answer("gcloud", "failedData", {"out": "no capacity of this kind\n"})
    done = world.run("tpu.sh", "create", *PLACE)
    assert done.returncode == 1 and "the request failed: no capacity of this kind. It still stands there" in done.stderr


def test_setup_brings_secrets_and_code_to_all_hosts_and_leaves_nothing_here(world):
    secret = "hf_it's; a \"secret\" $x"
    done = world.run("tpu.sh", "setup", *PLACE, "--secret=HF_TOKEN", "--secret=WANDB_API_KEY", HF_TOKEN=secret, WANDB_API_KEY="w")
    assert done.returncode == 0, done.stderr
    first, second = world.calls("gcloud", "tpu-vm scp")
    ((path, file),) = first["files"].items()
    assert file["mode"] == "0o600" and value(first, "--worker") == "all"
    assert not os.path.exists(path) and not os.path.exists(os.path.dirname(path))
    shell = "set -a; . /dev/stdin; printf '%s|%s' \"$HF_TOKEN\" \"$WANDB_API_KEY\""
    assert subprocess.run(["bash", "-c", shell], input=file["text"], capture_output=True, text=True).stdout == f"{secret}|w"
    assert "dream:softmask_jax-code.tgz" in second["words"]
    (moved,) = world.calls("gcloud", "softmask_jax-secrets &&")
    assert "chmod 600" in value(moved, "--command")
    (made,) = world.calls("gcloud", "node.sh setup")
    assert value(made, "--worker") == "all"
    assert "--extras=tpu,chat,hf,hub --nfs=10.0.0.2:/share --mount=/shared" in value(made, "--command")


def test_code_may_come_from_a_repository(world):
    done = world.run("tpu.sh", "setup", *PLACE, "--repo=https://example.org/x.git", "--ref=v1")
    assert done.returncode == 0 and not world.calls("gcloud", "tpu-vm scp")
    (made,) = world.calls("gcloud", "node.sh setup")
    assert "fetch -q --depth 1 https://example.org/x.git v1" in value(made, "--command")


def test_a_host_on_which_setup_fails_is_named(world):
    world.answer("gcloud", "worker=all .*node.sh setup", {"err": "No space left on device\n", "code": 1})
    world.answer("gcloud", "networkEndpoints", {"out": "10.0.0.1;10.0.0.2;10.0.0.3\n"})
    world.answer("gcloud", "worker=1 .*node.sh setup", {"code": 1})
    done = world.run("tpu.sh", "setup", *PLACE)
    assert done.returncode == 1 and "No space left" in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "Error: Setup failed on host 1 of dream; its lines are above. The TPU is there and costs: setup again, or delete."
    )


def test_a_host_that_does_not_answer_is_named_and_nothing_is_started(world):
    world.answer("gcloud", "worker=all .*node.sh check", {"err": "ssh: connect to host: Connection timed out\n", "code": 255})
    world.answer("gcloud", "networkEndpoints", {"out": "10.0.0.1;10.0.0.2\n"})
    world.answer("gcloud", "worker=1 .*node.sh check", {"code": 255})
    done = world.run("tpu.sh", "start", *PLACE, *RUN)
    assert done.returncode == 1 and "failed on host 1 of dream" in done.stderr and "Nothing was started" in done.stderr
    assert steps(world) == []


def test_a_start_that_fails_on_one_host_is_stopped_on_the_others(world):
    world.answer("gcloud", "node.sh start", {"code": 1})
    done = world.run("tpu.sh", "start", *PLACE, *RUN)
    assert done.returncode == 1 and "did not start on all hosts, and was stopped on the others" in done.stderr
    assert steps(world) == ["start", "stop"]


def test_start_runs_the_supervisor_s_words_on_all_hosts(world):
    done = world.run("tpu.sh", "start", *PLACE, *RUN, "--", "--restarts=7", "--config.train.steps=10")
    assert done.returncode == 0, done.stderr
    (call,) = world.calls("gcloud", "node.sh start")
    assert value(call, "--worker") == "all"
    assert value(call, "--command").endswith(
        "-- --config=configs/dream7b.py --workdir=/shared/runs/dream --restarts=7 --config.train.steps=10"
    )


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
    assert done.returncode == code and part in done.stderr and steps(world) == []


def test_a_run_that_is_preempted_in_the_middle_comes_back_and_finishes(world):
    world.answer("gcloud", STATE, *says(
        "ACTIVE", "SUSPENDING",  # while it runs
        "SUSPENDED", "NONE", "WAITING_FOR_RESOURCES", "ACTIVE",  # resume: what it finds; create again, waiting
        "ACTIVE",
    ))  # fmt: skip
    world.answer("gcloud", "node.sh status", status("running - 100 no"), status("running - 100 no"),
                 status("ended 0 300 yes"))  # fmt: skip
    done = world.run("tpu.sh", "follow", *PLACE, *RUN, "--spot", "--watch", "--secret=HF_TOKEN", "--", "--restarts=7", HF_TOKEN="t")
    assert done.returncode == 0, done.stderr
    assert "The machines of dream are gone (SUSPENDING). Restart 1 of 5" in done.stderr and "Finished at step 300" in done.stderr
    assert steps(world) == ["follow", "delete", "create", "setup", "start", "follow"]
    (deleted,) = world.calls("gcloud", "queued-resources delete")
    assert "--force" in deleted["words"]
    (started,) = world.calls("gcloud", "node.sh start")
    assert "--workdir=/shared/runs/dream" in value(started, "--command") and "--restarts=7" in value(started, "--command")
    assert "--spot" in world.calls("gcloud", "queued-resources create")[0]["words"]
    assert len(world.calls("gcloud", "softmask_jax-secrets &&")) == 1  # a new machine needs them anew


def test_a_watch_restarts_a_run_on_machines_that_are_there_without_a_new_setup(world):
    world.answer("gcloud", STATE, *says("ACTIVE"))
    world.answer("gcloud", "node.sh status", status("running - 5 no"), status("ended 1 9 no"), status("ended 1 9 no"),
                 status("running - 9 no"), status("ended 0 20 yes"))  # fmt: skip
    done = world.run("tpu.sh", "follow", *PLACE, *RUN, "--watch")
    assert done.returncode == 0, done.stderr
    assert steps(world) == ["follow", "stop", "start", "follow"]


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
    assert done.returncode == code and steps(world) == []


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


def test_delete_saves_the_run_first_gives_the_tpu_back_and_says_what_stays(world):
    world.answer("gcloud", STATE, *says("ACTIVE"))
    done = world.run("tpu.sh", "delete", *PLACE)
    assert done.returncode == 0 and steps(world) == ["stop", "delete"]
    assert "The file share 10.0.0.2:/share stays and costs." in done.stderr


def test_delete_goes_on_where_the_host_is_silent_and_tells_when_it_failed(world):
    world.answer("gcloud", STATE, *says("ACTIVE"))
    world.answer("gcloud", "node.sh stop", {"code": 255})
    world.answer("gcloud", "queued-resources delete", {"code": 1})
    done = world.run("tpu.sh", "delete", *PLACE)
    assert done.returncode == 1 and "was not deleted and may still cost" in done.stderr
    world.rules[0]["answers"] = [NOT_FOUND]
    done = world.run("tpu.sh", "delete", *PLACE)
    assert done.returncode == 0 and "nothing to delete" in done.stderr


def test_ctrl_c_while_waiting_ends_nothing_on_the_other_side_and_says_so(world):
    world.answer("gcloud", STATE, *says("WAITING_FOR_RESOURCES"))
    process = world.start("tpu.sh", "create", *PLACE[:-1], "--poll=60")
    deadline = time.monotonic() + 60
    while not world.calls("gcloud") and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted here only" in err and steps(world) == []


def test_fetch_copies_a_folder_from_the_first_host(world):
    done = world.run("tpu.sh", "fetch", *PLACE, "--from=/shared/adapters/a b", "--to=adapters")
    (call,) = world.calls("gcloud", "tpu-vm scp")
    assert done.returncode == 0 and call["words"][-3:] == ["--recurse", "dream:/shared/adapters/a b", "adapters"]
