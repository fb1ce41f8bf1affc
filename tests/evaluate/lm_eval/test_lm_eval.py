"""lm-evaluation-harness by its own command line, on local tasks."""
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import jax
import numpy as np
import pytest

import softmask_jax
from softmask_jax.evaluate.lm_eval.__main__ import completed, main
from softmask_jax.io.answers import Hosts
from tests.helpers.harness import (  # noqa: F401
    LOADED, by_name, lm, mdlm, over_all_orders, requests, results, samples, write_task,
)

pytest.importorskip("lm_eval", reason="pip install 'softmask_jax[eval]'")


def test_its_command_line_runs_every_kind_of_request_on_local_tasks(mdlm, tmp_path, capsys):
    prompts = ["ab", "xyz", "q "]
    masks = [np.array([[256, *text.encode(), *[257] * 6]]) for text in prompts]
    alone = [mdlm.generate(row, key=jax.random.key(0), alg="entropy", steps=6, soft_mask="none").tokens for row in masks]
    written = [mdlm.decode(np.asarray(tokens)[:, -6:])[0].split("<|endoftext|>")[0] for tokens in alone]
    generation = write_task(
        tmp_path, "written", [{"q": q, "a": a} for q, a in zip(prompts, [*written[:2], "nothing of the kind"])],
        output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["\0never"], "max_gen_toks": 6, "do_sample": False},
    )  # fmt: skip
    questions = [{"q": f"is {i}?", "choices": ["ab", "q", "yes"], "gold": i % 3} for i in range(5)]
    choice = write_task(
        tmp_path, "chosen", questions, output_type="multiple_choice", doc_to_text="{{q}}", doc_to_target="gold",
        doc_to_choice="choices", metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    texts = ["a few", "some more bytes than the model has positions"]
    rolling = write_task(
        tmp_path, "texts", [{"text": text} for text in texts], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[{"metric": "bits_per_byte"}],
    )  # fmt: skip
    words = ["--model_args", "checkpoint=mdlm,alg=entropy,soft_mask=none,mc_num=127,max_length=16"]
    words += ["--tasks", ",".join([generation, choice, rolling]), "--output_path", str(tmp_path / "out"), "--log_samples"]
    assert main([*words, "--use_cache", str(tmp_path / "kept")]) == 0
    assert "softmask_jax" in capsys.readouterr().out
    found = results(tmp_path / "out")
    assert found["results"]["written"]["exact_match,none"] == pytest.approx(2 / 3)
    assert found["config"]["model"] == "softmask_jax" and found["config"]["model_step"] == 8
    answers = {row["doc_id"]: row["resps"][0][0] for row in samples(tmp_path / "out", "written")}
    assert answers == dict(enumerate(written))
    bounds = [
        [over_all_orders(mdlm, [256, *row["q"].encode()], list(f" {choice}".encode())) for choice in row["choices"]]
        for row in questions
    ]  # fmt: skip
    right = [int(np.argmax(nats)) == row["gold"] for nats, row in zip(bounds, questions)]
    assert found["results"]["chosen"]["acc,none"] == pytest.approx(np.mean(right))
    for row in samples(tmp_path / "out", "chosen"):
        given = [float(answer[0][0]) for answer in row["resps"]]
        np.testing.assert_allclose(given, bounds[row["doc_id"]], rtol=1e-4)
    nats = {row["doc_id"]: float(row["resps"][0][0]) for row in samples(tmp_path / "out", "texts")}
    assert nats[0] == pytest.approx(over_all_orders(mdlm, [256], list(texts[0].encode())), rel=1e-4)
    assert found["results"]["texts"]["bits_per_byte,none"] == pytest.approx(
        -sum(nats.values()) / sum(map(len, texts)) / math.log(2)
    )
    # All answers are there: with a model that cannot be used the same numbers come again.
    LOADED["broken"] = softmask_jax.Model(mdlm.config, mdlm.tokenizer, mdlm.denoiser, None, 8)
    words = [word.replace("=mdlm", "=broken").replace(str(tmp_path / "out"), str(tmp_path / "again")) for word in words]
    assert main([*words, "--use_cache", str(tmp_path / "kept"), "--limit", "2"]) == 0
    again = results(tmp_path / "again")
    assert again["results"]["chosen"]["acc,none"] == pytest.approx(np.mean(right[:2]))
    assert again["results"]["written"]["exact_match,none"] == 1.0


def test_a_text_longer_than_the_model_is_the_sum_of_its_windows(mdlm):
    model = lm("mdlm", max_length=6, mc_num=31, soft_mask="none")
    text = b"abcdefghijkl"
    found, = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text.decode(),)), disable_tqdm=True)
    # Five tokens behind BOS, five behind the token before them, and the last two behind as much as there is room for.
    windows = [([256], text[:5]), (text[4:5], text[5:10]), (text[6:10], text[10:])]
    assert found == pytest.approx(sum(over_all_orders(mdlm, [*a], [*b]) for a, b in windows), rel=1e-4)


def test_a_model_without_a_chat_template_says_so(mdlm, tmp_path, capsys):
    task = write_task(tmp_path, "t", [{"q": "a"}], output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{q}}",
                      metric_list=[{"metric": "exact_match"}])  # fmt: skip
    assert main(["--model_args", "checkpoint=mdlm", "--tasks", task, "--apply_chat_template"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "Error: This model has no chat template; leave --apply_chat_template out."
    )


@pytest.mark.parametrize("words, said", [
    (["--model_args", "checkpoint=nowhere"], "No model in 'nowhere'"),
    (["--model_args", "checkpoint=mdlm,stepz=4"], "has no 'stepz'; the nearest is 'step'"),
    (["--model_args", "checkpoint=mdlm,max_length=4096"], "max_length=4096 is above the model's 24"),
    (["--model_args", "checkpoint=mdlm,eta=0.1"], "eta is an option of other samplers; 'mdlm' has none"),
])  # fmt: skip
def test_a_command_line_that_cannot_be_is_one_line(mdlm, tmp_path, capsys, words, said):
    task = write_task(tmp_path, "t", [{"q": "a"}], output_type="loglikelihood_rolling", doc_to_text="",
                      doc_to_target="{{q}}", metric_list=[{"metric": "bits_per_byte"}])  # fmt: skip
    assert main([*words, "--tasks", task]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and said in errors[0]


def test_without_the_harness_the_command_says_what_to_install(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["--tasks", "gsm8k"]) == 1
    assert "pip install 'softmask_jax[eval]'" in capsys.readouterr().err


def test_the_model_and_the_batch_go_without_saying():
    assert completed(["--tasks", "a"]) == ["run", "--batch_size", "auto", "--model", "softmask_jax", "--tasks", "a"]
    assert completed(["run", "-M=dummy", "--batch_size=3"]) == ["run", "-M=dummy", "--batch_size=3"]
    assert completed(["--config", "a.yaml"])[:3] == ["run", "--model", "softmask_jax"]
    assert completed(["ls", "tasks"]) == ["ls", "tasks"]


def test_rows_at_a_time_are_the_arguments_before_the_harness_s(mdlm):
    from softmask_jax.evaluate.lm_eval.model import SoftmaskLM

    for own, size, expected in (({}, "auto", 8), ({}, 3, 3), ({"batch_size": 5}, 3, 5)):
        model = SoftmaskLM.create_from_arg_obj({"checkpoint": "mdlm", **own}, {"batch_size": size, "device": None})
        assert model.arguments.model.batch_size == expected
    model = SoftmaskLM.create_from_arg_string("checkpoint=mdlm,steps=1/2,batch_size=5", {"batch_size": 3})
    given = model.arguments
    assert (given.share, given.model.batch_size) == (Fraction(1, 2), 5)


def test_hosts_share_the_requests_and_all_get_all_results(mdlm, tmp_path):
    def asked():
        again, other = requests("generate_until", ("ab", {"max_gen_toks": 4, "do_sample": True}), ("q", {"max_gen_toks": 3}))
        return {
            "generate_until": [again, other, again], "loglikelihood": requests("loglikelihood", ("ab", " c"), ("", "x"), ("a", " d")),
            "loglikelihood_rolling": requests("loglikelihood_rolling", ("",), ("some more bytes than there are positions",)),
        }  # fmt: skip

    def answers(model, kind):
        return getattr(model, kind)(asked()[kind], disable_tqdm=True)

    alone, told = lm("mdlm", mc_num=7), {}
    hosts = [lm("mdlm", mc_num=7) for _ in range(2)]
    for process, model in enumerate(hosts):
        model.hosts, model.folder = Hosts(process, 2), tmp_path
    for kind in asked():
        with ThreadPoolExecutor(2) as pool:
            told[kind] = list(pool.map(lambda model: answers(model, kind), hosts))
    assert told["generate_until"] == [answers(alone, "generate_until")] * 2
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        assert told[kind][0] == told[kind][1]
        np.testing.assert_allclose(np.array(told[kind][0], float), np.array(answers(alone, kind), float), rtol=1e-5)
    # The same command goes on: nothing is asked of the model again.
    hosts[0].likelihood = None
    assert answers(hosts[0], "loglikelihood") == told["loglikelihood"][0]
