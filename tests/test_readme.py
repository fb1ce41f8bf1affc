"""Every README.md: its commands exist, its Python blocks run, its links resolve; the ways in are walked at toy size."""
import argparse
import os
import re
import shlex
import subprocess
from pathlib import Path

import jax
import pytest

from softmask_jax import config, supervise
from softmask_jax.config.command_line import split_overrides
from softmask_jax.config.kinds import KINDS
from softmask_jax.convert import tiny_dream
from softmask_jax.evaluate.settings import Settings
from softmask_jax.io.runs import default_folder
from softmask_jax.models import families
from tests.helpers.commands import command_module

ROOT = Path(__file__).parent.parent
FOLDERS = ("configs", "launch", "softmask_jax")
FILES = [ROOT / "README.md", *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("README.md")))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
WAYS = re.findall(r"^\| [\w -]+ \| `((?:python|bash) .*)` \|$", PAGES["README.md"], re.M)
MODEL_PAGE = "softmask_jax/README.md"
SCRIPTS = ("bash", "source", "srun", "gcloud")


def commands() -> list[tuple[str, str]]:
    """(page, command) of fenced blocks, tables and running text; tests/launch/test_readme.py runs those of launch/."""
    lines = []
    for page, text in PAGES.items():
        if page == "launch/README.md":
            continue
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
            lines += [(page, line) for line in block.replace("\\\n", " ").splitlines()]
        text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        inline = re.findall(r"`(python -m softmask_jax\.[^`]*?)`", text)
        lines += [(page, re.sub(r"\s+", " ", line)) for line in inline]
    return [(page, line) for page, line in dict.fromkeys(lines) if line.strip()]


class Parsed(Exception):
    """The command line was understood."""


@pytest.fixture
def parsed(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_args(parser, *given, **named):
        raise Parsed(parse(parser, *given, **named))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_is_one_that_there_is(page, line, parsed):
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
    if module == "softmask_jax.supervise" and given[0] in supervise.SHARED:
        module, given = f"softmask_jax.{given[0]}", given[1:]
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


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links() -> list[tuple[str, str]]:
    targets = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    return [(page, link) for page, link in targets if "://" not in link]


def test_there_are_links_to_every_page():
    targets = {os.path.normpath(os.path.join(os.path.dirname(page), link.partition("#")[0])) for page, link in links()}
    assert set(PAGES) - {"README.md"} <= targets


@pytest.mark.parametrize(("page", "link"), links())
def test_a_link_leads_to_a_file_and_a_heading(page, link):
    name, _, anchor = link.partition("#")
    target = (ROOT / page).parent / name if name else ROOT / page
    assert target.exists()
    assert not anchor or anchor in anchors(target.read_text(encoding="utf-8"))


def test_the_files_from_disk_to_loss_exist():
    section = PAGES[MODEL_PAGE].partition("## Follow one token")[2].partition("\n## ")[0]
    names = re.findall(r"`([\w/]+(?:\.py|/))`", section)
    assert len(names) > 12 and not [name for name in names if not (ROOT / "softmask_jax" / name).exists()]


def test_the_first_page_stays_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The ways in, walked in their order in one folder: (folder, what bash printed)."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "launch", ".assets"):
        (folder / name).symlink_to(ROOT / name)
    said = {}
    with pytest.MonkeyPatch.context() as patch:
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
            if words[2] == "softmask_jax.main" and not any(word.startswith("--workdir=") for word in words):
                # Without `:smoke` it would be there.
                smoke = Path(default_folder(words[3].removeprefix("--config=")))
                smoke.with_name(smoke.name.removesuffix("-smoke")).symlink_to(smoke.name)
            if words[2] == "softmask_jax.convert":
                os.symlink(folder / "models" / "dream", folder / "runs" / "tiny_dream" / "model")
        yield folder, said


def smaller(words: list[str]) -> list[str]:
    """What makes a command quick that has no smoke variant, and fits it to eight devices."""
    if words[2] == "softmask_jax.evaluate":
        return ["--config.perplexity.max_windows=16", "--config.perplexity.draws=1"]
    if any("configs/dream7b.py:smoke" in word for word in words):
        return ["--config.train.micro_batches=1"]
    return ["--steps=4"] if words[2] == "softmask_jax.generate" else []


def run(module: str, given: list[str]) -> None:
    assert entry(module)(given) == 0, (module, given)


@pytest.mark.full
def test_the_ways_in_lead_to_runs_pages_numbers_and_a_dry_run(walked):
    folder, said = walked
    for run_folder in ("stdlib", "continued", "dream7b"):
        assert (folder / "runs" / run_folder / "summary.json").is_file()
    assert (folder / "models/dream/manifest.json").is_file() and (folder / "page.html").stat().st_size > 10_000
    assert (folder / "evaluations/stdlib/results.md").is_file()
    assert len(WAYS) == 8 and (folder / "demo.html").is_file() and len(said) == 1
    for line, done in said.items():
        assert done.returncode == 0 and "queued-resources create" in done.stdout, line


def check_gradient(space: dict) -> None:
    """Every soft-masking scalar has a gradient."""
    gradient = jax.jit(jax.grad(space["loss"]))(space["params"])["soft_mask"]
    assert all(abs(float(gradient[f"raw_{name}"])) > 1e-9 for name in ("scale", "centre", "steepness"))


BLOCKS = {page: re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) for page, text in PAGES.items()}
BLOCKS = {page: blocks for page, blocks in BLOCKS.items() if blocks}


SIZES = (("length=128", "length=32"), ("(2, 64)", "(2, 32)"), ("tokens=256", "tokens=16"), ("=64", "=8"))


def run_blocks(page: str) -> dict:
    """Run a page's Python blocks in one fresh namespace."""
    space: dict = {}
    for block in BLOCKS[page]:
        # Toy models are short, and few steps are as good a test.
        for large, small in SIZES:
            block = block.replace(large, small)
        exec(compile(block, page, "exec"), space)
    return space


def test_four_pages_have_python_blocks():
    assert len(BLOCKS) == 4 and sum(map(len, BLOCKS.values())) == 5 and MODEL_PAGE in BLOCKS


def test_the_model_of_the_page_trains_samples_and_becomes_a_family(capsys, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    check_gradient(run_blocks(MODEL_PAGE))
    assert "raw_scale" in capsys.readouterr().out
    KINDS.pop("bag")
    sizes = {"vocab_size": 258, "mask_token_id": 257}
    assert families.of("bag").build(config.Model(hidden_size=8), config.SoftMask(), sizes).vocab_size == 258


@pytest.mark.full
@pytest.mark.parametrize("page", [page for page in BLOCKS if page != MODEL_PAGE])
def test_what_a_page_says_in_python_runs(page, walked, monkeypatch, capsys):
    monkeypatch.chdir(walked[0])
    run_blocks(page)
    assert capsys.readouterr().out
