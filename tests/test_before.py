"""Runs and converted models written by earlier versions still load, resume and give the same numbers."""
import contextlib
import json
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import softmask_jax
from softmask_jax import main
from softmask_jax.evaluate import __main__ as evaluate, compare
from tests.golden import FOLDER
from tests.helpers import tiny_run

# Made by tests/golden/before/record.py. A zip holds what its name says and, beside it, the config and the texts of a run.
ZIPS = ("before/mdlm_run.zip", "before/dream_model.zip", "before/dream_run.zip")
NUMBERS = "before/numbers.json"
MDLM, DREAM, BASE = "mdlm_run", "dream_run", "dream_model"
KEPT = {MDLM: 4, DREAM: 3}  # the step at which a run was cut off
# With the JAX that recorded them, floats differ at most by sums in another order, which another CPU may choose: by 3e-7
# absolute in differences of two bounds of about 4 nats. JAX 0.12 rounds differently from 0.10.2, by 6e-7 in such
# differences. Fine-tuning in bfloat16 differs more on a CPU that multiplies in it: a gradient's norm by 8e-5 relative.
SAME, OTHER, BFLOAT16 = dict(rtol=1e-6, atol=1e-6), dict(rtol=1e-4, atol=2e-6), dict(rtol=5e-4, atol=1e-5)
ALGORITHMS = {BASE: "entropy", DREAM: "origin"}
CHATS = [[{"role": "user", "content": text}] for text in ("What is 2 + 3?", "What is 40 + 2? Think.")]


def key(seed: int) -> jax.Array:
    return jax.random.key(seed, impl="threefry2x32")


def some(array) -> dict:
    """A few numbers of an array, and one that depends on all."""
    array = np.asarray(array, np.float64)
    return {"shape": list(array.shape), "mean_square": float(np.mean(array**2)), "every_1009th": array.ravel()[::1009].tolist()}


def logits(model) -> dict:
    return some(model.logits(np.arange(32, dtype=np.int32).reshape(2, 16) * 7 % 250))


def mdlm_numbers(run: str) -> dict:
    """Of the run's newest checkpoint."""
    model, tokens = softmask_jax.load(run), np.arange(32, dtype=np.int32).reshape(2, 16) * 5 % 250
    out = model.generate(key=key(1), count=2, steps=4)
    return {
        "step": model.step,
        "logits": logits(model),
        "raw_logits": logits(softmask_jax.load(run, weights="raw")),
        "nelbo": np.asarray(model.nelbo(tokens, key(0), draws=2)).tolist(),
        "generated": np.asarray(out.tokens).tolist(),
        "texts": model.decode(out.tokens),
    }


def dream_numbers(folder: str) -> dict:
    """Of a converted model, or of a run on one."""
    model = softmask_jax.load(folder)
    out = model.generate(CHATS, key=key(2), max_new_tokens=8, steps=4, alg=ALGORITHMS[folder])
    return {
        "step": model.step,
        "max_length": model.max_length,
        "logits": logits(model),
        "generated": np.asarray(out.tokens)[:, -8:].tolist(),
        "texts": model.decode(out.tokens, new_tokens=8),
    }


def run_numbers(run: str, after: int) -> dict:
    """What a finished run logged after a step, its summary, and its model."""
    summary = json.loads((Path(run) / "summary.json").read_text(encoding="utf-8"))
    rows = [without_counts(row) for row in tiny_run.rows(Path(run)) if row["step"] > after]
    found = {"rows": rows, "logits": logits(softmask_jax.load(run)), "validation": without_counts(summary["validation"])}
    return found | {name: summary[name] for name in ("step", "samples")}


def without_counts(row: dict) -> dict:
    """A row as versions wrote it that did not say on how much of the split it was taken."""
    counts = {f"{unit}{of}" for unit in ("windows", "conversations") for of in ("", "_in_split")}
    return {name: value for name, value in row.items() if name not in counts}


def compare_numbers(*runs: str) -> dict:
    assert compare.main([*runs, "--draws=1", "--json=compare.json", "--out=compare.html"]) == 0
    return json.loads(Path("compare.json").read_text(encoding="utf-8"))


def evaluate_numbers(run: str) -> list:
    words = ("--tasks=perplexity", "--out=evaluation", "--config.perplexity.draws=1", "--config.perplexity.batch_size=8")
    assert evaluate.main([f"--checkpoint={run}", *words]) == 0
    found = json.loads(Path("evaluation/results.json").read_text(encoding="utf-8"))["results"]
    return [[row["model"], row["task"], row["budget"], row["estimates"]] for row in found]


def train(run: str, workdir: str = "") -> None:
    """Start or resume a run with the config and the texts that lie beside it."""
    assert main.main([f"--config={run}.py", f"--workdir={workdir or run}"]) == 0


@contextlib.contextmanager
def working_in(folder: Path):
    """The folder is the working directory, as configs have relative paths; one device, and quick compiles kept there."""
    cache, devices = jax.config.values["jax_compilation_cache_dir"], jax.devices
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: devices(*backend)[:1])
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", cache)
            compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before")
    for name in ZIPS:
        with zipfile.ZipFile(FOLDER / name) as file:
            file.extractall(folder)
    with working_in(folder):
        yield


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((FOLDER / NUMBERS).read_text(encoding="utf-8"))


def resumed(run: str) -> str:
    """A copy of a run that has gone on to its end."""
    shutil.copytree(run, f"{run}_resumed")
    train(run, f"{run}_resumed")
    return f"{run}_resumed"


def assert_same(found, expected, where: str = "", **tolerance) -> None:
    """Texts and integers are equal, floats nearly (rtol and atol)."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_same(found[name], value, f"{where}/{name}", **tolerance)
    elif isinstance(expected, list) and not (expected and all(isinstance(value, float) for value in expected)):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{where}/{i}", **tolerance)
    elif isinstance(expected, (float, list)):
        np.testing.assert_allclose(found, expected, **tolerance, err_msg=where)
    else:
        assert found == expected, where


@pytest.fixture(scope="module")
def same(recorded):
    """Assert that numbers are those recorded under a name."""
    float32 = SAME if recorded["jax"] == jax.__version__ else OTHER
    tolerances = {"dream_finished": BFLOAT16}
    return lambda found, name: assert_same(found, recorded[name], name, **tolerances.get(name, float32))


def test_a_run_loads_and_gives_the_same_logits_bounds_and_texts(same):
    same(mdlm_numbers(MDLM), "mdlm")


def test_a_converted_dream_and_a_run_on_it_load_and_give_the_same_logits_and_answers(same):
    same(dream_numbers(BASE), "dream_model")
    same(dream_numbers(DREAM), "dream")


def test_a_run_resumes_to_the_metrics_and_the_model_of_one_that_was_never_interrupted(same):
    same(run_numbers(resumed(MDLM), KEPT[MDLM]), "mdlm_finished")


def test_a_fine_tuning_resumes_to_the_metrics_and_the_model_of_one_that_was_never_interrupted(same):
    same(run_numbers(resumed(DREAM), KEPT[DREAM]), "dream_finished")


@pytest.mark.full
def test_runs_compare_and_are_evaluated_with_the_same_numbers(same):
    same(compare_numbers(MDLM, MDLM), "compare")
    same(evaluate_numbers(MDLM), "evaluate")
