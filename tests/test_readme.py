"""README.md: every command is one that there is, the ways in are walked at toy size, and what it says in Python runs."""
import argparse
import os
import re
import shlex
import subprocess
from pathlib import Path

import jax
import pytest

from softmask_jax import config
from softmask_jax.config.command_line import split_overrides
from softmask_jax.convert import tiny_dream
from softmask_jax.evaluate.settings import Settings
from tests.helpers.commands import command_module
from tests.helpers.tiny_run import quick_compiles

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "README.md").read_text()
WAYS = re.findall(r"^\| [\w -]+ \| `((?:python|bash) .*)` \|$", PAGE, re.M)
SCRIPTS = ("bash", "source", "srun", "gcloud")


def commands() -> list[str]:
    """Of the fenced blocks, the table and what is said in passing."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S):
        found += block.replace("\\\n", " ").splitlines()
    text = re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S)
    found += [re.sub(r"\s+", " ", one) for one in re.findall(r"`(python -m softmask_jax\.[^`]*?)`", text)]
    return [line for line in dict.fromkeys(found) if line.strip()]


class Parsed(Exception):
    """The command line was understood."""


@pytest.fixture
def parsed(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_args(parser, *given, **named):
        raise Parsed(parse(parser, *given, **named))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


@pytest.mark.parametrize("line", commands())
def test_every_command_is_one_that_there_is(line, parsed):
    words = shlex.split(line, comments=True)
    if words[0] not in SCRIPTS:
        assert words[:2] == ["python", "-m"], line
    if words[0] in ("bash", "source"):
        assert words[1].startswith(".venv/") or (ROOT / words[1]).is_file()
    if "-m" not in words:
        # What a gcloud command runs stands in one word.
        words = shlex.split(next((word for word in words if "-m softmask_jax" in word), ""))
    if not words:
        return
    module, given = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    try:
        with pytest.raises(Parsed):
            entry(module)(given)
    except SystemExit as error:
        raise AssertionError(f"{line}: exit status {error.code}") from None
    check_config(module, given)


def entry(module: str):
    """The function that a command calls."""
    command = command_module(module)
    return command.supervise if module.endswith(".supervise") else command.main


def check_config(module: str, given: list[str]) -> None:
    """The config that a command names exists, and its overrides fit."""
    others, overrides = split_overrides(given)
    named = [word.removeprefix("--config=") for word in others if word.startswith("--config=")]
    for spec in named:
        if module == "softmask_jax.evaluate":
            config.complete(config.read(str(ROOT / spec), overrides, Settings), Settings)
        else:
            config.load(str(ROOT / spec), overrides)


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link]
    assert len(links) > 10 and not [link for link in links if not (ROOT / link).exists()]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The ways in, walked in their order in one folder: (folder, what bash printed)."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "launch", ".assets"):
        (folder / name).symlink_to(ROOT / name)
    said = {}
    with pytest.MonkeyPatch.context() as patch, quick_compiles():
        patch.chdir(folder)
        assert tiny_dream.main(["--out=runs/tiny_dream"]) == 0
        run("softmask_jax.main", ["--config=configs/mdlm_owt.py:smoke", "--workdir=models/mdlm"])
        for line in WAYS:
            words = shlex.split(line)
            if words[0] == "bash":
                said[line] = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)
                continue
            words = [re.sub(r"^(--config=configs/\w+\.py)$", r"\1:smoke", word) for word in words]
            words = ["--src=runs/tiny_dream/hf" if word.startswith("--src=hf://") else word for word in words]
            run(words[2], words[3:] + smaller(words))
            if words[2] == "softmask_jax.convert":
                os.symlink(folder / "models" / "dream", folder / "runs" / "tiny_dream" / "model")
        yield folder, said


def smaller(words: list[str]) -> list[str]:
    """What makes a command quick that has no smoke variant, and fits it to eight devices."""
    if words[2] == "softmask_jax.evaluate":
        return ["--config.perplexity.max_windows=16", "--config.perplexity.draws=1"]
    if "configs/dream7b.py:smoke" in words[3]:
        return ["--config.train.micro_batches=1"]
    return ["--steps=4"] if words[2] == "softmask_jax.generate.__main__" else []


def run(module: str, given: list[str]) -> None:
    assert entry(module)(given) == 0, (module, given)


@pytest.mark.full
def test_the_ways_in_lead_to_runs_pages_numbers_and_a_dry_run(walked):
    folder, said = walked
    for run_folder in ("stdlib", "continued", "dream7b"):
        assert (folder / "runs" / run_folder / "summary.json").is_file()
    assert (folder / "models/dream/manifest.json").is_file() and (folder / "page.html").stat().st_size > 10_000
    assert (folder / "evaluations/stdlib/results.md").is_file()
    assert len(WAYS) == 7 and len(said) == 1
    for line, done in said.items():
        assert done.returncode == 0 and "queued-resources create" in done.stdout, line


@pytest.mark.full
def test_what_the_page_says_in_python_runs_in_one_interpreter(walked, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert len(blocks) == 4
    monkeypatch.chdir(walked[0])
    space: dict = {}
    for block in blocks:
        # Toy models are short, and few steps are as good a test.
        for large, small in (("length=128", "length=32"), ("(2, 64)", "(2, 32)"), ("tokens=256", "tokens=16"), ("=64", "=8")):
            block = block.replace(large, small)
        exec(compile(block, "README.md", "exec"), space)
    said = capsys.readouterr().out
    assert "raw_scale" in said
    gradient = jax.jit(jax.grad(space["loss"]))(space["params"])["soft_mask"]
    assert all(abs(float(gradient[f"raw_{name}"])) > 1e-9 for name in ("scale", "centre", "steepness"))
