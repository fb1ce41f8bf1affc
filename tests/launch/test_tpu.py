"""launch/tpu.sh beside a Google Cloud that refuses, fails on a host and falls silent."""
import os
import signal
import subprocess
import time

import pytest

from tests.launch.cloud import ACCOUNT, NOT_FOUND, PLACE, RUN, STATE, says, steps
from tests.launch.world import World, value


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_create_asks_for_what_was_wanted_and_waits_until_it_is_there(world):
    world.answer("gcloud", STATE, *says("NONE", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"))
    world.answer("gcloud", "get-iam-policy", {"out": f"{ACCOUNT},roles/storage.objectAdmin\n"})
    world.answer("gcloud", "projects describe", {"out": "123\n"})
    done = world.run("tpu.sh", "create", *PLACE, "--spot", "--network=lan")
    assert done.returncode == 0, done.stderr
    (call,) = world.calls("gcloud", "queued-resources create")
    assert {"dream", "--node-id=dream", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite",
            "--spot", "--project=my-project", "--zone=us-west4-a", "--network=lan"} <= set(call["words"])  # fmt: skip
    assert done.stderr.split() == "dream: ACCEPTED dream: WAITING_FOR_RESOURCES dream: PROVISIONING dream: ACTIVE".split()


@pytest.mark.parametrize(
    "kind, runtime",
    [
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v5litepod-1", "v2-alpha-tpuv5-lite"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
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
    refusal = "ERROR: Quota 'TPUV5sLitepodPerProject' exceeded. Limit: 0\n"
    world.answer("gcloud", "queued-resources create", {"err": refusal, "code": 1})
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


def test_without_a_login_gcloud_s_reason_is_shown_at_once_and_nothing_is_waited_for(world):
    refusal = "ERROR: (gcloud.x) You do not currently have an active account selected.\nPlease run:\n\nto use.\n"
    world.answer("gcloud", STATE, {"err": refusal, "code": 1})
    done = world.run("tpu.sh", "create", *PLACE)
    said = done.stderr.splitlines()
    assert done.returncode == 1 and "active account" in said[0] and "cannot be asked" in said[-1]
    assert steps(world) == [] and len(world.calls()) == 6


def test_a_moment_of_silence_while_waiting_is_no_end(world):
    silence = {"err": "ERROR: connection reset\n", "code": 1}
    world.answer("gcloud", STATE, silence, *says("NONE", "ACCEPTED"), silence, silence, *says("ACTIVE"))
    done = world.run("tpu.sh", "create", *PLACE)
    assert done.returncode == 0 and steps(world) == ["create"] and "connection reset" in done.stderr


def test_a_request_that_failed_says_why_and_that_it_still_stands(world):
    world.answer("gcloud", STATE, *says("NONE", "PROVISIONING", "FAILED"))
    world.answer("gcloud", "failedData", {"out": "no capacity of this kind\n"})
    done = world.run("tpu.sh", "create", *PLACE)
    assert done.returncode == 1 and "the request failed: no capacity of this kind. It still stands there" in done.stderr


def test_setup_brings_secrets_and_code_to_all_hosts_and_leaves_nothing_here(world):
    secret = "hf_it's; a \"secret\" $x"
    names = ["--secret=HF_TOKEN", "--secret=WANDB_API_KEY"]
    done = world.run("tpu.sh", "setup", *PLACE, *names, HF_TOKEN=secret, WANDB_API_KEY="w")
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
    assert "--extras=tpu,chat,hf,hub,gcs --bucket=gs://my-bucket" in value(made, "--command")


def test_setup_mounts_a_share_or_a_disk_where_that_is_the_folder(world):
    for kind, mounts in ((["--nfs=10.0.0.2:/share"], "--nfs=10.0.0.2:/share --mount=/shared"),
                         (["--disk=d", "--type=v5litepod-8", "--mount=/data"], "--disk --mount=/data")):  # fmt: skip
        done = world.run("tpu.sh", "setup", *PLACE[:4], *kind)
        assert done.returncode == 0 and not done.stderr
        assert value(world.calls("gcloud", "node.sh setup")[-1], "--command").endswith(f"--extras=tpu,chat,hf,hub {mounts}")


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
    silence = {"err": "ssh: connect to host: Connection timed out\n", "code": 255}
    world.answer("gcloud", "worker=all .*node.sh check", silence)
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
        "-- --config=configs/dream7b.py --workdir=gs://my-bucket/runs/dream --restarts=7 --config.train.steps=10"
    )


def test_delete_saves_the_run_first_gives_the_tpu_back_and_says_what_stays(world):
    world.answer("gcloud", STATE, *says("ACTIVE"))
    done = world.run("tpu.sh", "delete", *PLACE)
    assert done.returncode == 0 and steps(world) == ["stop", "delete"]
    assert "What is in gs://my-bucket stays and costs." in done.stderr


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


def test_ctrl_c_while_a_secret_is_copied_leaves_no_file_of_it_here(world):
    folder = world.folder / "tmp"
    folder.mkdir()
    world.answer("gcloud", "tpu-vm scp", {"sleep": 60})
    process = world.start("tpu.sh", "setup", *PLACE, "--secret=HF_TOKEN", HF_TOKEN="hf_secret", TMPDIR=str(folder))
    deadline = time.monotonic() + 60
    while not world.calls("gcloud") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [path.read_text() for path in folder.rglob("secrets")] == ["HF_TOKEN=hf_secret\n"]
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not list(folder.iterdir())
    assert err.splitlines()[-1] == "Interrupted: 'setup' of dream may be half done elsewhere; give it again to complete it."


def test_without_a_temporary_folder_one_line_says_so_and_nothing_is_copied(world):
    done = world.run("tpu.sh", "setup", *PLACE, TMPDIR="/nowhere")
    assert done.returncode == 1 and done.stderr.startswith("Error: no temporary folder") and not world.calls()


def test_fetch_copies_a_folder_from_the_first_host(world):
    done = world.run("tpu.sh", "fetch", *PLACE, "--from=/shared/adapters/a b", "--to=adapters")
    (call,) = world.calls("gcloud", "tpu-vm scp")
    assert done.returncode == 0 and call["words"][4:7] == ["dream:/shared/adapters/a b", "adapters", "--recurse"]
