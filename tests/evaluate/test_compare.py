"""Toy runs compared: same masks, paired differences, costs, common charts; and runs that do not compare."""
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from softmask_jax import config, data
from softmask_jax.diffusion import soft_masking
from softmask_jax.evaluate import compare, comparison
from softmask_jax.io.checkpoint import Checkpoints
from softmask_jax.io.files import write_json
from softmask_jax.io.run_folder import RunFolder
from softmask_jax.models import denoiser
from tests.helpers import crafted_run, tiny_run



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
    with RunFolder(path) as folder, Checkpoints(path / "checkpoints") as checkpoints:
        folder.write_config(c.to_dict())
        tokenizer.save(path / "tokenizer")
        cursor = {"step": steps, "data": corpus.info["fingerprint"]}
        checkpoints.save(steps, {"params": params, "ema": params["backbone"]}, cursor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs: binary (7 steps), soft (6), begun (6 of 12, from binary's weights), and other (one step, on other text)."""
    at = tmp_path_factory.mktemp("compare")
    tiny_run.write_texts(at / "texts")
    tiny_run.write_texts(at / "else" / "texts", seed=1)
    write_run(at / "binary", at, 7, seed=0, soft_mask__variant="none")
    write_run(at / "soft", at, 6, seed=1, soft_mask__p_sm=0.5)
    write_run(at / "other", at / "else", 1, seed=2)
    write_run(at / "begun", at, 6, seed=3, soft_mask__p_sm=0.5)
    more = tiny_run.settings(at, train__steps=12, soft_mask__p_sm=0.5, init__checkpoint=str(at / "binary"))
    write_json(at / "begun" / "config.json", config.from_dict(more).to_dict())
    return at


@pytest.fixture(scope="module")
def runs(folder):
    return {name: comparison.load_run(folder / name) for name in ("binary", "soft", "begun", "other")}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(comparison, "LEAST_TOKENS", 1)


@pytest.fixture(scope="module")
def compared(runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "LEAST_TOKENS", 1)
        return comparison.compare([runs[name] for name in ("binary", "soft", "begun")], draws=2)


def test_a_run_differs_from_itself_by_exactly_nothing(runs):
    compared_rows = comparison.compare([runs["soft"], runs["soft"]], draws=2)
    assert compared_rows["differences"]["soft (2), two passes - soft, two passes"] == (0.0, 0.0, 0.0)
    assert compared_rows["runs"]["soft"] == compared_rows["runs"]["soft (2)"]
    assert compared_rows["runs"]["soft (2)"]["flops_ratio"] == 1.0 and compared_rows["runs"]["soft (2)"]["equal_flops"]


def test_differences_are_those_of_the_means_inside_their_interval(compared):
    nelbo = {name: run["nelbo"] for name, run in compared["runs"].items()}
    assert set(nelbo["binary"]) == {"one_pass"} and set(nelbo["soft"]) == {"one_pass", "two_pass"}
    pairs = {
        "soft, two passes - binary": (nelbo["soft"]["two_pass"], nelbo["binary"]["one_pass"]),
        "begun, two passes - binary": (nelbo["begun"]["two_pass"], nelbo["binary"]["one_pass"]),
        "soft, two passes - soft, one pass": (nelbo["soft"]["two_pass"], nelbo["soft"]["one_pass"]),
        "begun, two passes - begun, one pass": (nelbo["begun"]["two_pass"], nelbo["begun"]["one_pass"]),
    }
    assert list(compared["differences"]) == list(pairs) and compared["baseline"] == "binary"
    for name, (first, second) in pairs.items():
        mean, low, high = compared["differences"][name]
        assert low < mean < high
        np.testing.assert_allclose(mean, first[0] - second[0], rtol=1e-9, atol=1e-12)


def test_costs_count_three_forwards_and_the_share_of_first_passes(runs, compared):
    found = compared["runs"]
    assert [run["forwards_per_step"] for run in found.values()] == [3.0, 3.5, 3.5]
    np.testing.assert_allclose([run["flops_ratio"] for run in found.values()], [1.0, 6 * 3.5 / (7 * 3.0)] + [1.0])
    assert found["soft"]["equal_flops"]
    per_token = runs["soft"].model.denoiser.flops_per_token(16)
    assert found["soft"]["flops"] == 6 * 8 * 16 * 3.5 * per_token


def test_a_run_that_goes_on_or_started_from_weights_is_counted_by_its_own_steps(compared):
    begun = compared["runs"]["begun"]
    assert (begun["step"], begun["planned_steps"]) == (6, 12) and begun["flops"] == compared["runs"]["soft"]["flops"]
    said = comparison.markdown(compared)
    assert "| 6 of 12 " in said
    assert re.search("begun started from the weights of .*binary, whose training is not counted", said)


def test_every_validation_window_is_drawn_as_often_as_asked_or_as_the_tokens_need(runs, compared, monkeypatch):
    used = compared["validation"]
    assert used["draws"] == 2 and used["tokens"] == used["windows"] * 2 * 16
    monkeypatch.setattr(comparison, "LEAST_TOKENS", used["tokens"] + 1)
    assert comparison.compare([runs["binary"], runs["soft"]], draws=2)["validation"]["draws"] == 3


def test_runs_on_other_text_are_refused(runs):
    with pytest.raises(ValueError, match="different text, split or window length.*--curves_only"):
        comparison.compare([runs["binary"], runs["soft"], runs["other"]])


def test_text_that_changed_since_the_runs_is_refused(runs, monkeypatch):
    changed = data.build(runs["other"].model.config.data)
    monkeypatch.setattr(data, "build", lambda config, tokenizer: changed)
    with pytest.raises(ValueError, match="has changed since the run"):
        comparison.compare([runs["binary"], runs["soft"]])


def test_the_command_prints_tables_and_writes_a_page(folder, tmp_path, capsys):
    out = tmp_path / "out.html"
    flags = [str(folder / "binary"), str(folder / "soft"), "--draws=1", f"--out={out}"]
    assert compare.main([*flags, f"--json={tmp_path / 'out.json'}"]) == 0
    printed = capsys.readouterr().out
    assert "Training FLOPs are equal within 2 % (soft / binary = 1.0000)" in printed
    assert "| soft, two passes - binary" in printed and "as one pass" in printed and f"Page  {out}" in printed
    assert set(json.loads((tmp_path / "out.json").read_text())["runs"]) == {"binary", "soft"}
    page = out.read_text()
    assert "<td>soft, two passes - binary</td>" in page and "equal within 2 %" in page
    verdict = re.search('<p class="verdict">(.*?)</p>', page)[1]
    assert re.fullmatch(r"soft, two passes: [\d.]+ % (lower|higher) perplexity than binary on the same masks \[.*\], at equal "
                        r"training FLOPs\.", verdict) and page.index(verdict) < page.index("<table>") and verdict in printed
    assert "<td>soft_mask.variant</td><td>none</td><td>topk</td>" in page


def test_unequal_costs_name_the_steps_that_would_be_equal(compared):
    soft = compared["runs"]["soft"] | {"flops_ratio": 1.5, "equal_flops": False}
    unequal = compared | {"runs": compared["runs"] | {"soft": soft}}
    assert "NOT equal within 2 % (soft / binary = 1.5000): at 4 steps" in comparison.markdown(unequal)
    soft, begun = comparison.verdicts(unequal)
    assert soft.endswith(", at 1.50 times the training FLOPs.") and begun.startswith("begun, two passes: ")


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    out = f"--out={tmp_path / 'out.html'}"
    for arguments, said in (
        ([str(tmp_path), str(tmp_path)], "No run in"),
        ([str(folder / "binary"), str(folder / "other")], "different text"),
        ([str(folder / "binary"), str(folder / "soft"), f"--out={tmp_path}"], "--out="),
    ):
        assert compare.main([out, *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: ") and said in error and error.count("\n") == 1
    for arguments in (["a"], ["a", "b", "--draws=0"], ["a", "b", "--curves_only", "--json=x"]):
        with pytest.raises(SystemExit) as end:
            compare.main(arguments)
        assert end.value.code == 2


@pytest.fixture
def crafted(tmp_path) -> list[str]:
    """Three folders without a checkpoint: a binary run, a soft-masked one, and one that has hardly begun."""
    begun = crafted_run.write(tmp_path / "begun", finished=False, steps=10, train__steps=50, data__tokenizer="bpe")
    paths = [crafted_run.write(tmp_path / "binary", soft=False), crafted_run.write(tmp_path / "soft"), begun]
    return [str(path) for path in paths]


def test_curves_only_overlays_any_runs(crafted, tmp_path, capsys):
    out = tmp_path / "out.html"
    assert compare.main([*crafted, "--curves_only", f"--out={out}"]) == 0
    assert capsys.readouterr().out == f"Page  {out}\n"
    page = out.read_text()
    captions = re.findall("<figcaption>(.*?)</figcaption>", page)
    axes = ("step", "tokens", "FLOPs")
    assert captions == [
        *(f"{what} by {axis}" for axis in axes for what in ("Training loss", "Validation perplexity")),
        "Mean lambda", "Top-k hit rate", "Scale ω_s", "Centre ω_b (nats)", "Steepness ω_a",
        "Throughput", "Gradient norm, before clipping", "Learning rate",
    ]  # fmt: skip
    figures = dict(zip(captions, re.findall("<figure.*?</figure>", page, re.DOTALL)))
    for figure in figures.values():  # a run is named in the legend, or as one without values
        named = re.findall(r"</svg>([^<,]*)(?:, two passes)?</li>", figure) + re.findall("No values: ([^.]*)", figure)
        assert sorted(", ".join(named).split(", ")) == ["begun", "binary", "soft"], named
    assert "No values: binary." in figures["Mean lambda"] and "No values: begun." in figures["Validation perplexity by step"]
    assert 'class="verdict">Not measured on the same masks' in page and "begun: Median" in page and "On the same masks" not in page
    assert "<td>data.tokenizer</td><td>bytes</td><td>bytes</td><td>bpe</td>" in page
    assert "not finite" not in re.sub("<script>.*?</script>", "", page, flags=re.DOTALL)


def test_wall_times_are_compared_of_the_runs_that_have_an_account(crafted, tmp_path):
    compare.main([*crafted, "--curves_only", f"--out={tmp_path / 'out.html'}"])
    assert "Wall time" not in (tmp_path / "out.html").read_text()
    for path, steps in zip(crafted[1:], (45.0, 15.0)):
        crafted_run.write_account(Path(path), steps=steps, down=15.0)
    compare.main([*crafted, "--curves_only", f"--out={tmp_path / 'out.html'}"])
    page = (tmp_path / "out.html").read_text()
    for row in (("Training steps", "75.0%", "50.0%"), ("Lost: no process", "25.0%", "50.0%"), ("Starts", "3", "3"),
                ("Wall time", "1 min 0 s", "30.0 s")):  # fmt: skip
        assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" in page


def test_curves_are_drawn_against_steps_tokens_and_flops(crafted, tmp_path):
    compare.main([*crafted[:2], "--curves_only", f"--out={tmp_path / 'out.html'}"])
    page = (tmp_path / "out.html").read_text()
    figures = re.findall(r'data-x-name="([^"]*)" data-series="([^"]*)"><figcaption>Training loss', page)
    lengths = {axis: [one["x"][-1] for one in json.loads(series.replace("&quot;", '"'))] for axis, series in figures}
    assert lengths["step"] == [100, 100] and lengths["training tokens"] == [12800, 12800]
    np.testing.assert_allclose(lengths["training FLOPs"], [100 * 128 * 3.0 * 7, 100 * 128 * 3.8 * 7])


def test_runs_are_named_by_as_much_of_their_path_as_tells_them_apart():
    assert comparison.run_names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert comparison.run_names([Path("x/a"), Path("y/a"), Path("y/b")]) == ["x/a", "y/a", "y/b"]
    assert comparison.run_names([Path("x/a"), Path("x/a/"), Path("x/a/.")]) == ["a", "a (2)", "a (3)"]
