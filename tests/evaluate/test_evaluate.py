"""`python -m softmask_jax.evaluate`: every task on small runs, twice, killed, and told nonsense."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softmask_jax import config
from softmask_jax.evaluate import __main__ as evaluate
from softmask_jax.evaluate.code import sandbox
from softmask_jax.training import loop
from tests.helpers import tiny_gpt2
from tests.helpers.tiny_run import home  # noqa: F401

ROOT = Path(__file__).parent.parent.parent
TOY = {
    "perplexity.draws": 2, "perplexity.batch_size": 8, "samples.count": 6, "samples.batch_size": 4, "sampler.steps": 4,
    "generative.max_length": 32, "generative.batch_size": 3, "code.max_new_tokens": 6, "code.steps": 4, "code.batch_size": 8,
    "code.limit": 3, "mesh.data": 1, "mesh.fsdp": -1,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(home):  # noqa: F811
    """Two runs, with soft-masking and without, and a scorer."""
    home.run("soft")
    home.run("binary", soft_mask__variant="none")
    tiny_gpt2.write(home.folder / "gpt2")
    return home.folder


def words(folder: Path, *more: str, out: str = "out", checkpoints=("binary", "soft"), tasks="perplexity; generative; humaneval"):
    found = [f"--checkpoint={folder / name}" for name in checkpoints]
    found += [f"--tasks={tasks}", f"--out={folder / out}", f"--config.generative.scorer={folder / 'gpt2'}"]
    return [*found, *(f"--config.{name}={value}" for name, value in TOY.items()), *more]


@pytest.fixture(scope="module")
def sandboxed():
    if why := sandbox.available():
        pytest.skip(why)


def results(folder: Path, out: str) -> dict:
    return json.loads((folder / out / "results.json").read_text())


def numbers(found: dict) -> list:
    """What has to be the same in every evaluation of the same models."""
    return [(row["model"], row["task"], row["budget"], row["estimates"]) for row in found["results"]] + found["differences"]


@pytest.mark.full
def test_one_command_measures_everything_for_both_models_at_every_budget(folder, sandboxed, capsys):
    assert evaluate.main(words(folder, "--budgets=1; 1/2", "--allow_code")) == 0
    said, found = capsys.readouterr().out, results(folder, "out")
    rows = {(row["model"], row["task"], row["budget"]): row["estimates"] for row in found["results"]}
    assert set(rows) == {(model, task, budget) for model in ("binary", "soft") for task, budgets in (
        ("perplexity", "1"), ("generative", "1 1/2"), ("humaneval", "1 1/2")) for budget in budgets.split()}
    assert rows["soft", "perplexity", "1"]["gain/nelbo"]["count"] > 0
    assert {"generative_perplexity", "entropy", "mauve"} <= set(rows["soft", "generative", "1/2"])
    passed = rows["soft", "humaneval", "1"]["pass@1"]
    assert passed["unit"] == "%" and passed["low"] == passed["value"] == 0 < passed["high"] < 100
    assert any(one["task"] == "perplexity" and one["baseline"] == "binary" for one in found["differences"])
    assert "## Paired differences" in said and (folder / "out/results.md").read_text() in said
    page = (folder / "out/results.html").read_text(encoding="utf-8")
    for title in ("generative: entropy against calls", "generative: mauve against seconds", "humaneval: pass@1 against calls"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert 'class="verdict">soft, perplexity: ' in page
    # Half of the steps are half of the calls, but for the last pass of MDLM's sampler.
    calls = {row["budget"]: row["cost"]["calls"] for row in found["results"] if row["task"] == "generative"}
    assert calls["1/2"] < calls["1"]
    before = (folder / "out/results.md").stat().st_mtime_ns
    assert evaluate.main(words(folder, "--budgets=1; 1/2", "--allow_code")) == 0
    assert numbers(results(folder, "out")) == numbers(found) and (folder / "out/results.md").stat().st_mtime_ns > before


@pytest.mark.parametrize("name", ["eval_text", "eval_code", "eval_llada"])
def test_the_smoke_configs_run_on_any_model(folder, name, sandboxed):
    checkpoint = f"--checkpoint={folder / 'soft'}"
    shape = [f"--config.{key}={TOY[key]}" for key in ("mesh.data", "mesh.fsdp")]
    assert evaluate.main([f"--config=configs/{name}.py:smoke", checkpoint, f"--out={folder / name}", "--allow_code", *shape]) == 0
    assert results(folder, name)["results"]


def test_soft_masking_is_turned_off_on_the_command_line(folder):
    one = words(folder, out="plain", checkpoints=("soft", "soft#none"), tasks="perplexity")
    assert evaluate.main(one) == 0
    found = {row["model"]: row["estimates"] for row in results(folder, "plain")["results"]}
    # One pass of the same weights.
    assert found["soft-plain"]["nelbo"]["value"] == pytest.approx(found["soft"]["one_pass/nelbo"]["value"], rel=1e-6)


@pytest.mark.parametrize("more, said", [
    (["--tasks=perplexty"], "There is no task 'perplexty'; the nearest is 'perplexity'"),
    (["--tasks="], ""),
    (["--checkpoint=runs/nowhere"], "no folder 'runs/nowhere'"),
    (["--config.perplexity.drawz=3"], "config.perplexity has no key 'drawz'; the nearest is 'draws'"),
    (["--config.sampler.alg=mdml"], "alg is 'mdml'; choose one of"),
    (["--config.generative.scorer=models/nowhere"], "models/nowhere"),
    (["--budgets=2"], "config.run.budgets is '2'"),
    (["--config=configs/eval_txt.py"], "No config file at 'configs/eval_txt.py'"),
])  # fmt: skip
def test_nonsense_is_one_line_and_leaves_nothing(folder, more, said, capsys):
    if more == ["--tasks="]:
        more, said = ["--config.run.tasks=;"], "There is nothing to measure: give --tasks"
        given = [word for word in words(folder, out="none") if not word.startswith("--tasks")] + more
    else:
        given = words(folder, *more, out="none")
    assert evaluate.main(given) == 1
    error = capsys.readouterr().err
    assert said in error and error.startswith("Error: ") and error.count("\n") == 1
    assert not (folder / "none").exists()


@pytest.mark.parametrize("given, said", [([], "--out"), (["--out=x", "--allow_unsafe_code"], "an addition to --allow_code")])
def test_flags_that_are_missing_are_named(given, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(given)
    assert said in capsys.readouterr().err


@pytest.mark.full
def test_an_evaluation_of_the_stdlib_model_killed_at_random_moments_ends_with_the_same_numbers(tmp_path, sandboxed):
    settings = config.load("configs/stdlib.py:smoke", [f"train.compilation_cache={tmp_path / 'compiled'}"])
    loop.train(settings, str(tmp_path / "stdlib"))
    tiny_gpt2.write(tmp_path / "gpt2")
    toy = [f"--config.{name}={value}" for name, value in (TOY | {"perplexity.max_windows": 32}).items()]
    command = [sys.executable, "-m", "softmask_jax.evaluate", f"--checkpoint={tmp_path / 'stdlib'}", "--budgets=1; 1/2", *toy,
               "--tasks=perplexity; generative; humaneval", f"--config.generative.scorer={tmp_path / 'gpt2'}", "--allow_code"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
                                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def start(out: str) -> subprocess.Popen:
        return subprocess.Popen([*command, f"--out={tmp_path / out}"], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip

    whole = start("whole")
    said = whole.communicate(timeout=500)[0]
    assert whole.returncode == 0, said
    kills, chance = 0, random.Random(0)
    # At some moment behind so many lines of what it says, whatever the machine's speed.
    for lines in (1, 4, 6):
        child = start("killed")
        for _ in range(lines):
            child.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.3))
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        kills += child.returncode == -signal.SIGKILL
    last = start("killed")
    said = last.communicate(timeout=500)[0]
    assert last.returncode == 0 and kills > 1, said
    assert numbers(results(tmp_path, "killed")) == numbers(results(tmp_path, "whole"))
