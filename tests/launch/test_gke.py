"""launch/gke.sh beside an xpk and a Kubernetes that refuse, fail and are not there."""
import pytest

from tests.launch.world import World, value

SHARED = ["--name=owt", "--project=my-project", "--zone=us-west4-a", "--type=v5litepod-16", "--poll=0"]
PLACE = [*SHARED, "--bucket=gs://my-bucket"]
RUN = ["--config=configs/mdlm_owt.py", "--workdir=runs/owt"]
JOBSET = "get jobset"


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_create_makes_a_cluster_and_attaches_the_share(world):
    done = world.run("gke.sh", "create", *SHARED, "--spot", "--filestore=softmask/models")
    assert done.returncode == 0, done.stderr
    cluster, storage = world.calls("xpk")
    assert cluster["words"] == [
        "cluster", "create", "--cluster=owt", "--project=my-project", "--zone=us-west4-a", "--tpu-type=v5litepod-16",
        "--num-slices=1", "--spot", "--enable-gcpfilestore-csi-driver",
    ]  # fmt: skip
    assert storage["words"][:3] == ["storage", "attach", "softmask"]
    assert (value(storage, "--vol"), value(storage, "--mount-point")) == ("models", "/shared")


def test_without_xpk_one_line_says_how_to_get_it(tmp_path):
    world = World(tmp_path, without=("xpk",))
    for action in ("create", "start", "resume", "delete"):
        done = world.run("gke.sh", action, *PLACE, *RUN)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: xpk: command not found. Install it: pip install xpk")
        assert len(done.stderr.splitlines()) == 1
    assert not world.calls()


def test_a_cluster_that_is_refused_may_have_left_a_part_and_nothing_more_is_tried(world):
    world.answer("xpk", "cluster create", {"err": "[XPK] Insufficient quota\n", "code": 1})
    done = world.run("gke.sh", "create", *SHARED, "--filestore=softmask")
    assert done.returncode == 1 and "Insufficient quota" in done.stderr and "A part of it may stand and cost" in done.stderr
    assert len(world.calls()) == 1


def test_a_share_that_is_refused_tells_of_the_cluster_that_stands(world):
    world.answer("xpk", "storage attach", {"code": 1})
    done = world.run("gke.sh", "create", *SHARED, "--filestore=softmask")
    assert done.returncode == 1 and "The cluster owt stands and costs" in done.stderr


def test_start_submits_the_code_and_the_words_of_the_training(world):
    words = ["--cluster=shared", "--spot", "--secret=HF_TOKEN", "--restarts=4"]
    done = world.run("gke.sh", "start", *PLACE, *RUN, *words, "--", "--note=a b", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    (call,) = world.calls("xpk")
    assert call["words"][:2] == ["workload", "create"] and "--spot" in call["words"]
    assert (value(call, "--workload"), value(call, "--cluster"), value(call, "--max-restarts")) == ("owt", "shared", "4")
    assert value(call, "--command") == (
        "bash launch/node.sh setup --extras=tpu,chat,hf,hub,gcs --bucket=gs://my-bucket && "
        "exec bash launch/node.sh attend --name=owt --workdir=gs://my-bucket/runs/owt -- "
        "--config=configs/mdlm_owt.py --workdir=gs://my-bucket/runs/owt '--note=a b'"
    )
    # The file names the variable; xpk takes the value from the environment.
    assert call["files"][value(call, "--env-file")]["text"] == "HF_TOKEN\n"
    assert value(call, "--script-dir").endswith("/code") and value(call, "--base-docker-image") == "python:3.12"


def test_what_goes_into_the_image_is_what_git_knows_and_no_more(world):
    # xpk, here: a list of what it was given.
    (world.bin / "xpk").write_text(
        '#!/bin/sh\nfor word; do\n'
        'case "$word" in --script-dir=*) cd "${word#*=}" && find . -maxdepth 2 && exit ;; esac\ndone\n'
    )
    done = world.run("gke.sh", "start", *PLACE, *RUN)
    files = set(done.stdout.split())
    assert {"./launch/node.sh", "./setup.cfg", "./README.md", "./softmask_jax/main.py", "./configs/dream7b.py"} <= files
    assert not {name for name in files if name.startswith(("./.venv", "./.git/", "./runs", "./tests"))}


def test_an_image_of_one_s_own_is_used_as_it_is(world):
    assert world.run("gke.sh", "start", *PLACE, *RUN, "--image=gcr.io/p/x:1").returncode == 0
    (call,) = world.calls("xpk")
    assert value(call, "--docker-image") == "gcr.io/p/x:1" and value(call, "--command").startswith("cd /app && exec bash")
    assert not [word for word in call["words"] if word.startswith(("--script-dir", "--base-docker-image"))]


def test_a_workload_that_is_refused_tells_of_the_cluster_that_stands(world):
    world.answer("xpk", "workload create", {"err": "[XPK] no capacity\n", "code": 1})
    done = world.run("gke.sh", "start", *PLACE, *RUN)
    assert done.returncode == 1 and "no capacity" in done.stderr and "owt stands and costs" in done.stderr


def test_follow_shows_the_first_pod_until_the_workload_is_finished(world):
    conditions = ("", "StartupPolicyCompleted", "StartupPolicyCompleted Completed")
    world.answer("kubectl", JOBSET, *({"out": text} for text in conditions))
    world.answer("kubectl", "logs", {"code": 1}, {"out": "step 5\n"})
    done = world.run("gke.sh", "follow", *PLACE)
    assert done.returncode == 0 and "Finished." in done.stderr and "step 5" in done.stdout
    # Never another cluster that kubectl happens to look at.
    assert all("--context=gke_my-project_us-west4_owt" in call["words"] for call in world.calls("kubectl"))


@pytest.mark.parametrize(
    "answer, part",
    [
        ({"out": "Failed"}, "the workload failed"),
        ({"err": 'Error from server (NotFound): jobsets "owt" not found\n', "code": 1}, "there is no workload owt"),
        ({"err": "Unable to connect to the server\n", "code": 1}, "does not answer; nothing was changed"),
    ],
)
def test_follow_says_why_it_ends(answer, part, world):
    world.answer("kubectl", JOBSET, answer)
    done = world.run("gke.sh", "follow", *PLACE)
    assert done.returncode == 1 and part in done.stderr.splitlines()[-1]


def test_resume_submits_again_in_the_same_folder(world):
    assert world.run("gke.sh", "resume", *PLACE, *RUN).returncode == 0
    removed, made = world.calls("xpk")
    assert removed["words"][:2] == ["workload", "delete"] and "--force" in removed["words"]
    assert "--workdir=gs://my-bucket/runs/owt" in value(made, "--command")


def test_delete_says_that_the_cluster_still_costs(world):
    done = world.run("gke.sh", "delete", *PLACE)
    assert done.returncode == 0 and "The cluster owt stands and costs" in done.stderr
    world.run("gke.sh", "delete", *PLACE, "--with-cluster")
    assert [call["words"][:2] for call in world.calls("xpk")] == [["workload", "delete"], ["cluster", "delete"]]
