"""A run whose folder is in a bucket: killed processes, started again, end with the bits of an undisturbed local run; and
every command that reads a run reads it there."""
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softmask_jax.benchmarks.emulator import DROP, DROP_ANSWER
from softmask_jax.convert import tiny_dream
from softmask_jax.io import goodput
from softmask_jax.io.paths import to_path
from tests.evaluate.test_evaluate import numbers
from tests.helpers import tiny_run
from tests.helpers.host_processes import free_port
from tests.helpers.tiny_run import assert_identical, assert_rows_are_unique, rows
from tests.helpers.waiting import until
from tests.helpers.xla_flags import ONE_DEVICE

pytestmark = pytest.mark.full

ROOT = Path(__file__).parent.parent.parent
STEPS, MOMENTS = 12, 10

# Dies at its first argument, a named point of the second save of this process, then runs `main`.
AT_POINT = """
import os, signal, sys
from orbax.checkpoint._src.handlers.standard_checkpoint_handler import StandardCheckpointHandler
from orbax.checkpoint._src.path import async_path
from softmask_jax import main
from softmask_jax.io import checkpoint, paths, step_folders, tree_files

saves = []

def die():
    if len(saves) > 1:
        os.kill(os.getpid(), signal.SIGKILL)

def at(owner, name, after=False, when=lambda *a: True):
    original = getattr(owner, name)
    def patched(*args, **kwargs):
        if when(*args) and not after:
            die()
        result = original(*args, **kwargs)
        if when(*args) and after:
            die()
        return result
    setattr(owner, name, patched)

commits = lambda path, *a: path.name == "commit_success.txt" and path.parent.name.isdigit()
is_step = lambda path, *a, **k: path.name.isdigit()
POINTS = {
    "before_data": lambda: at(StandardCheckpointHandler, "async_save"),
    "after_data": lambda: at(StandardCheckpointHandler, "finalize"),
    "before_checksums": lambda: at(tree_files, "write_checksums"),
    "after_checksums": lambda: at(tree_files, "write_checksums", after=True),
    "before_commit": lambda: at(paths.BucketPath, "write_bytes", when=commits),
    "after_commit": lambda: at(paths.BucketPath, "write_bytes", after=True, when=commits),
    "before_deletion": lambda: at(step_folders.BucketSteps, "discard"),
    "during_deletion": lambda: at(paths.BucketPath, "rmtree", when=is_step),
    "after_deletion": lambda: at(step_folders.BucketSteps, "discard", after=True),
}
POINTS[sys.argv[1]]()
save = checkpoint.Checkpoints.save
def counted(self, step, *args, **kwargs):
    self.wait()
    saves.append(step)
    return save(self, step, *args, **kwargs)
checkpoint.Checkpoints.save = counted
sys.exit(main.main(sys.argv[2:]))
"""
POINTS = (
    "before_data", "after_data", "before_checksums", "after_checksums", "before_commit", "after_commit",
    "before_deletion", "during_deletion", "after_deletion",
)  # fmt: skip


class Home:
    def __init__(self, folder: Path):
        self.folder = folder
        tiny_run.write_texts(folder / "texts")
        changed = dict(
            train__steps=STEPS, train__log_every=1, checkpoint__every=2, checkpoint__keep=1, eval__every=6, sample__count=1
        )
        self.config = tiny_run.write_config(folder / "tiny.py", tiny_run.settings(folder, **changed))

    def start(self, workdir, *program: str) -> subprocess.Popen:
        return self.command(*(program or ("-m", "softmask_jax.main")), "--config", self.config, "--workdir", workdir)

    def command(self, *words) -> subprocess.Popen:
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_DEVICE, "PYTHONPATH": str(ROOT),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        words = [sys.executable, *map(str, words)]
        return subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder, env=environment
        )

    def run(self, *words) -> str:
        """Standard output of a command that succeeds."""
        child = self.command("-m", *words)
        output, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors
        return output

    def complete(self, workdir):
        child = self.start(workdir)
        output, errors = child.communicate(timeout=300)
        assert child.returncode == 0 and "Validation perplexity per token" in output, errors
        return workdir

    def assert_as_undisturbed(self, run) -> None:
        undisturbed = self.folder / "undisturbed"
        assert_identical(run, undisturbed, STEPS)
        assert rows(run) == rows(undisturbed)
        assert_rows_are_unique(run)
        assert tiny_run.summary(run) == tiny_run.summary(undisturbed)
        account = goodput.read(run)
        assert account.finished and math.isclose(account.wall, account.seen - account.since, abs_tol=1e-3)
        names = [{path.name for path in (folder / "checkpoints").iterdir()} for folder in (run, undisturbed)]
        assert names[0] == names[1]


@pytest.fixture(scope="module")
def home(emulator, tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("bucket"))
    home.complete(home.folder / "undisturbed")
    return home


@pytest.fixture(scope="module")
def trained(home):
    """A run that was not disturbed."""
    return home.complete(to_path("gs://runs/trained"))


def test_a_run_in_a_bucket_is_that_of_a_disk(home, trained, emulator):
    home.assert_as_undisturbed(trained)
    assert {path.name for path in (trained / "tensorboard").iterdir()}
    assert len(tiny_run.events(trained)["train/loss"]) == STEPS
    assert "is done (12 steps)" in home.run("softmask_jax.main", "--config", home.config, "--workdir", trained)
    assert (trained / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_kills_at_random_moments_change_no_bit(home, trained, bucket):
    moments, started = random.Random(0), time.monotonic()
    home.complete(bucket / "timed")
    seconds = time.monotonic() - started
    for number in range(MOMENTS):
        child = home.start(bucket / "run")
        if number % 2:
            child.stdout.readline()  # it has been built and restored, and trains
        time.sleep(moments.uniform(0, seconds / 2))
        child.kill()
        child.communicate()
    home.assert_as_undisturbed(home.complete(bucket / "run"))


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_a_named_point_of_a_save_changes_no_bit(home, bucket, point):
    child = home.start(bucket / point, "-c", AT_POINT, point)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == -9, errors
    home.assert_as_undisturbed(home.complete(bucket / point))


def test_a_bad_network_changes_no_bit(home, emulator, bucket):
    random_ = random.Random(1)
    faults = [429, 503, DROP, DROP_ANSWER, 0.3]
    emulator.faults = lambda method, path: random_.choice(faults) if random_.random() < 0.02 else None
    home.complete(bucket / "run")
    emulator.faults = lambda method, path: None
    home.assert_as_undisturbed(bucket / "run")


def test_a_supervised_run_is_started_again(home, bucket):
    child = home.start(bucket / "run", "-m", "softmask_jax.supervise", "--back_off=0.1")
    while not (bucket / "run" / "checkpoints" / "2" / "commit_success.txt").exists():
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.1)
    holder = max((bucket / "run" / ".lock").iterdir(), key=lambda path: int(path.name))
    os.kill(json.loads(holder.read_text())["pid"], 9)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 0 and "killed by SIGKILL" in errors, errors
    home.assert_as_undisturbed(bucket / "run")


def test_two_hosts_meet_and_train_in_a_bucket(home, bucket):
    words = "-m", "softmask_jax.supervise", f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--profile=3:5"
    children = [home.start(bucket / "run", *words, f"--process={number}") for number in range(2)]
    ends = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], ends
    assert_rows_are_unique(bucket / "run")
    assert [row["step"] for row in rows(bucket / "run", "train")] == list(range(1, STEPS + 1))
    assert any(name.endswith(".xplane.pb") for name in (bucket / "run" / "profile").objects())


def test_every_reader_reads_it_there(home, trained, bucket):
    assert str(bucket / "page.html") in home.run("softmask_jax.report", trained, "--out", bucket / "page.html")
    home.run("softmask_jax.evaluate.compare", home.folder / "undisturbed", trained, "--draws=1", "--out=compare.html")
    prompts = bucket / "prompts.txt"
    prompts.write_text("mask token\nnoise\n")
    words = ("softmask_jax.generate", "--checkpoint", trained, "--prompts", prompts, "--out", bucket / "answers.jsonl")
    home.run(*words, "--steps=2", "--max_new_tokens=4")
    assert len((bucket / "answers.jsonl").read_text().splitlines()) == 2
    home.run("softmask_jax.convert", "--src", trained, "--dst", bucket / "model", "--to=orbax", "--verify")
    source = f"--config.init.checkpoint={bucket / 'model'}"
    home.run("softmask_jax.main", "--config", home.config, "--workdir", bucket / "next", "--config.train.steps=1", source)
    source = f"--config.init.checkpoint={trained}"
    home.run("softmask_jax.main", "--config", home.config, "--workdir", bucket / "last", "--config.train.steps=1", source)


def test_an_evaluation_in_a_bucket_is_killed_and_ends_with_the_numbers_of_one_on_a_disk(home, trained, bucket):
    words = "softmask_jax.evaluate", "--tasks=perplexity; humaneval", f"--checkpoint=soft={trained}", "--config.code.limit=3"
    words += "--config.code.max_new_tokens=6", "--config.code.steps=4", "--config.code.batch_size=1"
    out = bucket / "evaluation"
    child = home.command("-m", *words, "--out", out)
    until(lambda: child.poll() is not None or any("humaneval" in name and "json" in name for name in out.objects()), 300)
    child.kill()
    assert child.wait() == -9, child.communicate()
    assert not (out / "results.json").exists()
    for folder in (out, home.folder / "evaluation"):
        assert "perplexity" in home.run(*words, "--out", folder)
    ours, theirs = (json.loads((folder / "results.json").read_text("utf-8")) for folder in (out, home.folder / "evaluation"))
    assert ours["results"] and numbers(ours) == numbers(theirs)
    assert (out / "results.md").read_text("utf-8").startswith("#")


def test_dream_is_fine_tuned_on_a_base_in_a_bucket(home, bucket, tmp_path):
    tiny_dream.make(tmp_path, conversations=20)
    settings = [f"--config.data.paths=jsonl:{tmp_path / 'chats.jsonl'}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    settings += ["--config.train.steps=2", "--config.train.global_batch_size=2", "--config.train.micro_batches=1"]
    answers = []
    for folder in (tmp_path, bucket):
        home.run("softmask_jax.convert", "--src", tmp_path / "hf", "--dst", folder / "model", "--verify")
        words = ["--config", f"{ROOT / 'configs' / 'dream7b.py'}:smoke", f"--config.model.base={folder / 'model'}"]
        home.run("softmask_jax.main", *words, *settings, "--workdir", folder / "run")
        words = ["--checkpoint", folder / "run", "--prompt=What is 2 + 3?", "--out", folder / "answers.jsonl"]
        home.run("softmask_jax.generate", *words, "--chat", "--steps=2", "--max_new_tokens=4")
        answers.append([json.loads(line)["tokens"] for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()])
    ours, theirs = (tiny_run.arrays(folder / "run", 2) for folder in (bucket, tmp_path))
    assert {name: x.tobytes() for name, x in ours.items()} == {name: x.tobytes() for name, x in theirs.items()}
    assert answers[0] == answers[1] and answers[0]
