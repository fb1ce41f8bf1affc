"""The compile report: what a slice is, what a chip holds, and what is said where the compiler is missing."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softmask_jax import compile as aot

ROOT = Path(__file__).parent.parent
SMALL = ["--config=configs/stdlib.py:smoke", "--vocab_size=258"]


@pytest.mark.parametrize("name, chips, gib", [("v5e:4x4", 16, 16), ("v6e:1x1", 1, 32), ("v5p:2x2x1", 4, 95), ("v4:2x2x2", 8, 32)])
def test_a_slice_has_so_many_chips_of_so_much_memory(name, chips, gib):
    topology = aot.Topology(name)
    assert (topology.chips, topology.memory) == (chips, gib * 2**30)


@pytest.mark.parametrize("name", ["v5e", "v7:2x2", "v5e:4", "v5e:4x0", "4x4", "v5e:4x4 "])
def test_another_name_is_refused_with_an_example(name, capsys):
    with pytest.raises(ValueError, match="is no TPU slice; write one of v4, v5e, v5p, v6e and its shape: v5e:4x4"):
        aot.Topology(name)


def test_the_report_adds_up_and_gives_a_verdict():
    found = dict(base=0, params=2**29, ema=2**29, optimizer=2**30, arguments=2**31, temporary=2**33, output=0, program=2**20)
    found["peak"] = sum(found[name] for name in ("arguments", "temporary", "output", "program"))
    said = aot.report(found, aot.Topology("v5e:2x2"))
    assert "arguments           2.000   (parameters 0.500, EMA 0.500, optimiser 1.000" in said
    assert "together           10.001   of 16: fits" in said
    assert "does NOT fit" in aot.report(found | {"peak": 17 * 2**30}, aot.Topology("v5e:2x2"))


def run(*arguments: str, compiler: bool = True) -> subprocess.CompletedProcess:
    environment = dict(os.environ)
    if not compiler:  # nor where an earlier test of this process has found it
        environment = {name: value for name, value in environment.items() if name != "PYTHONPATH" and "TPU" not in name}
    command = [sys.executable, "-m", "softmask_jax.compile", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("arguments, said", [
    (["--config=configs/none.py", "--topology=v5e:2x2"], "No config file at 'configs/none.py'"),
    ([*SMALL, "--topology=v9:2x2"], "is no TPU slice"),
    ([*SMALL, "--topology=v5e:2x2", "--config.train.stepz=3"], "nearest is 'steps'"),
])
def test_a_wrong_command_is_one_line(arguments, said, capsys):
    before = os.environ.get("JAX_PLATFORMS")
    try:
        assert aot.main(arguments) == 1
    finally:
        os.environ["JAX_PLATFORMS"] = before or "cpu"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ") and said in line


@pytest.mark.full
def test_without_the_compiler_it_says_what_to_install():
    done = run(*SMALL, "--topology=v5e:2x2", compiler=False)
    assert done.returncode == 1 and "pip install 'softmask_jax[aot]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.full
@pytest.mark.xdist_group("tpu")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:1x1"])
def test_a_small_model_fits_a_slice_and_one_chip(topology):
    done = run(*SMALL, f"--topology={topology}")
    assert done.returncode == 0, done.stderr
    assert "fits" in done.stdout and "parameters" in done.stdout


@pytest.mark.full
@pytest.mark.xdist_group("tpu")
def test_more_chips_than_rows_get_a_row_each():
    done = run(*SMALL, "--topology=v5e:4x4")
    assert done.returncode == 0 and "16 rows of 32 tokens in 1 micro-batches, mesh data=16" in done.stdout


@pytest.mark.full
@pytest.mark.xdist_group("tpu")
def test_the_two_pass_step_of_dream_7b_fits_the_smallest_chips():
    done = run("--config=configs/dream7b.py", "--topology=v5e:4x4")
    assert done.returncode == 0, done.stderr
    assert "16 rows of 2048 tokens" in done.stdout and "7,625,938,432 parameters" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("  temporary")]
    assert float(line.split()[1]) <= 2.5
