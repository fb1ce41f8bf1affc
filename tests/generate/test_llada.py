"""LLaDA in use: `generate` of a loaded model and the command, from a converted folder."""
import json

import numpy as np
import pytest

import softmask_jax
from softmask_jax.convert import tiny
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.generate.__main__ import main
from softmask_jax.samplers import Options
from tests.golden import load
from tests.helpers import llada_model

RECORDED = "llada/generate/low_confidence_b8_s8_leftpad.npz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted model with a tokenizer of bytes, whose embedding has rows to spare."""
    folder = tmp_path_factory.mktemp("llada")
    tiny.make(folder, family="llada", conversations=2)
    assert convert([f"--src={folder / 'hf'}", f"--dst={folder / 'model'}"]) == 0
    return folder / "model"


@pytest.fixture(scope="module")
def model(folder):
    return softmask_jax.load(folder)


def test_generate_of_a_loaded_model_repeats_the_reference_with_compat(tmp_path):
    z = load(RECORDED)
    model = softmask_jax.load(llada_model.converted("tiny", tmp_path / "tiny"))
    out = model.generate(z["prompt"], attention_mask=z["attention_mask"], max_new_tokens=16, steps=8, block_length=8,
                         compat=True)  # fmt: skip
    np.testing.assert_array_equal(out.history, z["history"])


def test_by_default_it_continues_chats_and_prompts_without_masks_or_rows_that_are_no_tokens(model):
    chat = [{"role": "user", "content": "One plus one?"}]
    out = model.generate([chat], max_new_tokens=6, steps=3, logits_eos_inf=True)
    new = np.asarray(out.tokens)[0, -6:]
    assert int(out.calls) == 3 and model.mask_token_id not in new
    assert model.denoiser.used_vocab == model.tokenizer.vocab_size < model.denoiser.vocab_size
    assert (new < model.tokenizer.vocab_size).all() and model.tokenizer.eos_id not in new
    eos, *turns = model.end_token_ids
    assert eos == model.tokenizer.eos_id and model.tokenizer.special_tokens["<|eot_id|>"] in turns


def test_chat_gives_the_answer_of_the_command(folder, model, capsys):
    assert main([f"--checkpoint={folder}", "--chat", "--prompt=One plus one?", "--max_new_tokens=4"]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    assert text and model.chat([{"role": "user", "content": "One plus one?"}], max_new_tokens=4) == text
    assert "chats         yes" in repr(model)


def test_a_folder_of_hugging_face_is_to_be_converted(folder):
    with pytest.raises(FileNotFoundError, match="no checkpoints.* python -m softmask_jax.convert"):
        softmask_jax.load(folder.parent / "hf")


def test_a_threshold_needs_no_number_of_steps(model):
    out = model.generate([[5, 6, 7]], max_new_tokens=6, threshold=0.0)
    assert int(out.calls) == 1 and model.mask_token_id not in np.asarray(out.tokens)


@pytest.mark.parametrize("options, says", [
    ({"cache": "dual"}, "no option cache"), ({"prompt_length": 3}, "no use for prompt_length"),
    ({"alg": "mdlm"}, "alg is 'mdlm'"), ({"compat": True, "steps": 5, "block_length": 2}, "a multiple of the 3 blocks"),
])  # fmt: skip
def test_options_that_do_not_fit_are_one_line(model, options, says):
    with pytest.raises(ValueError, match=says):
        model.generate([[5, 6, 7]], max_new_tokens=6, **options)


@pytest.mark.parametrize("options, says", [
    (dict(alg="entropy", confidence_eos_eot_inf=True), "is an option of low_confidence; 'entropy' has none"),
    (dict(alg="mdlm", cfg_scale=1.0), "an option of Dream's and LLaDA's algorithms"),
    (dict(alg="random", threshold=0.5), "confidence_threshold and low_confidence; 'random' has none"),
    (dict(alg="random", alg_temp=0.5), "'random' has none"),
])  # fmt: skip
def test_options_of_other_samplers_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Options(**options)


def test_the_command_answers_in_blocks_with_guidance_and_shows_the_denoising(folder, tmp_path, capsys):
    page, rows, out = tmp_path / "page.html", tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ({"prompt": "ab"}, {"parts": ["x", 3, "yz", 2]})), "utf-8")
    sampler = ["--cfg_scale=0.5", "--block_length=4", "--soft_mask=topk:2", "--cache=dual", "--temperature=0.5"]
    assert main([f"--checkpoint={folder}", f"--prompts={rows}", f"--out={out}", "--max_new_tokens=8",
                 f"--trajectory={page}", *sampler]) == 0  # fmt: skip
    answers = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    answers = {answer["index"]: answer for answer in answers if "index" in answer}
    assert answers[0]["filled"] == 8 and answers[1]["filled"] == 5 and answers[1]["text"].startswith("x")
    assert page.stat().st_size > 10_000
    assert main([f"--checkpoint={folder}", "--prompt=ab", "--max_new_tokens=4", "--compat", "--alg=random"]) == 0
    assert main([f"--checkpoint={folder}", "--prompt=ab", "--threshold=0.9", "--alg=low_confidence", "--steps=4",
                 "--block_length=4"]) == 1  # fmt: skip
    assert "leave --steps out" in capsys.readouterr().err
