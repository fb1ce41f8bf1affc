"""The compile report: what a slice is, what a chip holds, and what is said where the compiler is missing."""
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from softmask_jax import config as schema
from softmask_jax.compile import __main__, flops, programs
from softmask_jax.compile.compiled import out_of_memory
from softmask_jax.compile.reading import Loops
from softmask_jax.compile.topology import Topology, slice_of
from softmask_jax.diffusion.vocab.positions import SCOPE
from softmask_jax.samplers.options import Options

ROOT = Path(__file__).parent.parent.parent
SMALL = ["--config=configs/stdlib.py:smoke", "--vocab_size=258"]


@pytest.mark.parametrize("name, chips, gib", [("v5e:4x4", 16, 16), ("v6e:1x1", 1, 32), ("v5p:2x2x1", 4, 95), ("v4:2x2x2", 8, 32)])
def test_a_slice_has_so_many_chips_of_so_much_memory(name, chips, gib):
    topology = Topology(name)
    assert (topology.chips, topology.memory) == (chips, gib * 2**30)


@pytest.mark.parametrize("name", ["v5e", "v7:2x2", "v5e:4", "v5e:4x0", "4x4", "v5e:4x4 "])
def test_another_name_is_refused_with_an_example(name):
    with pytest.raises(ValueError, match="is no TPU slice; write one of v4, v5e, v5p, v6e and its shape: v5e:4x4"):
        Topology(name)


@pytest.mark.parametrize("kind", ["v4", "v5e", "v5p", "v6e"])
def test_a_number_of_chips_has_a_slice_of_as_many(kind):
    assert all(slice_of(kind, chips).chips == chips for chips in (1, 4, 16, 64, 256))
    with pytest.raises(ValueError, match="a slice of 5 chips is none of 1, 4, 8"):
        slice_of(kind, 5)


@pytest.mark.parametrize("message, needed, free", [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (63.48G) exceeds "
     "available HBM (15.75G).", 63.48, 15.75),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.10G of 15.75G "
     "hbm. Exceeded hbm capacity by 4.35G.", 20.10, 15.75),
])
def test_the_compilers_word_that_memory_is_short_becomes_figures(message, needed, free):
    found = out_of_memory(message)
    assert [size / 2**30 for size in found] == pytest.approx([needed, free])
    assert out_of_memory("INVALID_ARGUMENT: something else (3G)") is None


def run(*arguments: str, cache: Path, compiler: bool = True) -> subprocess.CompletedProcess:
    """The command as a process of its own."""
    # As quiet as it is for a user.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_LOG_LEVEL")}
    if not compiler:  # nor where an earlier test of this process has found it
        environment = {name: value for name, value in environment.items() if name != "PYTHONPATH" and "TPU" not in name}
    environment["SOFTMASK_JAX_CACHE"] = str(cache)
    command = [sys.executable, "-m", "softmask_jax.compile", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """What the command prints in this process, where the compiler is loaded once; its cache is `tmp_path`."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("SOFTMASK_JAX_CACHE", str(tmp_path))

    def printed(*arguments: str) -> str:
        assert __main__.main([*arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return printed


@pytest.mark.parametrize("arguments, said", [
    (["--config=configs/none.py", "--topology=v5e:2x2"], "No config file at 'configs/none.py'"),
    ([*SMALL, "--topology=v9:2x2"], "is no TPU slice"),
    ([*SMALL, "--topology=v5e:2x2", "--config.train.stepz=3"], "nearest is 'steps'"),
    ([*SMALL, "--sweep", "--kinds=v5e", "--chips=5"], "a slice of 5 chips is none of 1, 4"),
])
def test_a_wrong_command_is_one_line(arguments, said, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert __main__.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ") and said in line


@pytest.mark.parametrize("arguments", [[], SMALL, [*SMALL, "--sweep", "--topology=v5e:2x2"]])
def test_a_command_says_what_is_to_be_compiled(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        __main__.main(arguments)
    assert "required" in capsys.readouterr().err


@pytest.mark.full
def test_without_the_compiler_it_says_what_to_install(tmp_path):
    done = run(*SMALL, "--topology=v5e:2x2", compiler=False, cache=tmp_path)
    assert done.returncode == 1 and "pip install 'softmask_jax[aot]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.full
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5e:1x1"])
def test_a_small_model_fits_a_slice_and_one_chip(topology, printed, tmp_path):
    said = printed(*SMALL, f"--topology={topology}", f"--json={tmp_path / 'memory.json'}")
    assert "fits, " in said and "parameters" in said and "No array of size B L V." in said
    report = json.loads((tmp_path / "memory.json").read_text())
    assert report["fits"] and report["flops"] > report["model_flops"] > 0 and report["hbm"] > 0
    assert bool(report["wire"]) == (topology == "v5e:2x2") and report["roofline"]["best_s"] > 0
    # What was compiled is not compiled again.
    assert len(list((tmp_path / "compiled").iterdir())) == 1
    assert json.loads(printed(*SMALL, f"--topology={topology}", "--json=-")) == report
    assert len(list((tmp_path / "compiled").iterdir())) == 1


@pytest.mark.full
def test_more_chips_than_rows_get_a_row_each_as_a_process_says(tmp_path):
    done = run(*SMALL, "--topology=v6e:4x4", cache=tmp_path)
    assert done.returncode == 0 and "16 rows of 32 tokens in 1 micro-batches, mesh data=16" in done.stdout


@pytest.mark.full
@pytest.mark.parametrize("sampler", [["--generate"], ["--generate=entropy"],
                                     ["--generate=confidence_threshold", "--block_length=8"]])
def test_generation_compiles_for_a_slice_and_never_holds_all_logits(sampler, printed):
    said = printed(*SMALL, "--topology=v5e:2x2", *sampler, "--rows=8", "--length=32", "--steps=8")
    assert "Sampler" in said and "No array of size B L V." in said


@pytest.mark.full
def test_several_numbers_of_rows_make_a_table_of_a_sampler(printed):
    said = printed(*SMALL, "--topology=v5e:1x1", "--generate=entropy", "--rows=2,4", "--length=32", "--steps=8")
    assert "DreamSampler on v5e:1x1, 32 new tokens of 32 a row, 8 network calls" in said
    assert [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("|")] == ["rows", "----", "2", "4"]


def test_several_numbers_of_rows_are_for_a_sampler(capsys):
    with pytest.raises(SystemExit, match="2"):
        __main__.main([*SMALL, "--topology=v5e:2x2", "--rows=8,16"])
    assert "several --rows need --generate" in capsys.readouterr().err


def test_a_slices_calls_see_the_masks_of_their_block_and_the_first_call_of_a_block_is_no_slice():
    sizes = programs.DREAM_7B | {"num_hidden_layers": 1, "vocab_size": 1024, "mask_token_id": 1023}
    options = Options(alg="entropy", steps=32, block_length=8, cache="dual")
    config = schema.load("configs/dream7b.py", ["mesh.fsdp=1"])
    program = programs.generation(config, jax.devices()[:1], options, rows=4, length=64, prompt_length=32, sizes=sizes)
    loops = Loops(dataclasses.replace(program, dense_block=lambda positions: 8), 1)
    assert (program.calls, program.blocks) == (32, 4)
    assert loops.of_jaxpr("", 0) == 4 and loops.of_jaxpr("", 1) == 7  # 8 calls a block
    # 4 rows of 32 masks at first, 16 blocks of 8 positions; in a slice 4 rows of 8.
    assert (loops.of_jaxpr(SCOPE, 1), loops.of_jaxpr(SCOPE, 2)) == ((16 + 1) / 2, (4 + 1) / 2)


def test_twice_the_rows_are_twice_the_work_of_a_sampler_whether_or_not_a_slices_positions_are_one_block():
    options = Options(alg="entropy", steps=64, block_length=32, cache="dual")
    config = schema.load("configs/dream7b.py", ["mesh.fsdp=1"])

    def work(rows: int) -> float:
        program = programs.generation(config, jax.devices()[:1], options, rows=rows, length=256, prompt_length=128)
        assert (program.dense_block(rows * 32) < rows * 32) == (rows == 16)
        return flops.count(flops.live(program.traced.jaxpr), Loops(program, 1).of_jaxpr)

    assert work(16) == pytest.approx(2 * work(8), rel=0.1)


def test_full_fine_tuning_keeps_16_bytes_a_weight_cut_over_the_chips():
    config = schema.load("configs/dream7b.py", ["model.adapter=none"])
    shape = {"num_hidden_layers": 1, "vocab_size": 1024, "mask_token_id": 1023}
    program = programs.training(config, jax.devices()[:8], sizes=programs.DREAM_7B | shape, length=128)
    kept = {name: programs.bytes_per_chip(tree) * 8 / program.denoiser.num_params for name, tree in program.parts.items()}
    del kept["batch"]
    assert kept == {"base": 0, **{name: pytest.approx(size, rel=1e-3) for name, size in dict(params=4, ema=4, optimizer=8).items()}}


@pytest.mark.soak
def test_full_fine_tuning_of_dream_7b_fits_sixteen_of_the_smallest_chips(tmp_path):
    arguments = ["--config=configs/dream7b.py", "--config.model.adapter=none", "--config.model.remat=full", "--topology=v5e:4x4"]
    done = run(*arguments, f"--json={tmp_path / 'memory.json'}", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "memory.json").read_text())["kept"]
    assert sum(kept.values()) == pytest.approx(16 * 7_615_616_512 / 16, rel=1e-3) and "of 16: fits" in done.stdout


@pytest.mark.soak
def test_the_two_pass_step_of_dream_7b_fits_the_smallest_chips(tmp_path):
    arguments = ["--config=configs/dream7b.py", "--config.model.remat=full", "--topology=v5e:4x4"]
    done = run(*arguments, f"--json={tmp_path / 'memory.json'}", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "16 rows of 2048 tokens" in done.stdout and "7,625,938,432 parameters" in done.stdout
    report = json.loads((tmp_path / "memory.json").read_text())
    assert report["memory"]["temporary"] <= 3 * 2**30 and not report["logits"]
    # Three times, at least, each chip is sent the other fifteen sixteenths of the frozen layers.
    assert sum(report["wire"].values()) > 3 * 15 / 16 * 13e9
