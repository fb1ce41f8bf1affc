"""The benchmark of generation at toy sizes: what it reports, never how fast."""
import json

import pytest

from softmask_jax.benchmarks import generate

TOY = ["--mdlm_width=16", "--mdlm_blocks=1", "--mdlm_heads=2", "--mdlm_vocabulary=600", "--dream_width=16",
       "--dream_layers=1", "--dream_heads=2", "--dream_kv_heads=1", "--dream_mlp=32", "--dream_vocabulary=700",
       "--length=24", "--prompt=8", "--block_length=8", "--small=16", "--rounds=2", "--steps=3"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(what was printed, what was written as JSON)."""
    path = tmp_path_factory.mktemp("benchmark") / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert generate.main([*TOY, f"--json={path}"]) == 0
    return "\n".join(printed), json.loads(path.read_text())


@pytest.mark.full
def test_both_samplers_are_timed_with_as_many_network_calls_either_way(run):
    rows = run[1]["soft_masking"]
    assert [(row["model"], row["vocab_size"], row["k"]) for row in rows] == [("MDLM", 600, 3), ("Dream", 700, 1)]
    for row in rows:
        assert row["calls"]["plain"] == row["calls"]["soft"] >= 3
        low, high = row["ratio_quartiles"]
        assert 0 < low <= row["ratio"] <= high


@pytest.mark.full
def test_every_cache_fills_as_many_tokens_and_computes_fewer_positions(run):
    none, prefix, dual = run[1]["caches"]
    assert none["filled"] == prefix["filled"] == dual["filled"] == 16
    assert none["calls"] * 24 == none["positions"] > prefix["positions"] >= dual["positions"]
    assert none["speed"] == 1


@pytest.mark.full
def test_the_loop_in_python_is_timed_beside_the_compiled_one_that_it_equals(run):
    loop = run[1]["loop"]
    assert loop["ratio"] == loop["host"]["median"] / loop["compiled"]["median"]


@pytest.mark.full
def test_the_tables_of_the_readme_are_printed(run):
    assert run[0].count("| ---") >= 3 and "soft-masking costs" in run[0] and "times as fast" in run[0]


@pytest.mark.parametrize("words, says", [(["--rounds=0"], "must be positive"), (["--json=/nowhere/x.json"], None)])
def test_mistakes_are_one_line(words, says, capsys):
    if says:
        with pytest.raises(SystemExit):
            generate.main([*TOY, *words])
        assert says in capsys.readouterr().err
    else:
        assert generate.main([*TOY, *words]) == 1
        assert "cannot be written" in capsys.readouterr().err
