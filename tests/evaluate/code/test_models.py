"""HumanEval from checkpoint to pass@1 with real, tiny models: a Dream and a LLaDA that chat, a model of short windows."""
import dataclasses
import json
from fractions import Fraction

import jax
import pytest

import softmask_jax
from softmask_jax import config
from softmask_jax.data import ByteTokenizer
from softmask_jax.evaluate.code import sandbox
from softmask_jax.evaluate.code.task import CodeTask
from softmask_jax.models import denoiser
from softmask_jax.samplers import Options
from tests.helpers.chat_models import chat_model
from tests.helpers.sandbox_works import work
from tests.helpers.tiny_run import settings

pytestmark = pytest.mark.skipif(bool(sandbox.available()), reason=f"no sandbox here: {sandbox.available()}")
# Prompts are longer than this, so there is one shape; and a program cannot but be wrong.
SMOKE = {"prompt_tokens": 64, "max_new_tokens": 16, "steps": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("dream"), "dream")


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("llada"), "llada")


@pytest.fixture(scope="module")
def mdlm(tmp_path_factory):
    wanted, tokenizer = config.from_dict(settings(tmp_path_factory.mktemp("mdlm"))), ByteTokenizer()
    network = denoiser.build(wanted.model, wanted.soft_mask, vocab_size=258, mask_token_id=tokenizer.mask_token_id)
    return softmask_jax.Model(wanted, tokenizer, network, jax.jit(network.init)(jax.random.key(0)), 8)


SAMPLERS = {"llada": Options(alg="low_confidence", block_length=8, confidence_eos_eot_inf=True)}


def scored(folder, model, **more):
    with work(folder, model, **SMOKE | more) as unit:
        options = SAMPLERS.get(model.config.model.kind, Options(alg="entropy", temperature=0.1, top_p=0.9))
        unit = dataclasses.replace(unit, settings=dataclasses.replace(unit.settings, code_sampler=options))
        return CodeTask("humaneval").run(dataclasses.replace(unit, budget=Fraction(1, 2)))


@pytest.mark.parametrize("limit", [6, pytest.param(0, marks=pytest.mark.full)])
@pytest.mark.parametrize("name, kind", [("dream", "messages"), ("llada", "messages"), ("mdlm", "prompt")])
def test_humaneval_runs_from_a_model_to_pass_at_1_with_its_interval(request, tmp_path, name, kind, limit):
    result = scored(tmp_path, request.getfixturevalue(name), limit=limit)
    found, count = result.estimates["pass@1"], limit or 164
    assert found.count == count and 0 <= found.low <= found.value < found.high < 100
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text("utf-8").split("\n") if line]
    assert len(rows) == count and all(kind in row and row["calls"] == 2 for row in rows)
    assert sum(result.details["verdicts"].values()) == count and result.cost["calls"] == 2
