"""launch/README.md: every command in it is run, beside stubs, in a copy of the project; figures agree with their sources."""
import json
import re
import shlex
import subprocess

import pytest

from softmask_jax import config, main, supervise
from softmask_jax.compile.__main__ import command_line as compile_flags
from softmask_jax.config.command_line import split_overrides
from softmask_jax.convert.__main__ import parse as parse_convert
from tests.launch import toy_project
from tests.launch.world import ROOT, World, value

PAGE = (ROOT / "launch" / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
OTHERS = ("python", "pip", "ssh-add")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """After all commands of the page, in order, in one shell."""
    folder = tmp_path_factory.mktemp("readme")
    world, project = World(folder), toy_project.make(folder / "project")
    for program in OTHERS:
        world.add(program)
    (project / "configs").symlink_to(ROOT / "configs")
    (project / "launch" / "venv.sh").write_text("make_venv() { true; }\naccelerator() { true; }\ntested_versions() { true; }\n")
    (project / "wheels").mkdir()
    gpu = project / ".venv-gpu" / "bin" / "python"
    gpu.parent.mkdir(parents=True)
    gpu.write_text('#!/bin/sh\necho "$@"\n')
    gpu.chmod(0o755)
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    world.answer("gcloud", "queued-resources describe", {"out": "ACTIVE\n"})
    world.answer("gcloud", "filestore instances describe", {"out": "10.0.0.2\n"})
    for program in ("gcloud", "ssh"):
        world.answer(program, "node.sh status", {"out": "softmask_jax ended 0 33500 yes\n"})
    world.answer("kubectl", "jobset", {"out": "Completed"})
    world.answer("sbatch", "", {"out": "7\n"})
    home = folder / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text("hf_secret\n")
    toy_project.plan(home / "runs" / "owt", "finish")
    (home / "runs" / "owt" / "summary.json").write_text(json.dumps({"step": 20}))
    script = folder / "all.sh"
    script.write_text("set -euo pipefail\n" + "".join(f"echo '=== {i}'\n{block}" for i, block in enumerate(BLOCKS)))
    world.done = world.run(script, cwd=project)
    return world


def test_every_command_of_the_page_runs(world):
    assert len(BLOCKS) >= 15
    assert world.done.returncode == 0, world.done.stdout[-2000:] + world.done.stderr[-2000:]
    assert f"=== {len(BLOCKS) - 1}" in world.done.stdout
    assert not [line for line in world.done.stderr.splitlines() if "rror" in line]
    assert "hf_secret" not in world.everything()


def test_links_lead_to_files_and_every_notebook_is_linked():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link]
    assert links and not [link for link in links if not (ROOT / "launch" / link).exists()]
    notebooks = {f"colab/{path.name}" for path in (ROOT / "launch" / "colab").glob("*.ipynb")}
    assert len(notebooks) == 3 and notebooks <= set(links)


def test_every_line_of_a_block_is_a_command_or_sets_a_variable():
    for line in "".join(BLOCKS).splitlines():
        first = shlex.split(line)[0]
        assert re.match(r"[a-z0-9]+=", first) or first in ("bash", "gcloud", "export", "python", "pip", "ssh-add"), line


def test_every_training_that_the_page_starts_has_a_valid_config(world):
    lines = [value(call, "--command") for call in world.calls("gcloud", "node.sh start")]
    lines += [call["words"][-1] for call in world.calls("ssh", "node.sh start")]
    lines += [value(call, "--command") for call in world.calls("xpk", "workload create")]
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line)
        given, rest = supervise.parse(words[len(words) - words[::-1].index("--") :])
        found, overrides = main.parse(rest)
        config.load(str(ROOT / found.config), overrides)


def test_every_python_command_of_the_page_is_one_that_its_module_takes(world):
    commands = [call["words"] for call in world.calls("python")]
    for call in world.calls("gcloud", "node.sh run"):
        words = shlex.split(value(call, "--command"))
        commands.append(words[words.index("--") + 2 :])
    modules = []
    for words in commands:
        assert words[0] == "-m"
        modules.append(words[1])
        if words[1] == "softmask_jax.convert":
            parse_convert(words[2:])
        else:
            assert words[1] == "softmask_jax.compile"
            rest, overrides = split_overrides(words[2:])
            config.load(str(ROOT / compile_flags().parse_args(rest).config), overrides)
    assert set(modules) == {"softmask_jax.convert", "softmask_jax.compile"}


def test_costs_are_steps_times_seconds_times_chips_and_agree_with_the_scaling_page():
    table = PAGE.split("| slice | weights |")[1].split("\n\n")[0].splitlines()[2:]
    scaling = (ROOT / "launch" / "SCALING.md").read_text().split("## Dream-7B")[1]
    rows = config.load(str(ROOT / "configs" / "dream7b.py"), ()).updates * 8
    assert f"{rows:,} rows" in PAGE and len(table) == 4
    for line in table:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        slice_, weights, batch, memory, steps, seconds, hours, chip_hours = cells
        sides = [int(side) for side in slice_.partition(":")[2].split("x")]
        count, steps = sides[0] * sides[1], int(steps.replace(",", ""))
        assert steps * int(batch) == rows
        ranges = [map(float, cell.split(" to ")) for cell in (seconds, hours, chip_hours)]
        for second, hour, chip_hour in zip(*ranges, strict=True):
            assert second * steps / 3600 == pytest.approx(hour, rel=0.03)
            assert second * steps / 3600 * count == pytest.approx(chip_hour, rel=0.01)
        known = re.search(rf"^\| {slice_} \|(.*)$", scaling, re.M)
        if known and weights == "bfloat16":
            cells = [cell.strip() for cell in known[1].split("|")]
            assert float(memory) == float(cells[4])
            assert [float(x) for x in seconds.split(" to ")] == pytest.approx([float(x) for x in cells[8].split(" to ")])


def test_the_troubleshooting_table_quotes_what_the_scripts_say():
    said = "".join(path.read_text() for path in (ROOT / "launch").glob("*.sh"))
    said += "".join((ROOT / "softmask_jax" / name).read_text() for name in ("io/files.py", "io/bucket.py", "distributed/rendezvous.py"))
    quoted = re.findall(r"^\| `([^|]*)` \|", PAGE.split("## When something goes wrong")[1], re.M)
    pieces = {
        "no quota for", "no TPU within", "the request failed", "was preempted; resume brings it back", "failed on host",
        "could not mount", "expected one free disk, found", "is in use by", "did not come", "Given up:", "runs already",
        "runs here already", "command not found", "sbatch refused the job", "nothing was created: gcloud cannot see",
        "refused (403); grant roles/storage.objectAdmin",
    }  # fmt: skip
    for piece in pieces:
        assert piece in said, piece
        assert any(piece in line or piece.split()[-1] in line for line in quoted), piece
