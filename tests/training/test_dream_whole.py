"""Dream trained as a whole, without an adapter, at toy size; and a fine-tuning that is killed."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import softmask_jax
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.io import tree_files
from softmask_jax.io.checkpoint import Checkpoints
from tests.helpers.dream_workshop import arrays, arrays_of_model, workshop  # noqa: F401 (fixtures)
from tests.helpers.xla_flags import ONE_DEVICE

WHOLE = ("model.adapter=none", "sample.count=0", "sample.every=0", "eval.every=0", "checkpoint.every=2")


@pytest.fixture(scope="module")
def whole(workshop):
    """A run in which all of a bfloat16 base was trained."""
    return workshop.run("whole", *WHOLE, "train.steps=4")[0]


@pytest.mark.full
def test_full_fine_tuning_of_a_bfloat16_base_moves_every_kernel_in_float32(workshop, whole):
    base, now = arrays_of_model(workshop.folder / "model"), arrays(whole, 4, ("params", "ema", "optimizer"))
    backbone = [name for name in base if "/backbone/" in name]
    assert set(backbone) <= now.keys() and {base[name].dtype.name for name in backbone} == {"bfloat16"}
    assert {value.dtype.name for value in now.values()} == {"float32", "int32"}
    for name in backbone:
        moved = np.abs(now[name] - base[name].astype(np.float32))
        assert moved.max() < 4e-5  # four updates at a rate of 1e-5
        assert "kernel" not in name or np.mean(moved > 0) > 0.99


@pytest.mark.full
def test_a_run_that_trained_in_bfloat16_goes_on_in_float32_and_is_loaded_and_converted(workshop, whole, caplog):
    old = shutil.copytree(whole, workshop.folder / "old")
    (old / "summary.json").unlink()
    shutil.rmtree(old / "checkpoints" / "4")
    trees = tree_files.read_trees(old / "checkpoints" / "2", tree_files.TREES)
    cursor = tree_files.read_json(old / "checkpoints" / "2", verified=True)["cursor"]
    shutil.rmtree(old / "checkpoints" / "2")
    narrow = lambda x: x.astype("bfloat16") if x.dtype == "float32" and x.ndim else x  # noqa: E731
    with Checkpoints(old / "checkpoints") as checkpoints:
        checkpoints.save(2, jax.tree.map(narrow, trees), cursor)
    assert convert([f"--src={old}", f"--dst={workshop.folder / 'old-hf'}", "--to=hf", "--verify"]) == 0
    np.testing.assert_array_equal(*(softmask_jax.load(run, step=2).logits([[1, 2, 3]]) for run in (old, whole)))
    with caplog.at_level("INFO", "softmask_jax"):
        _, summary = workshop.run("old", *WHOLE, "train.steps=4")
    assert summary["step"] == 4 and "from bfloat16 as float32" in caplog.text
    now = arrays(old, 4, ("params", "ema", "optimizer"))
    assert {value.dtype.name for value in now.values()} == {"float32", "int32"}


@pytest.mark.full
def test_a_whole_model_is_exported_and_used_in_the_dtype_of_its_config(workshop, whole):
    again = workshop.folder / "whole-again"
    assert convert([f"--src={whole}", f"--dst={workshop.folder / 'whole-hf'}", "--to=hf", "--verify"]) == 0
    tensors = load_file(workshop.folder / "whole-hf" / "model.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {"bfloat16"}
    assert json.loads((workshop.folder / "whole-hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    saved = arrays(whole, 4, ("ema",))["ema/layers/up/kernel"]
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.up_proj.weight"].T, saved[1].astype("bfloat16"))
    assert convert([f"--src={workshop.folder / 'whole-hf'}", f"--dst={again}", "--verify"]) == 0
    np.testing.assert_array_equal(softmask_jax.load(whole).logits([[1, 2, 3]]), softmask_jax.load(again).logits([[1, 2, 3]]))


@pytest.mark.full
@pytest.mark.parametrize("moments", [1, pytest.param(4, marks=pytest.mark.soak)])
def test_a_fine_tuning_killed_at_random_moments_ends_with_the_same_bits(workshop, moments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ONE_DEVICE}

    def command(name):
        overrides = [f"--config.{override}" for override in workshop.overrides()]
        return [
            sys.executable, "-m", "softmask_jax.main", "--config=configs/dream7b.py:smoke",
            f"--workdir={workshop.folder / name}", *overrides, "--config.checkpoint.every=1", "--config.eval.every=2",
        ]  # fmt: skip

    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(f"unkilled{moments}"), check=True, **quiet)
    random, checkpoints = np.random.default_rng(), workshop.folder / f"killed{moments}" / "checkpoints"
    for step in range(1, moments + 1):
        process = subprocess.Popen(command(f"killed{moments}"), **quiet)
        while process.poll() is None and max((int(path.name) for path in checkpoints.glob("[0-9]")), default=0) < step:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command(f"killed{moments}"), check=True, **quiet)
    names = f"killed{moments}", f"unkilled{moments}"
    ours, theirs = (arrays(workshop.folder / name, 6, ("params", "ema", "optimizer")) for name in names)
    assert ours.keys() == theirs.keys() and all(value.tobytes() == theirs[name].tobytes() for name, value in ours.items())
    said = [json.loads((workshop.folder / name / "summary.json").read_text()) for name in names]
    assert said[0]["validation"] == said[1]["validation"]
