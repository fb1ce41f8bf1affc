"""iso_flops: the cost of an update against the operations of its own program; what a run records, and keeps to."""
import dataclasses
import json

import jax
import pytest

from softmask_jax import config
from softmask_jax.compile import flops
from softmask_jax.io import run_log
from softmask_jax.models import denoiser
from softmask_jax.training import update_flops
from softmask_jax.training.loop import train
from softmask_jax.training.update_flops import budgeted
from tests.helpers.tiny_run import settings, write_texts


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_plain_update_costs_in_forward_passes_what_its_program_computes(remat):
    wanted = config.from_dict({
        "model": {"hidden_size": 64, "num_blocks": 3, "num_heads": 2, "cond_dim": 8, "compute_dtype": "float32",
                  "remat": remat}, "data": {"seq_len": 64},
    })  # fmt: skip
    network = denoiser.build(wanted.model, wanted.soft_mask, vocab_size=40, mask_token_id=39)
    tokens, params = jax.ShapeDtypeStruct((2, 64), "int32"), denoiser.abstract(network)["backbone"]

    def forward(params, tokens):
        hidden, _ = network.trunk(params, network.embed(params, tokens), sigma=jax.numpy.zeros(2))
        return (hidden @ network.head(params).weight.T).sum()

    one = flops.count(jax.make_jaxpr(forward)(params, tokens))
    both = flops.count(jax.make_jaxpr(jax.value_and_grad(forward))(params, tokens))
    assert update_flops.plain_passes(network, wanted.model, 64) == pytest.approx(both / one, rel=0.05)


def asked(folder, steps):
    return config.from_dict(settings(
        folder, train__steps=steps, train__budget="iso_flops", model__remat="full", soft_mask__p_sm=1.0, eval__every=0,
        checkpoint__every=1_000,
    ))  # fmt: skip


def test_a_budget_is_settled_with_the_network_once(tmp_path):
    wanted = asked(tmp_path, 4_000)
    network = denoiser.build(wanted.model, wanted.soft_mask, vocab_size=258, mask_token_id=257)
    passes, found = update_flops.plain_passes(network, wanted.model, 16), update_flops.budgeted(wanted, network)
    # The head, which is not run again, is most of so small a network.
    assert 3.3 < passes < 3.5 and found.updates == round(4_000 * passes / (passes + 1)) < wanted.updates
    assert update_flops.budgeted(wanted.with_updates(7), network).updates == 7


def small(wanted):
    """A network whose updates can be counted."""
    model = dataclasses.replace(wanted.model, hidden_size=64, num_blocks=3, num_heads=2, cond_dim=8)
    return denoiser.build(model, wanted.soft_mask, vocab_size=40, mask_token_id=39)


def test_with_epochs_the_data_decide_and_a_run_keeps_the_number_while_they_are_the_same():
    wanted = config.from_dict({"train": {"steps": 6, "epochs": 2.5}, "optimizer": {"warmup_steps": 10}})
    assert not wanted.counted and config.from_dict({}).counted
    settled = budgeted(wanted, network := small(wanted), 40.0)
    assert settled.counted and settled.train.steps == settled.updates == 100
    assert settled.schedule.warmup_steps == 3 and config.from_dict({"optimizer": {"warmup_steps": 1}}).schedule.warmup_steps == 1
    assert budgeted(wanted, network, 0.1).updates == 1
    # The number of the stored run, before the data are read and after.
    continued = config.begun(wanted, settled.to_dict())
    assert continued == settled and budgeted(continued, network, 40.0) == settled
    assert budgeted(continued, network, 80.0).updates == 200
    # Other epochs, or steps again.
    for override, updates in (({"epochs": 3.0}, 120), ({"epochs": 0.0}, 6)):
        other = dataclasses.replace(wanted, train=dataclasses.replace(wanted.train, **override))
        assert budgeted(config.begun(other, settled.to_dict()), network, 40.0).updates == updates


@pytest.mark.parametrize("budget, updates", [("iso_flops", 79), ("iso_compute_paper", 50), ("iso_update", 100)])
def test_a_budget_is_that_of_a_binary_run_of_as_many_epochs(budget, updates):
    wanted = config.from_dict({"train": {"epochs": 2.0, "budget": budget}, "data": {"seq_len": 16}})
    settled = budgeted(wanted, small(wanted), 50.0)
    assert (settled.train.steps, settled.updates) == (100, updates)
    assert config.begun(wanted, settled.to_dict()) == settled


@pytest.mark.full
def test_a_run_counts_with_its_own_network_records_the_number_and_keeps_to_it(tmp_path):
    write_texts(tmp_path / "texts")
    folder, wanted = tmp_path / "run", asked(tmp_path, 40)
    done = train(wanted, str(folder))
    stored = json.loads((folder / "config.json").read_text())
    # With 3 forward passes an update, or 4, it would be 30 or 32.
    assert done["step"] == stored["train"]["updates"] == 31
    assert train(wanted, str(folder))["step"] == 31
    # A run of before the number was recorded has its 30, here and in what is said of it.
    del stored["train"]["updates"]
    (folder / "config.json").write_text(json.dumps(stored))
    assert run_log.read(folder).planned == 30
    assert train(asked(tmp_path, 42), str(folder))["step"] == 32
