"""The harness's requests one by one, with a model that needs no network; what --model_args may say."""
from fractions import Fraction

import pytest

from softmask_jax.evaluate.lm_eval import arguments
from softmask_jax.samplers import Options, SoftMask
from tests.helpers.fake_model import FakeModel
from tests.helpers.harness import LOADED, by_name, lm, requests  # noqa: F401

pytest.importorskip("lm_eval", reason="pip install 'softmask_jax[eval]'")


@pytest.mark.parametrize("padding", ["left", "right"])
def test_answers_come_in_order_cut_at_stops_the_same_in_any_batch(padding):
    LOADED["fake"] = fake = FakeModel(padding)
    contexts = ["c" * 70, "a", "b" * 130, "", "bb", "c" * 71]
    how = {"until": ["q", "", "r"], "do_sample": False}
    asked = [(text, how | {"max_gen_toks": 20 + i % 2}) for i, text in enumerate(contexts)]
    found = {
        size: lm("fake", batch_size=size, seed=5).generate_until(requests("generate_until", *asked), disable_tqdm=True)
        for size in (1, 4)
    }  # fmt: skip
    assert found[1] == found[4] and len(set(found[1])) > 3
    assert not any(stop in text for text in found[1] for stop in "qr")
    backward = lm("fake", seed=5).generate_until(requests("generate_until", *asked[::-1]), disable_tqdm=True)
    assert backward == found[1][::-1]
    assert lm("fake", seed=6).generate_until(requests("generate_until", *asked), disable_tqdm=True) != found[1]
    assert {options.alg for options in fake.options} == {"mdlm"}


def test_repeats_of_a_request_are_drawn_anew_and_equal_ones_are_not():
    LOADED["fake"] = FakeModel()
    one, other = requests("generate_until", *[("text", {"until": [], "max_gen_toks": 9, "do_sample": True})] * 2)
    model = lm("fake")
    found = model.generate_until([one, one, other], disable_tqdm=True)
    assert found[0] != found[1] and found[0] == found[2]


def test_a_context_loses_its_beginning_where_it_is_too_long():
    LOADED["fake"] = fake = FakeModel("right")
    model = lm("fake", max_length=32)
    asked = ("x" * 30 + "end", {"until": [], "max_gen_toks": 20})
    (ask,) = [model._ask(*asked, repeat=0)]
    assert ask.pattern.tokens.tolist() == [256, *b"xxxxxxxxend", *[fake.mask_token_id] * 20]
    with pytest.raises(ValueError, match="32 new tokens leave no room for a prompt in the 32 positions"):
        model._ask("a", {"until": [], "max_gen_toks": 32}, repeat=0)


@pytest.mark.parametrize("given, asked, expected", [
    ({}, {"do_sample": False, "temperature": 0.7}, {"alg": "entropy", "steps": 16, "temperature": None}),
    ({}, {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 5},
     {"temperature": 0.7, "top_p": 0.8, "top_k": 5}),
    ({"temperature": 0.1, "top_p": 0.9, "steps": "1/4"}, {"do_sample": False, "temperature": 0.0},
     {"temperature": 0.1, "top_p": 0.9, "steps": 4}),
    ({"alg": "mdlm"}, {"do_sample": False, "temperature": 0.0}, {"steps": None, "temperature": None}),
    ({"alg": "mdlm", "steps": "1/2"}, {"do_sample": True, "temperature": 0.5, "top_p": 0.9},
     {"steps": 64, "temperature": 0.5, "nucleus_p": 0.9, "top_p": None}),
    ({"alg": "confidence_threshold", "threshold": 0.8, "block_length": 8}, {}, {"steps": None, "threshold": 0.8}),
])  # fmt: skip
def test_what_the_arguments_say_goes_before_what_a_task_says(given, asked, expected):
    LOADED["fake"] = FakeModel()
    LOADED["fake"].default_alg = "entropy"
    ask = lm("fake", **given)._ask("text", {"max_gen_toks": 16, **asked}, repeat=0)
    assert {name: getattr(ask.options, name) for name in expected} == expected
    assert (ask.pattern.tokens == FakeModel.mask_token_id).sum() == 16


def test_arguments_are_read_as_the_flags_of_generate_are():
    read = arguments.read({
        "checkpoint": "runs/a", "step": 4, "temperature": 1.0, "top_k": None, "soft_mask": "topk:3:linear", "steps": "3/4",
        "compat": False, "suppress_mask": True, "forbidden": [1, 2], "batch_size": "16", "alg": "entropy", "fsdp": 4,
        "trust_remote_code": True, "device": "cuda:0", "max_batch_size": 64,
    })  # fmt: skip
    assert (read.model.checkpoint, read.model.step, read.model.batch_size, read.share) == ("runs/a", 4, 16, Fraction(3, 4))
    assert read.options == Options("entropy", temperature=1.0, soft_mask=SoftMask("topk", 3, "linear"),
                                   suppress_mask=True, forbidden=(1, 2))  # fmt: skip
    assert read.mesh.fsdp == 4 and arguments.read({"checkpoint": "a"}).mesh is None
    assert read.options_for("mdlm", 512).steps == 384


@pytest.mark.parametrize("given, said", [
    ({}, "needs checkpoint=FOLDER"),
    ({"checkpoint": "a", "temperatur": 1}, "has no 'temperatur'; the nearest is 'temperature'"),
    ({"checkpoint": "a", "steps": "5/4"}, "5/4 is no share of the steps"),
    ({"checkpoint": "a", "steps": "many"}, "steps"),
    ({"checkpoint": "a", "soft_mask": "topq"}, "topq"),
    ({"checkpoint": "a", "alg": "best"}, "best"),
    ({"checkpoint": "a", "mc_num": 0}, "mc_num must be at least 1, not 0"),
    ({"checkpoint": "a", "seed": -1}, "seed must be in"),
    ({"checkpoint": "a", "steps": "1/2", "tokens_per_step": 2}, "leave --steps out"),
])  # fmt: skip
def test_an_argument_that_cannot_be_is_one_line(given, said):
    with pytest.raises(ValueError) as error:
        arguments.read(given)
    assert said in str(error.value) and "\n" not in str(error.value)
