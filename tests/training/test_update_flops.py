"""iso_flops: the cost of an update against the operations of its own program; what a run records, and keeps to."""
import json

import jax
import pytest

from softmask_jax import config
from softmask_jax.compile import flops
from softmask_jax.io import run_log
from softmask_jax.models import denoiser
from softmask_jax.training import update_flops
from softmask_jax.training.loop import train
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

    one = flops.count(jax.make_jaxpr(forward)(params, tokens)).flops
    both = flops.count(jax.make_jaxpr(jax.value_and_grad(forward))(params, tokens)).flops
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
