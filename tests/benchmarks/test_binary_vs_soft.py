"""Two toy runs compared: same masks, paired differences, costs; and runs that do not compare."""
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from softmask_jax import config, data, denoiser, soft_masking
from softmask_jax.benchmarks import binary_vs_soft
from softmask_jax.checkpoint import Checkpoints
from softmask_jax.run_folder import RunFolder
from tests import tiny_run

pytestmark = pytest.mark.xdist_group("binary_vs_soft")


def write_run(path: Path, texts: Path, steps: int, seed: int, **changed) -> None:
    """A folder as a finished training leaves it, with random weights."""
    c = config.from_dict(tiny_run.settings(texts, train__steps=steps, **changed))
    corpus = data.build(c.data)
    tokenizer = corpus.tokenizer
    model = denoiser.build(
        c.model, c.soft_mask, vocab_size=tokenizer.vocab_size, mask_token_id=tokenizer.mask_token_id
    )
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: 0.1 * random.standard_normal(leaf.shape, np.float32), shapes)
    params["soft_mask"] = soft_masking.init_scalars(scale=0.5, centre=-6.0)
    with RunFolder(path) as folder, Checkpoints(path / "checkpoints", async_save=False) as checkpoints:
        folder.write_config(c.to_dict())
        tokenizer.save(path / "tokenizer")
        cursor = {"step": steps, "data": corpus.info["fingerprint"]}
        checkpoints.save(steps, {"params": params, "ema": params["backbone"]}, cursor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs: binary (7 steps), soft (6), and other (one step, on other text)."""
    at = tmp_path_factory.mktemp("compare")
    tiny_run.write_texts(at / "texts")
    tiny_run.write_texts(at / "else" / "texts", seed=1)
    write_run(at / "binary", at, 7, seed=0, soft_mask__variant="none")
    write_run(at / "soft", at, 6, seed=1, soft_mask__p_sm=0.5)
    write_run(at / "other", at / "else", 1, seed=2)
    return at


@pytest.fixture(scope="module")
def runs(folder):
    return {name: binary_vs_soft.load_run(folder / name) for name in ("binary", "soft", "other")}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(binary_vs_soft, "LEAST_TOKENS", 1)


@pytest.fixture(scope="module")
def compared(runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binary_vs_soft, "LEAST_TOKENS", 1)
        return binary_vs_soft.compare(runs["binary"], runs["soft"], draws=2)


def test_a_run_differs_from_itself_by_exactly_nothing(runs):
    found = binary_vs_soft.compare(runs["soft"], runs["soft"], draws=2)
    assert found["differences"]["soft, one pass - binary"] == (0.0, 0.0, 0.0)
    assert found["runs"]["binary"] == found["runs"]["soft"]
    assert found["flops_ratio"] == 1.0 and found["equal_flops"]


def test_differences_are_those_of_the_means_inside_their_interval(compared):
    found = compared
    binary, soft = (found["runs"][name]["nelbo"] for name in ("binary", "soft"))
    assert set(binary) == {"one_pass"} and set(soft) == {"one_pass", "two_pass"}
    pairs = {
        "soft, one pass - binary": (soft["one_pass"], binary["one_pass"]),
        "soft, two passes - binary": (soft["two_pass"], binary["one_pass"]),
        "soft, two passes - soft, one pass": (soft["two_pass"], soft["one_pass"]),
    }
    assert set(found["differences"]) == set(pairs)
    for name, (first, second) in pairs.items():
        mean, low, high = found["differences"][name]
        assert low < mean < high
        np.testing.assert_allclose(mean, first[0] - second[0], rtol=1e-9, atol=1e-12)


def test_costs_count_three_forwards_and_the_share_of_first_passes(runs, compared):
    found = compared
    assert [found["runs"][name]["forwards_per_step"] for name in ("binary", "soft")] == [3.0, 3.5]
    np.testing.assert_allclose(found["flops_ratio"], 6 * 3.5 / (7 * 3.0))
    assert found["equal_flops"]
    per_token = runs["soft"].model.denoiser.flops_per_token(16)
    assert found["runs"]["soft"]["flops"] == 6 * 8 * 16 * 3.5 * per_token


def test_every_validation_window_is_drawn_as_often_as_asked_or_as_the_tokens_need(runs, compared, monkeypatch):
    used = compared["validation"]
    assert used["draws"] == 2 and used["tokens"] == used["windows"] * 2 * 16
    monkeypatch.setattr(binary_vs_soft, "LEAST_TOKENS", used["tokens"] + 1)
    assert binary_vs_soft.compare(runs["binary"], runs["soft"], draws=2)["validation"]["draws"] == 3


def test_runs_on_other_text_are_refused(runs):
    with pytest.raises(ValueError, match="different text, split or window length"):
        binary_vs_soft.compare(runs["binary"], runs["other"])


def test_text_that_changed_since_the_runs_is_refused(runs, monkeypatch):
    changed = data.build(runs["other"].model.config.data)
    monkeypatch.setattr(data, "build", lambda _: changed)
    with pytest.raises(ValueError, match="has changed since the run"):
        binary_vs_soft.compare(runs["binary"], runs["soft"])


def test_the_command_prints_a_table_and_says_whether_costs_are_equal(folder, tmp_path, capsys):
    flags = [f"--binary={folder / 'binary'}", f"--soft={folder / 'soft'}", "--draws=1"]
    assert binary_vs_soft.main([*flags, f"--json={tmp_path / 'out.json'}"]) == 0
    printed = capsys.readouterr().out
    assert "Training FLOPs are equal within 2 % (soft / binary = 1.0000)" in printed
    assert "| soft, two passes - binary" in printed and "as one pass" in printed
    assert set(json.loads((tmp_path / "out.json").read_text())["runs"]) == {"binary", "soft"}


def test_unequal_costs_name_the_steps_that_would_be_equal(compared):
    found = compared | {"flops_ratio": 1.5, "equal_flops": False}
    assert "NOT equal within 2 % (soft / binary = 1.5000): at 4 steps" in binary_vs_soft.markdown(found)


def test_swapped_runs_and_folders_without_a_run_are_one_line(folder, tmp_path, capsys):
    swapped = [f"--binary={folder / 'soft'}", f"--soft={folder / 'binary'}"]
    assert binary_vs_soft.main(swapped) == 1 and "swapped" in capsys.readouterr().err
    assert binary_vs_soft.main([f"--binary={tmp_path}", f"--soft={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: No run in") and error.count("\n") == 1
