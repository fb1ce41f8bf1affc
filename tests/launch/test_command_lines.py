"""What all launchers have in common: help, refusals, dry runs, quoting, secrets."""
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.world import PROGRAMS, ROOT, World

RUN = ["--config=configs/dream7b.py", "--workdir=/shared/runs/dream"]
PLACE = {
    "tpu.sh": ["--name=dream", "--project=my-project", "--zone=us-west4-a", "--type=v5litepod-16", "--nfs=10.0.0.2:/share"],
    "gke.sh": ["--name=dream", "--project=my-project", "--zone=us-west4-a", "--type=v5litepod-16", "--filestore=store"],
    "ssh.sh": ["--name=dream", "--hosts=node1,me@node2"],
    "slurm.sh": ["--name=dream", "--nodes=2"],
}
SCRIPTS = sorted(PLACE)
# A value for each secret that appears nowhere else.
SECRET = "hf_s3cr3t'; touch /tmp/x #"


def text_of(script: str, name: str) -> list[str]:
    """The words of all assignments to a variable."""
    found = re.findall(rf'^{name}\+?="([^"]*)"', (ROOT / "launch" / script).read_text(), re.M)
    return " ".join(found).split()


ACTIONS = [(script, action) for script in SCRIPTS for action in text_of(script, "actions")]


def words(script: str, action: str, *more: str) -> list[str]:
    """A complete command line, with further options in it."""
    extra = {"run": ["--", "python", "-c", "print('a;b')"], "fetch": ["--from=/shared/a b", "--to=here"]}
    return [action, *PLACE[script], *RUN, *more, *extra.get(action, ["--", "--restarts=5"])]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_names_every_action_and_every_option_and_shows_an_example(script, world):
    done = world.run(script, "--help")
    assert done.returncode == 0 and "Example:" in done.stdout and f"bash launch/{script}" in done.stdout
    for action in text_of(script, "actions"):
        assert re.search(rf"\b{action}\b", done.stdout), action
    for option in text_of(script, "options") + text_of(script, "switches"):
        assert f"--{option}" in done.stdout, option
    assert not world.calls()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "bad, part",
    [
        ([], "say what to do"),
        (["launch"], "there is no 'launch'"),
        (["start", "follow"], "one word too many"),
        (["start", "--nmae=x"], "no option --nmae"),
        (["start", "--name"], "--name needs a value"),
        (["start", "--dry-run=no"], "--dry-run takes no value"),
        (["start"], "--name=''"),
        (["start", "--name=a b"], "--name='a b'"),
        (["start", "--name=x;touch pwned"], "--name='x;touch pwned'"),
        (["start", "--name=$(touch pwned)"], "--name='$(touch pwned)'"),
        (["start", "--name=ok", "--poll=soon"], "--poll=soon"),
        (["start", "--name=ok", "--poll="], "--poll= is not"),
        (["start", "--secret config=x"], "no option --secret config"),
        (["start", "--name=ok", "--secret=A B"], "--secret takes one word"),
        (["start", "--name=ok", "--config=a\nb"], "line break"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line_and_nothing_is_run(script, bad, part, world):
    done = world.run(script, *bad)
    assert done.returncode == 2 and not done.stdout
    assert part in done.stderr and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("Error: ")
    assert not world.calls()


@pytest.mark.parametrize(
    "script, action, part",
    [
        ("tpu.sh", ["create", "--name=ab", "--zone=z"], "needs --project"),
        ("tpu.sh", ["start", "--name=ab", "--project=p", "--zone=z"], "needs --config"),
        ("tpu.sh", ["run", "--name=ab", "--project=p", "--zone=z"], "a command after --"),
        ("tpu.sh", ["create", "--name=ab", "--project=p", "--zone=z", "--type=v5litepod-16"], "--bucket=gs://BUCKET or --nfs"),
        ("tpu.sh", ["create", "--name=ab", "--project=p", "--zone=z", "--type=b200-8", "--dry-run"], "--runtime"),
        ("tpu.sh", ["create", "--name=ab", "--project=p", "--zone=z", "--spot", "--reserved"], "not both"),
        ("tpu.sh", ["setup", "--name=ab", "--project=p", "--zone=z", "--nfs=a:/b", "--disk=d"], "not both"),
        ("tpu.sh", ["follow", "--watch", "--secret=NO_SUCH", *PLACE["tpu.sh"], *RUN], "NO_SUCH: this variable is not set"),
        ("gke.sh", ["create", "--name=ab", "--project=p", "--zone=z", "--slices=0"], "--slices=0"),
        ("ssh.sh", ["setup", "--name=ab"], "--hosts"),
        ("ssh.sh", ["setup", "--name=ab", "--hosts=a,b,a"], "named twice"),
        ("ssh.sh", ["setup", "--name=ab", "--hosts=a;b"], "no host's name"),
        ("ssh.sh", ["setup", "--name=ab", "--hosts=-oProxyCommand=x"], "no host's name"),
        ("ssh.sh", ["setup", "--name=ab", "--hosts-file=/nowhere"], "cannot be read"),
        ("slurm.sh", ["start", "--name=ab"], "needs --workdir"),
        ("slurm.sh", ["start", "--name=ab", "--workdir=w", "--partition=a b"], "--partition=a b"),
        ("slurm.sh", ["start", "--name=ab", "--workdir=w", "--gpus=0"], "--gpus=0"),
        ("slurm.sh", ["start", "--name=ab", "--workdir=gs://b/w", "--config=c"], "need a folder on the shared disk"),
        ("gke.sh", ["start", "--name=ab", "--project=p", "--zone=z"], "needs --type"),
    ],
)
def test_what_an_action_lacks_is_named(script, action, part, world):
    done = world.run(script, *action)
    assert done.returncode == 2 and part in done.stderr.splitlines()[-1]
    assert not world.calls()


@pytest.mark.parametrize("script, action", ACTIONS)
def test_a_dry_run_prints_commands_that_a_shell_reads_and_runs_none(script, action, world):
    done = world.run(script, *words(script, action, "--dry-run"), TMPDIR="/nowhere")
    assert done.returncode == 0, done.stderr
    assert not world.calls()
    commands = [line for line in done.stdout.splitlines() if line and not line.startswith("#")]
    assert commands or "Nothing to" in done.stderr
    if (script, action) != ("slurm.sh", "start"):  # which shows the job's script too
        programs = {shlex.split(line)[0] for line in commands}
        assert programs <= {*PROGRAMS, "git", "mkdir", "tar", "tail", "bash", "rm"}


@pytest.mark.parametrize("script, action", [("tpu.sh", "setup"), ("ssh.sh", "setup"), ("ssh.sh", "start"), ("gke.sh", "start")])
def test_what_a_dry_run_prints_does_the_same_when_it_is_pasted_into_a_shell(script, action, tmp_path):
    asked = []
    for kind in ("real", "pasted"):
        (tmp_path / kind).mkdir()
        world = World(tmp_path / kind)
        if kind == "pasted":
            (tmp_path / "lines").write_text("set -e\n" + done.stdout)
            assert world.run(tmp_path / "lines", HF_TOKEN="x").returncode == 0
        else:
            assert world.run(script, *words(script, action)).returncode == 0
            done = world.run(script, *words(script, action, "--dry-run"), TMPDIR=str(tmp_path))
        calls = (" ".join([call["program"], *call["words"]]) for call in world.calls())
        asked.append(sorted(re.sub(r"/\S*/(tmp\.|softmask_jax-)\w+/", "FOLDER/", call) for call in calls))
    assert asked[0] == asked[1] and asked[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_may_be_called_from_any_folder(script, world):
    (world.folder / "launch").mkdir()
    for path, cwd in ((Path(script), ROOT / "launch"), (Path("launch") / script, ROOT)):
        done = world.run(path, "--help", cwd=cwd, CDPATH=str(world.folder))
        assert done.returncode == 0 and "Example:" in done.stdout


def test_files_that_an_option_names_are_those_of_the_caller_s_folder(world):
    (world.folder / "hosts").write_text("node7\n")
    script, place = ROOT / "launch" / "ssh.sh", ["--name=ab", "--hosts-file=hosts"]
    done = world.run(script, "fetch", *place, "--from=/a", "--to=here", cwd=world.folder)
    (call,) = world.calls("scp")
    assert done.returncode == 0 and call["words"][-2:] == ["node7:/a", f"{world.folder}/here"]


@pytest.mark.parametrize("given, minutes", [("0900", "900"), ("08", "8")])
def test_a_number_may_begin_with_zeros(given, minutes, world):
    done = world.run("tpu.sh", "create", *PLACE["tpu.sh"], f"--wait={given}", "--dry-run")
    assert done.returncode == 0 and f"for {minutes} s at most" in done.stdout


@pytest.mark.parametrize("script, action", ACTIONS)
def test_no_secret_stands_in_a_dry_run_or_in_any_command(script, action, tmp_path):
    world = World(tmp_path)
    world.answer("gcloud", "describe .*state.state", {"out": "ACTIVE\n"})
    world.answer("kubectl", "get jobset", {"out": "Completed"})
    world.answer("sbatch", "", {"out": "7\n"})
    world.answer("gcloud", "node.sh status", {"out": "softmask_jax ended 0 5 yes\n"})
    world.answer("ssh", "node.sh status", {"out": "softmask_jax ended 0 5 yes\n"})
    more = ["--secret=HF_TOKEN"] if "secret" in text_of(script, "options") else []
    if script == "slurm.sh":
        more.append(f"--workdir={tmp_path}/run")
    for dry in (["--dry-run"], []):
        if script == "slurm.sh" and action in ("setup", "start") and not dry:
            continue  # run in test_slurm.py, in a copy of the project
        done = world.run(script, *words(script, action, *more, *dry), HF_TOKEN=SECRET)
        assert "s3cr3t" not in done.stdout + done.stderr + world.everything()
    assert world.calls() or script == "slurm.sh" or "Nothing to" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_secret_is_given_by_name_and_must_be_set(script, world):
    line = [*PLACE[script], *RUN]
    action = "start" if script in ("gke.sh", "slurm.sh") else "setup"
    done = world.run(script, action, *line, "--secret=HF_TOKEN")
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr and "not set" in done.stderr
    done = world.run(script, action, *line, "--secret=HF_TOKEN=hf_abc")
    assert done.returncode == 2 and "no value" in done.stderr and "hf_abc" not in done.stderr
    assert not world.calls()


@pytest.mark.parametrize("nasty", ["/shared/a b", "/shared/x;touch pwned", "/shared/$(touch pwned)", "/s/it's `x` \"&\\"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_path_reaches_the_host_as_one_word_whatever_is_in_it(script, nasty, world):
    line = ["start", *PLACE[script], "--config=configs/dream7b.py", f"--workdir={nasty}", "--dry-run", "--", f"--x={nasty}"]
    done = world.run(script, *line)
    assert done.returncode == 0, done.stderr
    found = []
    for text in (line for line in done.stdout.splitlines() if not line.startswith("#")):
        if "softmask_jax.supervise" in text or "launch/node.sh" in text or "--config=" in text:
            outer = shlex.split(text.rstrip("\\&"), posix=True)
            inner = [word.partition("=")[2] for word in outer if word.startswith("--command=")]
            inner += [outer[-1]] if outer[0] == "ssh" else []
            found += [word for command in inner for word in shlex.split(command)] or outer
    assert f"--workdir={nasty}" in found and f"--x={nasty}" in found


@pytest.mark.full
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="needs the Google Cloud CLI, which checks without a network")
def test_gcloud_s_own_check_takes_every_command(world):
    more = ["--dry-run", "--secret=HF_TOKEN", "--network=a", "--subnetwork=b"]
    lines = set()
    for script, action in ACTIONS:
        if script == "tpu.sh":
            for kind in (["--spot"], ["--reserved"], ["--nfs=", "--disk=d", "--type=v5litepod-8"],
                         ["--nfs=", "--bucket=gs://bucket", "--workdir="]):  # fmt: skip
                done = world.run(script, *words(script, action, *more, *kind), HF_TOKEN="x")
                assert done.returncode == 0, done.stderr
                lines |= set(done.stdout.splitlines())
    page = (ROOT / "launch" / "README.md").read_text().replace(')"\n', "\n")
    page = page.replace('"$PROJECT"', "p").replace('"$ZONE"', "z")
    lines |= set(re.findall(r"(?:^|\$\()(gcloud (?!auth|config).*)$", page, re.M))
    commands = sorted(line for line in lines if line.startswith("gcloud "))
    assert len(commands) > 20
    (world.folder / "commands.json").write_text(json.dumps([{"command_string": line} for line in commands]))
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={world.folder}/commands.json"], text=True,
        capture_output=True, env=os.environ | {"CLOUDSDK_CONFIG": str(world.folder), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
    )  # fmt: skip
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(commands)
    assert not [(one["command_string"], one["error_message"]) for one in found if not one["success"]]
