"""The benchmark of starting: a run is started twice, its phases are read."""
import json

import pytest

from softmask_jax.benchmarks import startup


@pytest.mark.full
def test_a_second_start_finds_the_programs_of_the_first(tmp_path, capsys):
    words = ["--config=configs/stdlib.py:smoke", f"--config.data.cache_dir={tmp_path}", f"--json={tmp_path / 'x.json'}"]
    assert startup.main(words) == 0
    empty, filled = json.loads((tmp_path / "x.json").read_text("utf-8"))["starts"]
    assert filled["compiling"] < empty["compiling"] < empty["total"]
    phases = ("imports", "data and model", "weights", "compiling and running it")
    assert sum(empty[name] for name in phases) == pytest.approx(empty["total"], abs=0.3)
    assert "| filled" in capsys.readouterr().out


def test_a_run_that_ends_early_is_one_line(capsys):
    assert startup.main(["--config=configs/absent.py"]) == 1
    assert capsys.readouterr().err.startswith("Error: The run ended before its first step: ")
