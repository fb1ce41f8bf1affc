"""The two-pass benchmark at toy sizes: what it reports, never how fast."""
import argparse
import json

import jax
import numpy as np
import pytest

from softmask_jax.benchmarks import two_pass, vocabulary
from softmask_jax.benchmarks.random_step import Shape, Sizes, settings_of
from softmask_jax.benchmarks.timing import alternate
from softmask_jax.diffusion.vocab import head as vocab_head
from softmask_jax.diffusion.vocab.head import Head
from softmask_jax.report.markdown import table

TOY = ["--shapes=16x2x64,16x1x4000", "--head_width=8", "--seq_len=32", "--batch=2", "--steps=3", "--calls=2",
       "--remat=none"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(what was printed, what was written as JSON)."""
    path = tmp_path_factory.mktemp("benchmark") / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert two_pass.main([*TOY, f"--json={path}"]) == 0
    return "\n".join(printed), json.loads(path.read_text())


def ordered(spread: dict, *names: str) -> bool:
    values = [spread[name] for name in names]
    return 0 < values[0] and values == sorted(values)


@pytest.mark.full
def test_both_kinds_of_step_are_timed_beside_the_limit_of_their_ratio(run):
    rows = run[1]["steps"]
    assert [(row["hidden_size"], row["num_blocks"], row["vocab_size"]) for row in rows] == [(16, 2, 64), (16, 1, 4000)]
    for row in rows:
        assert (row["remat"], row["limit"]) == ("none", 4 / 3) and row["temporary_bytes"] > 0
        assert row["single"]["calls"] == row["two_pass"]["calls"] == 3
        for kind in ("single", "two_pass"):
            assert ordered(row[kind], "min", "lower_quartile", "median", "upper_quartile", "max")
        assert ordered(row["ratio"], "lower_quartile", "median", "upper_quartile")


@pytest.mark.full
def test_the_vocabulary_is_measured_at_every_width_and_size(run):
    rows = run[1]["vocabulary"]
    assert [(row["hidden_size"], row["vocab_size"]) for row in rows] == [(16, 64), (16, 4000)]
    for row in rows:
        programs = {(entry["operation"], entry["kind"]): entry for entry in row["programs"]}
        assert len(programs) == 7 and all(entry["seconds"]["calls"] == 2 for entry in programs.values())
        assert set(row["sweep"]) == {"1", "3"}
        assert all(ordered(ratio, "lower_quartile", "median", "upper_quartile") for ratio in row["sweep"].values())


@pytest.mark.full
def test_the_chunked_vocabulary_needs_less_memory_than_the_dense_one(run):
    row = run[1]["vocabulary"][1]
    programs = {(entry["operation"], entry["kind"]): entry for entry in row["programs"]}
    for operation in ("sweep, k = 3", vocabulary.BOTH):
        dense, chunked = (programs[operation, kind] for kind in ("dense", "chunked"))
        assert chunked["temporary_bytes"] < row["logits_bytes"] <= dense["temporary_bytes"]
        assert chunked["argument_bytes"] == dense["argument_bytes"]


@pytest.mark.full
def test_the_tables_name_device_version_sizes_and_limits(run):
    printed, found = run
    for part in (found["device"], jax.__version__, "2 x 32 tokens", "4/3 = 1.333", "| 4,000 |", "sweep, k = 1"):
        assert part in printed
    assert len([line for line in printed.splitlines() if line.startswith("|")]) == (2 + 2) + (2 + 2) + (2 + 4)
    row = found["steps"][0] | {"remat": "full", "limit": float(two_pass.LIMITS["full"])}
    assert "| 5/4 = 1.250" in two_pass.markdown(found | {"steps": [row]})


def test_the_dense_operations_are_the_chunked_ones_formed_at_once():
    random = np.random.default_rng(0)
    hidden, weight = random.standard_normal((2, 3, 8), np.float32), random.standard_normal((768, 8), np.float32)
    head = Head(weight, random.standard_normal(768, np.float32), 700, 699, True)
    targets = random.integers(0, 699, (2, 3))
    pairs = zip(vocabulary.dense_sweep(hidden, head, 3), vocabulary.chunked_sweep(hidden, head, 3), strict=True)
    for dense, chunked in pairs:
        np.testing.assert_allclose(dense, chunked, rtol=1e-5)
    dense, chunked = (of(hidden, head, targets) for of in (vocabulary.dense_cross_entropy, vocab_head.cross_entropy))
    np.testing.assert_allclose(dense, chunked, rtol=1e-5)


def test_by_default_small_and_large_vocabularies_are_measured_at_two_widths():
    shapes = [Shape.parse(text) for text in two_pass.SHAPES.split(",")]
    assert {(shape.hidden_size, shape.vocab_size) for shape in shapes} == {
        (width, vocab_size) for width in (256, 768) for vocab_size in (2048, 50_258, 152_064)
    }
    assert [settings_of(Sizes(), shape).model.num_heads for shape in shapes] == [4, 4, 4, 12, 12, 12]


def test_a_width_that_is_no_multiple_of_the_heads_is_refused():
    with pytest.raises(ValueError, match="a multiple of --head_width=64"):
        settings_of(Sizes(), Shape(100, 1, 64))


def test_calls_alternate_and_each_is_warmed_up_once():
    order = []
    seconds = alternate({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert order == list("ab" + "ab" * 2) and [len(seconds[name]) for name in "ab"] == [2, 2]


def test_a_table_is_markdown_with_aligned_columns():
    assert table(("a", "long"), [("1", "2")]).splitlines() == ["| a | long |", "| - | ---- |", "| 1 | 2    |"]


@pytest.mark.parametrize("place", ["absent/out.json", "."])
def test_an_unwritable_json_file_is_refused_before_anything_is_measured(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(two_pass, "measure", None)
    assert two_pass.main([f"--json={tmp_path / place}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and "cannot be written" in error and error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--remat=dots", "--shapes=256x6", "--shapes=256x0x2048", "--shapes=,", "--steps=0",
                                  "--against=jax"])  # fmt: skip
def test_impossible_flags_are_refused(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        two_pass.main([flag])
    assert flag.split("=")[0] in capsys.readouterr().err


def test_a_shape_that_is_none_is_explained():
    with pytest.raises(argparse.ArgumentTypeError, match="width x blocks x vocabulary, as 256x6x50258"):
        Shape.parse("256,6")
