"""Dream from end to end at toy size: make, convert, fine-tune, resume, give back, convert again, generate."""
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import softmask_jax
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.diffusion.response_loss import example_coins
from tests.helpers.dream_workshop import arrays, arrays_of_model, tuned, workshop  # noqa: F401 (fixtures)


def test_a_run_validates_samples_saves_and_reports(tuned):
    folder, summary = tuned
    assert summary["finished"] and summary["step"] == 6 and len(summary["samples"]) == 1
    assert "What is " in summary["samples"][0] and "<|im_start|>assistant" in summary["samples"][0]
    scores = summary["validation"]
    assert 0 < scores["loss_low"] < scores["loss"] < scores["loss_high"]
    assert {"one_pass/loss", "two_pass/loss", "gain/loss"} <= scores.keys()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"train", "validation", "samples", "final"}
    assert all(np.isfinite(row["loss"]) for row in rows if row["kind"] == "train")
    page = (folder / "report.html").read_text()
    assert "Validation loss, by the recipe" in page and "Validation loss, two passes" in page
    assert "dora adapter" in page and "has not been validated" not in page and "Training tokens" not in page


def test_the_coders_recipe_is_the_same_path(workshop, tuned):
    _, summary = workshop.run("coder", recipe="dream_coder7b")
    assert summary["validation"] == tuned[1]["validation"]


def test_only_the_adapter_and_the_scalars_are_trained_and_saved(tuned):
    saved = arrays(tuned[0], 6, ("params", "optimizer"))
    params = [name for name in saved if name.startswith("params/")]
    assert {name.split("/")[1] for name in params} == {"backbone", "soft_mask"}
    assert {name.split("/")[2] for name in params if "/backbone/" in name} == {"adapter"}
    assert sorted({name.split("/")[4] for name in params if "/adapter/" in name}) == ["k", "o", "q", "v"]
    assert all(saved[name].dtype == np.float32 for name in params)
    assert not any("embed" in name or "head" in name for name in saved)
    moved = [name for name in params if name.endswith("/b")]
    assert all(np.abs(saved[name]).max() > 0 for name in moved)


def test_a_stopped_run_continues_to_the_same_bits(workshop, tuned):
    folder, stopped = workshop.run("stopped", stop_at=2)
    assert not stopped["finished"] and stopped["step"] == 2
    _, summary = workshop.run("stopped")
    assert summary["validation"] == tuned[1]["validation"] and summary["samples"] == tuned[1]["samples"]
    ours, theirs = (arrays(run, 6, ("params", "ema", "optimizer")) for run in (folder, tuned[0]))
    assert ours.keys() == theirs.keys()
    assert all(value.tobytes() == theirs[name].tobytes() for name, value in ours.items())


@pytest.mark.full
def test_a_run_stopped_in_its_second_epoch_continues_to_the_same_bits_with_the_coins_of_each_epoch(workshop):
    few = ("data.max_train=4", "train.log_every=1", "eval.every=0", "sample.every=0", "sample.count=0")
    straight, _ = workshop.run("epochs", *few)
    halted, _ = workshop.run("epochs-halted", *few, stop_at=3)
    settings = json.loads((halted / "config.json").read_text())
    del settings["objective"]["fresh_noise"]  # as of a run from before there was a choice
    (halted / "config.json").write_text(json.dumps(settings))
    workshop.run("epochs-halted", *few)
    ours, theirs = (arrays(run, 6, ("params", "ema", "optimizer")) for run in (halted, straight))
    assert all(value.tobytes() == theirs[name].tobytes() for name, value in ours.items())
    rows = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    two_pass = [2 * row["two_pass_share"] for row in rows if row["kind"] == "train"]
    coins = [int(example_coins(jax.random.key(1231), np.arange(4), 0.5, epoch).sum()) for epoch in range(3)]
    assert [sum(two_pass[step : step + 2]) for step in (0, 2, 4)] == coins and coins[2] != coins[0]


@pytest.mark.full
def test_how_rows_are_grouped_into_micro_batches_changes_nothing_but_rounding(workshop, tuned):
    _, summary = workshop.run("together", "train.micro_batches=1", "sample.count=0", "sample.every=0")
    np.testing.assert_allclose(summary["validation"]["loss"], tuned[1]["validation"]["loss"], rtol=1e-3)


def test_the_adapter_goes_back_to_peft_and_returns_bit_for_bit(workshop, tuned):
    adapter, again = workshop.folder / "adapter", workshop.folder / "again"
    assert convert([f"--src={tuned[0]}", f"--dst={adapter}", "--to=hf", "--verify"]) == 0
    described = json.loads((adapter / "adapter_config.json").read_text())
    assert described["use_dora"] and (described["r"], described["lora_alpha"]) == (16, 16.0)
    transparency = json.loads((adapter / "transparency_config.json").read_text())
    assert transparency["transparency_alg"] == "mixinputs_with_topk" and transparency["mixinputs_k"] == 1
    tensors = load_file(adapter / "adapter_model.safetensors")
    saved = arrays(tuned[0], 6, ("ema",))
    for layer in range(2):
        theirs = tensors[f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"]
        np.testing.assert_array_equal(theirs.T, saved["ema/adapter/layers/q/a"][layer])
    assert convert([f"--src={adapter}", f"--dst={again}"]) == 0
    back = arrays_of_model(again)
    for name, value in saved.items():
        np.testing.assert_array_equal(back[f"params/{name.removeprefix('ema/')}"], value)


def test_a_run_its_adapter_and_the_merged_model_give_the_same_logits(workshop, tuned):
    adapter, ours, merged = (workshop.folder / f"same-{name}" for name in ("adapter", "ours", "merged"))
    assert convert([f"--src={tuned[0]}", f"--dst={adapter}", "--to=hf"]) == 0
    assert convert([f"--src={adapter}", f"--dst={ours}"]) == 0
    base = workshop.folder / "model"
    assert convert([f"--src={adapter}", f"--base={base}", "--merge", f"--dst={merged}", "--to=orbax"]) == 0
    models = [softmask_jax.load(tuned[0]), softmask_jax.load(ours, base=str(base)), softmask_jax.load(merged)]
    models.append(softmask_jax.load(adapter, base=str(base)))
    tokens = np.random.default_rng(0).integers(0, 250, (2, 24))
    run, loaded, whole, peft = (np.asarray(model.logits(tokens)) for model in models)
    np.testing.assert_array_equal(run, loaded)
    np.testing.assert_array_equal(run, peft)
    np.testing.assert_allclose(whole, run, atol=0.05 * np.abs(run).max())  # merged weights are rounded to bfloat16
    assert models[3].soft_mask == models[1].soft_mask == models[0].soft_mask and models[0].soft_mask.variant == "topk"
    for name, value in models[1].params["soft_mask"].items():
        np.testing.assert_array_equal(models[3].params["soft_mask"][name], value)
    assert "dora, rank 16" in repr(models[3])
    with pytest.raises(ValueError, match="same-adapter is an adapter; give the converted model"):
        softmask_jax.load(adapter)


def test_a_tuned_model_answers_chats_with_its_own_soft_masking(tuned):
    model = softmask_jax.load(tuned[0])
    chats = [[{"role": "user", "content": text}] for text in ("What is 2 + 3?", "What is 40 + 2? Think.")]
    out = model.generate(chats, max_new_tokens=8, steps=4, alg="entropy")
    assert out.tokens.shape[0] == 2 and out.history.shape[0] == 4 and int(out.calls) <= 4
    assert not (np.asarray(out.tokens)[:, -8:] == model.denoiser.mask_token_id).all()
    plain = model.generate(chats, max_new_tokens=8, steps=4, alg="entropy", soft_mask={"transparency_alg": "none"})
    assert plain.tokens.shape == out.tokens.shape
    whole, answers = model.decode(out.tokens), model.decode(out.tokens, new_tokens=8)
    assert len(whole) == 2 and all("user" in text for text in whole)
    assert all(answer in text for answer, text in zip(answers, whole))


def test_logits_are_those_of_the_model_and_shifted_ones_stand_a_place_later(workshop):
    model = softmask_jax.load(workshop.folder / "model")
    tokens = np.random.default_rng(1).integers(0, 250, (2, 20))
    plain, moved = np.asarray(model.logits(tokens)), np.asarray(model.logits(tokens, shifted=True))
    np.testing.assert_allclose(moved[:, 1:], plain[:, :-1], rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(moved[:, 0], plain[:, 0], rtol=2e-2, atol=2e-2)


@pytest.fixture(scope="module")
def small_base(workshop):
    """The base with int8 kernels."""
    assert convert([f"--src={workshop.folder / 'hf'}", f"--dst={workshop.folder / 'int8'}", "--int8", "--verify"]) == 0
    return workshop.folder / "int8"


@pytest.mark.full
def test_an_adapter_is_trained_on_an_int8_base_and_works_on_both(workshop, small_base, tuned):
    settings = [f"model.base={small_base}", "model.base_dtype=int8"]
    folder, summary = workshop.run("on-int8", *settings)
    assert summary["finished"]
    np.testing.assert_allclose(summary["validation"]["loss"], tuned[1]["validation"]["loss"], rtol=0.02)
    ours, theirs = (arrays(run, 6, ("params", "ema", "optimizer")) for run in (folder, tuned[0]))
    assert {name: value.dtype for name, value in ours.items()} == {name: value.dtype for name, value in theirs.items()}
    adapter, back = workshop.folder / "on-int8-adapter", workshop.folder / "on-int8-ours"
    assert convert([f"--src={folder}", f"--dst={adapter}", "--to=hf", "--verify"]) == 0
    assert convert([f"--src={adapter}", f"--dst={back}"]) == 0
    tokens = np.random.default_rng(0).integers(0, 250, (2, 24))
    run, loaded = (softmask_jax.load(path, **more) for path, more in ((folder, {}), (back, {"base": str(small_base)})))
    np.testing.assert_array_equal(run.logits(tokens), loaded.logits(tokens))
    on_float = np.asarray(softmask_jax.load(folder, base=str(workshop.folder / "model")).logits(tokens))
    np.testing.assert_allclose(on_float, run.logits(tokens), atol=0.1 * np.abs(on_float).max())
    assert run.generate([[{"role": "user", "content": "What is 2 + 3?"}]], max_new_tokens=8, steps=4, alg="entropy").calls > 0


def test_a_base_that_is_not_what_the_config_says_is_refused_both_ways(workshop, small_base):
    with pytest.raises(ValueError, match="is int8, config.model.base_dtype float: give --config.model.base_dtype=int8"):
        workshop.run("refused", f"model.base={small_base}")
    with pytest.raises(ValueError, match="is float, config.model.base_dtype int8: .*convert with --int8 makes one"):
        workshop.run("refused", "model.base_dtype=int8")


@pytest.mark.parametrize("override, said", [
    ("model.base=nowhere", "no converted model in nowhere; python -m softmask_jax.convert --src=runs/tiny_dream/hf --dst=nowhere"),
    ("data.paths=jsonl:nothing-*.jsonl", "no file matches"),
    ("data.tokenizer=bytes", "give --config.data.tokenizer=base"),
    ("data.buckets=100", "multiples of 128"),
    ("data.buckets=long", "must be lengths such as"),
    ("model.base=", "name the converted model with config.model.base"),
    ("model.kind=dit", "for config.model.kind=dream"),
    ("data.source=stdlib", "belong together"),
    ("model.adapter_targets=^x$", "matches none of"),
])
def test_what_does_not_fit_is_one_line(workshop, override, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        workshop.run("refused", override)
    assert "\n" not in str(error.value)
