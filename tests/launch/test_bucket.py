"""--bucket of launch/tpu.sh and launch/gke.sh: the run's folder in it, and a look at it before anything is created."""
import shlex

import pytest

from tests.launch.cloud import ACCOUNT
from tests.launch.world import World, value

PLACE = ["--name=dream", "--project=my-project", "--zone=us-west4-a", "--type=v5litepod-16", "--poll=0"]
SCRIPTS = ("tpu.sh", "gke.sh")
CREATED = "queued-resources create|cluster create"
OTHERS = {"tpu.sh": "--disk=d", "gke.sh": "--filestore=f"}


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    world.answer("gcloud", "projects describe", {"out": "123\n"})
    world.answer("gcloud", "state.state", {"err": "NOT_FOUND\n", "code": 1}, {"out": "ACTIVE\n"})
    return world


@pytest.mark.parametrize(
    "bucket, words, folder",
    [
        ("gs://my-bucket", ["--config=configs/dream7b.py"], "gs://my-bucket/runs/dream7b"),
        ("gs://my-bucket/me/", ["--config=configs/dream7b.py:int8"], "gs://my-bucket/me/runs/dream7b-int8"),
        ("gs://my-bucket", ["--config=configs/dream7b.py", "--workdir=runs/it's a $(b)"], "gs://my-bucket/runs/it's a $(b)"),
        ("gs://my-bucket", ["--config=configs/dream7b.py", "--workdir=gs://other/x"], "gs://other/x"),
    ],
)
def test_the_run_s_folder_is_in_the_bucket_named_as_training_names_it(bucket, words, folder, script, world):
    done = world.run(script, "start", *PLACE, f"--bucket={bucket}", *words)
    assert done.returncode == 0, done.stderr
    command = value(world.calls(having="--command=")[-1], "--command")
    assert shlex.split(command).count(f"--workdir={folder}") == 2


@pytest.mark.parametrize(
    "words, part",
    [
        (["--bucket=my-bucket"], "it is gs://BUCKET"),
        (["--bucket=gs://my bucket"], "it is gs://BUCKET"),
        (["--bucket=gs://my-bucket", "--workdir=/shared/x"], "/shared/x is not in gs://my-bucket"),
        (["--bucket=gs://my-bucket", "OTHER"], "not both"),
        (["--workdir=gs://my-bucket/x"], "needs --bucket"),
    ],
)
def test_a_folder_that_is_not_in_a_bucket_is_refused_before_anything_is_asked(words, part, script, world):
    words = [word.replace("OTHER", OTHERS[script]) for word in words]
    done = world.run(script, "create", *PLACE, *words)
    assert done.returncode == 2 and part in done.stderr and len(done.stderr.splitlines()) == 1
    assert not world.calls()


def test_where_there_is_no_bucket_nothing_is_created_and_the_command_that_makes_it_is_named(script, world):
    world.answer("gcloud", "buckets describe", {"err": "ERROR: gs://my-bucket not found: 404.\n", "code": 1})
    done = world.run(script, "create", *PLACE, "--bucket=gs://my-bucket/me")
    assert done.returncode == 1 and "404" in done.stderr and not world.calls(having=CREATED)
    assert done.stderr.rstrip().endswith(
        "gcloud storage buckets create gs://my-bucket --project=my-project --location=us-west4 --soft-delete-duration=0"
    )


def test_the_right_that_hosts_lack_is_named_before_anything_is_created(script, world):
    world.answer("gcloud", "buckets describe", {"out": "US-WEST4\n"})
    others = f"user:me@x.org,roles/storage.admin\n{ACCOUNT},roles/storage.objectViewer\n"
    world.answer("gcloud", "get-iam-policy", {"out": others})
    done = world.run(script, "create", *PLACE, "--bucket=gs://my-bucket/me")
    assert done.returncode == 0, done.stderr
    (note,) = [line for line in done.stderr.splitlines() if line.startswith("Note:")]
    assert note.endswith(
        "gcloud storage buckets add-iam-policy-binding gs://my-bucket "
        f"--member={ACCOUNT} --role=roles/storage.objectAdmin"
    )
    asked = [" ".join(call["words"]) for call in world.calls()]
    (policy,) = [index for index, words in enumerate(asked) if "get-iam-policy gs://my-bucket" in words]
    (created,) = [index for index, words in enumerate(asked) if "create" in words]
    assert policy < created


@pytest.mark.parametrize("where, noted", [("US-WEST4", False), ("US", False), ("EUROPE-WEST4", True)])
def test_a_bucket_that_may_be_written_is_only_noted_where_it_is_far_away(where, noted, script, world):
    world.answer("gcloud", "buckets describe", {"out": f"{where}\n"})
    world.answer("gcloud", "get-iam-policy", {"out": f"{ACCOUNT},roles/storage.objectAdmin\n"})
    done = world.run(script, "create", *PLACE, "--bucket=gs://my-bucket")
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if line.startswith("Note:")]
    assert bool(notes) is noted and all(f"is in {where}, the machines are in us-west4" in note for note in notes)


def test_a_watch_that_brings_machines_back_does_not_depend_on_another_look(world):
    world.answer("gcloud", "buckets describe", {"code": 1})
    done = world.run("tpu.sh", "create", *PLACE, "--bucket=gs://my-bucket", SOFTMASK_JAX_RESTART="yes")
    assert done.returncode == 0 and world.calls(having=CREATED) and not world.calls(having="storage")


def test_what_is_in_a_bucket_is_fetched_without_the_machine(world):
    done = world.run("tpu.sh", "fetch", *PLACE, "--bucket=gs://my-bucket", "--from=gs://my-bucket/a b", "--to=/x")
    assert done.returncode == 2 and "gcloud storage cp 'gs://my-bucket/a b' /x --recursive" in done.stderr
