"""Our step beside PyTorch's at toy sizes: the same loss from the same parameters and noise; what is reported."""
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from softmask_jax.benchmarks import against_torch, two_pass
from softmask_jax.benchmarks.against_torch import OURS, TORCH, first_losses, random_step, write_start
from softmask_jax.benchmarks.in_turn import Worker
from softmask_jax.benchmarks.random_step import Shape, Sizes
from tests.helpers import torch_weights

SIZES, SHAPE = Sizes(batch=4, seq_len=32, head_width=16), Shape(32, 2, 300)
NOISE = {"tokens", "xt.0", "xt.1", "weights.0", "weights.1"}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """(our step's parameters, its first losses with one pass and two, the file for PyTorch)."""
    path = str(tmp_path_factory.mktemp("start") / "start.safetensors")
    step = random_step(SIZES, SHAPE)
    write_start(path, step, SHAPE)
    params = jax.tree.map(np.array, step.state.params)
    return params, first_losses(step, 1, 2), path


@pytest.mark.full
def test_pytorch_gets_our_parameters_under_its_own_names(started):
    params, _, path = started
    tensors = load_file(path)
    again = torch_weights.from_torch({name: x for name, x in tensors.items() if name not in NOISE}, SHAPE.num_blocks)
    # Rows of the padding are not handed over.
    vocabulary = {"table": params["backbone"]["embed"], "weight": (head := params["backbone"]["head"]), "bias": head}
    for name, tree in vocabulary.items():
        tree[name][SHAPE.vocab_size :] = 0
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert ((tensors["xt.0"] == SHAPE.vocab_size - 1) == (tensors["weights.0"] > 0)).all()


@pytest.mark.full
@pytest.mark.parametrize("loss", TORCH)
def test_pytorchs_loss_is_ours_with_one_pass_and_with_two(started, loss):
    pytest.importorskip("torch", reason="pip install 'softmask_jax[bench]'")
    from softmask_jax.benchmarks import torch_step

    _, ours, path = started
    settings = against_torch.settings_for_torch(against_torch.config_of(SIZES, SHAPE), SHAPE, "cpu", path)
    trainer = torch_step.Trainer(settings | {"loss": loss})
    theirs = trainer.losses(1, 2)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert abs(trainer.losses(1, 1)[1] - theirs[1]) > 3e-3  # the feedback matters
    before = trainer.backbone.output_layer.linear.bias.clone()
    for passes in (1, 2, 1):
        assert np.isfinite(trainer.step(passes))
    assert (trainer.backbone.output_layer.linear.bias != before).any()


@pytest.mark.full
def test_the_command_measures_all_steps_in_turn_and_prints_their_peak_memory(tmp_path, capsys):
    pytest.importorskip("torch", reason="pip install 'softmask_jax[bench]'")
    words = ["--against=torch", "--shapes=32x2x300", "--seq_len=32", "--head_width=16", "--steps=2"]
    assert two_pass.main([*words, f"--json={tmp_path / 'out'}"]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "out").read_text())
    (row,) = found["against_torch"]
    assert list(row["steps"]) == [OURS, *TORCH]
    for step in row["steps"].values():
        assert step["peak_bytes"] > 2**26
        assert step["one_pass"]["seconds"]["calls"] == step["two_pass"]["seconds"]["calls"] == 2
    assert len([line for line in printed.splitlines() if line.startswith("|")]) == 2 * (2 + 3)
    for part in ("PyTorch, SUBS", "tokens/s", "peak memory, MiB", row["torch"]):
        assert part in printed


@pytest.mark.full
def test_our_process_answers_until_its_pipe_is_closed(tmp_path, started):
    settings = {"sizes": vars(SIZES), "shape": SHAPE, "device": "cpu", "start": str(tmp_path / "start.safetensors")}
    with Worker("softmask_jax.benchmarks.against_torch", settings) as worker:
        np.testing.assert_allclose(worker.ask("losses", 1, 2), started[1], rtol=1e-6)
        assert worker.ask("step", 2) > 0 and worker.ask("peak") > 2**26
    assert set(load_file(tmp_path / "start.safetensors")) == set(load_file(started[2]))


def test_a_process_that_has_ended_is_an_error_that_says_so(capfd):
    with Worker("softmask_jax.no_such", {}) as worker, pytest.raises(RuntimeError, match="exit status 1 instead"):
        worker.ask("losses", 1, 2)
    assert "No module named 'softmask_jax.no_such'" in capfd.readouterr().err


def test_losses_that_differ_are_refused():
    losses = {name: [8.0, 10.0] for name in (OURS, *TORCH)}
    against_torch.check_losses(losses, "float32")
    with pytest.raises(ValueError, match="two_pass loss is 10.000000 here and 10.001000 in PyTorch, cross-"):
        against_torch.check_losses(losses | {"cross_entropy": [8.0, 10.001]}, "float32")


def test_without_pytorch_the_command_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(against_torch.importlib.util, "find_spec", lambda name: None)
    assert two_pass.main(["--against=torch"]) == 1
    assert capsys.readouterr().err == "Error: --against=torch needs PyTorch: pip install 'softmask_jax[bench]'\n"
