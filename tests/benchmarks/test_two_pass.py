"""The two-pass benchmark at toy sizes: what it reports, never how fast."""
import json

import jax
import numpy as np
import pytest

from softmask_jax.benchmarks import two_pass
from softmask_jax.benchmarks.timing import alternate
from softmask_jax.diffusion.vocab import head as vocab_head
from softmask_jax.diffusion.vocab.head import Head
from softmask_jax.report.markdown import table

TOY = ["--hidden_size=16", "--num_blocks=2", "--num_heads=2", "--seq_len=16", "--batch=4", "--vocab_size=64",
       "--head_batch=2", "--head_seq_len=32", "--head_width=16", "--vocab_sizes=4000", "--steps=3", "--calls=2",
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


@pytest.mark.full
def test_both_kinds_of_step_are_timed_beside_the_limit_of_their_ratio(run):
    (row,) = run[1]["steps"]
    assert (row["remat"], row["limit"]) == ("none", 4 / 3)
    assert row["single"]["calls"] == row["two_pass"]["calls"] == 3
    for kind in ("single", "two_pass"):
        ordered = [row[kind][name] for name in ("min", "lower_quartile", "median", "upper_quartile", "max")]
        assert 0 < ordered[0] and ordered == sorted(ordered)
    assert row["ratio"] == row["two_pass"]["median"] / row["single"]["median"]
    assert row["temporary_bytes"] > 0


@pytest.mark.full
def test_the_chunked_vocabulary_needs_less_memory_than_the_dense_one(run):
    rows = run[1]["vocabulary"]
    assert [row["vocab_size"] for row in rows] == [4000, 4000]
    for row in rows:
        assert row["chunked"]["temporary_bytes"] < row["logits_bytes"] <= row["dense"]["temporary_bytes"]
        assert row["chunked"]["argument_bytes"] == row["dense"]["argument_bytes"]
        assert row["chunked"]["seconds"]["calls"] == 2


@pytest.mark.full
def test_the_tables_name_device_version_sizes_and_limits(run):
    printed, found = run
    for part in (found["device"], jax.__version__, "D 16, 2 blocks, V 64", "4/3 = 1.333", "4,000"):
        assert part in printed
    assert len([line for line in printed.splitlines() if line.startswith("|")]) == (2 + 1) + (2 + 2)
    row = found["steps"][0] | {"remat": "full", "limit": float(two_pass.LIMITS["full"])}
    assert "| 5/4 = 1.250" in two_pass.markdown(found | {"steps": [row]})


def test_the_dense_operations_are_the_chunked_ones_formed_at_once():
    random = np.random.default_rng(0)
    hidden, weight = random.standard_normal((2, 3, 8), np.float32), random.standard_normal((768, 8), np.float32)
    head = Head(weight, random.standard_normal(768, np.float32), 700, 699, True)
    targets = random.integers(0, 699, (2, 3))
    for dense, chunked in zip(two_pass.dense_sweep(hidden, head), two_pass.chunked_sweep(hidden, head), strict=True):
        np.testing.assert_allclose(dense, chunked, rtol=1e-5)
    np.testing.assert_allclose(
        two_pass.dense_cross_entropy(hidden, head, targets), vocab_head.cross_entropy(hidden, head, targets), rtol=1e-5
    )


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


@pytest.mark.parametrize("flag", ["--remat=dots", "--vocab_sizes=1e5", "--steps=0"])
def test_impossible_flags_are_refused(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        two_pass.main([flag])
    assert flag.split("=")[0] in capsys.readouterr().err
