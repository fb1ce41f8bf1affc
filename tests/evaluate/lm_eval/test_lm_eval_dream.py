"""lm-evaluation-harness with a Dream: chats by its template, likelihoods with its shift, greedy answers."""
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from softmask_jax.convert import tiny_dream
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.evaluate.lm_eval.__main__ import main
from softmask_jax.samplers import Options
from tests.helpers.harness import (  # noqa: F401
    LOADED, by_name, dream, lm, over_all_orders, requests, results, samples, write_task,
)
from tests.helpers.host_processes import begin, finish

pytest.importorskip("lm_eval", reason="pip install 'softmask_jax[eval]'")


def test_a_chat_is_rendered_by_the_model_s_template_and_asked_as_the_model_encodes_it(dream, tmp_path):
    task = write_task(
        tmp_path, "chat", [{"q": "one", "a": "two"}, {"q": "three", "a": "four <|im_end|>"}], output_type="generate_until",
        doc_to_text="{{q}}", doc_to_target="{{a}}", metric_list=[{"metric": "exact_match"}], fewshot_split="test",
        generation_kwargs={"until": [], "max_gen_toks": 4, "do_sample": False},
    )  # fmt: skip
    asked = []
    watched = lambda tokens, mask, **how: asked.append((tokens, mask)) or dream.fill(tokens, mask, **how)  # noqa: E731
    names = [name for name in dir(dream) if not name.startswith("__") and name != "fill"]
    LOADED["watched"] = SimpleNamespace(fill=watched, **{
        name: getattr(dream, name) for name in names if name not in ("_logits", "_unshifted")
    })  # fmt: skip
    task = json.loads(Path(task).read_text()) | {"num_fewshot": 1}
    (tmp_path / "chat.yaml").write_text(json.dumps(task))
    out = ["--output_path", str(tmp_path / "out"), "--log_samples"]
    words = ["--model_args", "checkpoint=watched,steps=1/2", "--tasks", str(tmp_path / "chat.yaml"), *out]
    assert main([*words, "--apply_chat_template", "--system_instruction", "Be brief."]) == 0
    (tokens, mask), = asked
    real = sorted(row[attended != 0].tolist() for row, attended in zip(tokens[:2], mask[:2]))
    turn = lambda role, content: {"role": role, "content": content}  # noqa: E731
    expected = []
    for (q, a), last in ((("three", "four <|im_end|>"), "one"), (("one", "two"), "three")):
        chat = [turn("system", "Be brief."), turn("user", q), turn("assistant", a), turn("user", last)]
        expected.append([*dream.encode_chat(chat).tolist(), *[dream.mask_token_id] * 4])
    assert real == sorted(expected)
    assert results(tmp_path / "out")["chat_template"] == dream.template.text


def test_an_open_answer_of_a_chat_is_gone_on_with(dream):
    model = lm("dream")
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer is"}]
    text = model.apply_chat_template(chat, add_generation_prompt=False)
    assert text.endswith("<|im_start|>assistant\nThe answer is")
    ids = model.tok_encode(text)
    assert ids == [*dream.encode_chat(chat[:1]).tolist(), *dream.tokenizer.encode("The answer is").tolist()]


def test_special_tokens_that_a_message_spells_out_stay_text(dream):
    model = lm("dream")
    chat = [{"role": "user", "content": "say <|im_end|> and <|mask|>"}]
    assert model.tok_encode(model.apply_chat_template(chat)) == dream.encode_chat(chat).tolist()
    assert dream.mask_token_id not in model.tok_encode(model.apply_chat_template(chat))


def test_dream_s_likelihood_is_the_mean_over_all_orders_and_its_greedy_answer_is_its_own(dream):
    model = lm("dream", mc_num=15, soft_mask="none", batch_size=4)
    context = "ab"
    ids = dream.tokenizer.encode(context).tolist()
    own = dream.fill(
        np.array([[*ids, *[dream.mask_token_id] * 2]]), keys=jax.random.split(jax.random.key(0), 1),
        options=Options("maskgit_plus", tokens_per_step=1, suppress_mask=True),
    )  # fmt: skip
    own = np.asarray(own.tokens)[0, 2:].tolist()
    other = [own[0], (own[1] + 1) % 90]
    asked = [(("", ""), ids, own), (("", ""), ids, other), (("", ""), ids, [])]
    found = model._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False, True] and found[2][0] == 0.0
    for (nats, _), (_, _, scored) in zip(found[:2], asked):
        assert nats == pytest.approx(over_all_orders(dream, ids, scored), rel=1e-4)
    assert not lm("dream", mc_num=1, check_greedy=False)._loglikelihood_tokens(asked[:1], disable_tqdm=True)[0][1]


@pytest.mark.full
def test_the_command_runs_offline_on_one_host_and_two_with_the_harness_s_own_tasks_around(dream, tmp_path, monkeypatch):
    tiny_dream.make(tmp_path, conversations=2)
    assert convert([f"--src={tmp_path / 'hf'}", f"--dst={tmp_path / 'model'}"]) == 0
    task = write_task(
        tmp_path, "sums", [{"q": "1 + 1 =", "a": "2"}] * 3, output_type="generate_until", doc_to_text="{{q}}",
        doc_to_target="{{a}}", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
    )  # fmt: skip
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    words = ["--tasks", task, "--apply_chat_template", "--model_args", f"checkpoint={tmp_path / 'model'},steps=1/2"]
    for hosts in (1, 2):
        command = [*words, "--log_samples", "--output_path", str(tmp_path / f"of-{hosts}")]
        printed = finish(begin("evaluate.lm_eval", hosts, *command, flags=True))
        assert sum("exact_match" in text for text in printed) == 1
    one, two = ([row["resps"] for row in samples(tmp_path / f"of-{hosts}", "sums")] for hosts in (1, 2))
    assert one == two and len(one) == 3 and len(list((tmp_path / "of-2.hosts").glob("generate_until-*.jsonl"))) == 1
    assert "exact_match,none" in results(tmp_path / "of-2")["results"]["sums"]


@pytest.mark.full
def test_several_devices_find_the_same(tmp_path):
    tiny_dream.make(tmp_path, conversations=2, sizes={"torch_dtype": "float32"})
    assert convert([f"--src={tmp_path / 'hf'}", f"--dst={tmp_path / 'model'}"]) == 0
    asked = requests("loglikelihood", ("hello", " wor"), ("a", " longer one"), ("", "x"))
    alone, *others = (
        lm(str(tmp_path / "model"), mc_num=9, batch_size=3, **mesh).loglikelihood(asked, disable_tqdm=True)
        for mesh in ({}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 8})
    )
    for found in others:
        assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in alone], rel=1e-5)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in alone]
