"""A tiny LLaDA through every step: converted, fine-tuned, killed, resumed, exported, generated with and evaluated."""
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
from softmask_jax.data.chat.buckets import Buckets
from softmask_jax.data import open_tokenizer
from softmask_jax.data.chat.sft import build_sft
from softmask_jax.distributed import sharding
from softmask_jax.evaluate.__main__ import main as evaluate
from softmask_jax.generate.__main__ import main as generate
from softmask_jax.training import tasks
from tests.helpers.dream_workshop import arrays, llada_workshop  # noqa: F401 (fixtures)
from tests.helpers.xla_flags import ONE_DEVICE

CHAT = [{"role": "user", "content": "What is 2 + 3?"}]
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"


def converts(src, dst, *more):
    assert convert([f"--src={src}", f"--dst={dst}", *more]) == 0
    return dst


@pytest.fixture(scope="module")
def run(llada_workshop):
    """A short run."""
    shape = ("train.steps=3", "eval.every=0", "sample.count=0", "sample.every=0")
    opened = ("soft_mask.init_scale=0.5", "optimizer.learning_rate=0.01", "soft_mask.p_sm=1.0")
    folder, summary = llada_workshop.run("run", *shape, *opened)
    assert summary["step"] == 3 and np.isfinite(summary["validation"]["loss"])
    return folder


def test_the_response_ends_with_its_turn_and_ends_of_text_fill_the_row(llada_workshop):
    settings = llada_workshop.settings()
    sft = build_sft(settings.data, tokenizer=str(llada_workshop.folder / "model/tokenizer"))
    special = sft.tokenizer.special_tokens
    assert sft.tokenizer.mask_token_id == special["<|mdm_mask|>"] and sft.pad_id == special["<|endoftext|>"]
    ids, prompt_length = sft.train[0]
    text = "".join(sft.tokenizer.decode(ids[a:b]) for a, b in ((0, prompt_length), (prompt_length, None)))
    assert ids[0] == special["<|startoftext|>"] and HEADER.format("user") in text
    assert sft.tokenizer.decode(ids[:prompt_length]).endswith(HEADER.format("assistant"))
    assert ids[-1] == special["<|eot_id|>"] and text.count("<|start_header_id|>") == 2
    rows = Buckets(sft.train, sft.pad_id, 0, (128, 256), whole_rows=True).gather(np.arange(3), 256)
    assert (rows["lengths"] == 256).all() and (rows["segment_ids"] == 1).all()
    assert all((row[real:] == sft.pad_id).all() for row, real in zip(rows["tokens"], rows["real_lengths"]))


def test_a_run_is_loaded_exported_merged_and_generates(llada_workshop, run):
    folder, base = llada_workshop.folder, llada_workshop.folder / "model"
    hf = converts(run, folder / "adapter", "--to=hf", "--verify")
    back = converts(hf, folder / "back", "--verify")
    merged = converts(hf, folder / "merged", f"--base={base}", "--merge", "--to=orbax", "--verify")
    model, tokens = softmask_jax.load(run), np.arange(40).reshape(2, 20) * 6 % 250
    ours, plain = np.asarray(model.logits(tokens)), np.asarray(softmask_jax.load(base).logits(tokens))
    assert np.abs(ours - plain).max() > 0.05
    np.testing.assert_array_equal(softmask_jax.load(back, base=base).logits(tokens), ours)
    rounded = np.abs(np.asarray(softmask_jax.load(merged).logits(tokens)) - ours)
    assert rounded.mean() < 0.2 * np.abs(ours - plain).mean()
    special = model.tokenizer.special_tokens
    assert set(model.end_token_ids) == {special["<|endoftext|>"], special["<|eot_id|>"]} and model.max_length == 2048
    first = [special["<|startoftext|>"], special["<|start_header_id|>"]]
    np.testing.assert_array_equal(model.encode_chat(CHAT)[:2], first)
    out = model.generate([CHAT], max_new_tokens=8, steps=4, key=jax.random.key(0, impl="threefry2x32"))
    assert not np.isin(np.asarray(out.tokens)[0, -8:], model.mask_token_id).any()


@pytest.mark.full
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits_and_is_evaluated(llada_workshop):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ONE_DEVICE}
    folder = llada_workshop.folder

    def command(name):
        overrides = [f"--config.{override}" for override in llada_workshop.overrides()]
        return [
            sys.executable, "-m", "softmask_jax.main", "--config=configs/llada8b.py:smoke",
            f"--workdir={folder / name}", *overrides, "--config.checkpoint.every=1", "--config.eval.every=2",
        ]  # fmt: skip

    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command("unkilled"), check=True, **quiet)
    process = subprocess.Popen(command("killed"), **quiet)
    while process.poll() is None and not list((folder / "killed/checkpoints").glob("[1-9]*")):
        time.sleep(0.01)
    time.sleep(np.random.default_rng().uniform(0, 0.5))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command("killed"), check=True, **quiet)
    ours, theirs = (arrays(folder / name, 6, ("params", "ema", "optimizer")) for name in ("killed", "unkilled"))
    assert ours.keys() == theirs.keys()
    assert all(value.tobytes() == theirs[name].tobytes() for name, value in ours.items())
    peft = converts(folder / "killed", folder / "killed-hf", "--to=hf", "--verify")
    assert all(".transformer.blocks." in key for key in load_file(peft / "adapter_model.safetensors"))
    asked = ["--chat", "--prompt=What is 2 + 3?", "--max_new_tokens=8"]
    assert generate([f"--checkpoint={folder / 'killed'}", *asked]) == 0
    out = folder / "evaluation"
    words = [f"--checkpoint={folder / 'killed'}", "--tasks=perplexity", f"--out={out}", "--config.perplexity.draws=2"]
    assert evaluate(words) == 0
    assert "one_pass/loss" in json.dumps(json.loads((out / "results.json").read_text()))


def test_a_mask_that_the_tokenizer_does_not_name_is_that_of_config_json(llada_workshop, tmp_path):
    hf = shutil.copytree(llada_workshop.folder / "hf", tmp_path / "hf")
    text = (hf / "tokenizer.json").read_text()
    (hf / "tokenizer.json").write_text(text.replace("<|mdm_mask|>", "<|reserved_token_252|>"))
    tokenizer = open_tokenizer(hf)
    special = tokenizer.special_tokens["<|reserved_token_252|>"]
    assert tokenizer.mask_token_id == tokenizer.vocab_size - 1 != special
    model = softmask_jax.load(converts(hf, tmp_path / "model"))
    assert model.tokenizer.mask_token_id == model.mask_token_id == special
    assert tokenizer.with_mask(5) is tokenizer and model.tokenizer.with_mask(tokenizer.vocab_size) is model.tokenizer
    settings = llada_workshop.settings(f"model.base={tmp_path / 'model'}")
    task = tasks.make(settings, sharding.make_mesh(devices=jax.devices()[:1]))
    assert task.tokenizer.mask_token_id == special


TEXT = (
    "data.source=files", "data.seq_len=64", "data.validation_fraction=0.3", "train.steps=2", "checkpoint.every=2",
    "eval.every=0", "sample.count=0", "sample.every=0", "eval.batch_size=2", "data.buckets=",
)  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("loss", ["llada", "nelbo"])
def test_a_base_trains_on_running_text(llada_workshop, loss):
    texts = llada_workshop.folder / "texts"
    texts.mkdir(exist_ok=True)
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"The sum of {i} and {i} is {2 * i}. " * 8)
    overrides = (*TEXT, f"objective.loss={loss}", f"data.paths={texts}/*.txt", "objective.short_batches=0.5")
    folder, summary = llada_workshop.run(f"text-{loss}", *overrides)
    assert summary["step"] == 2 and np.isfinite(summary["validation"]["one_pass/perplexity"])
    model = softmask_jax.load(folder)
    assert np.isfinite(model.nelbo(np.arange(32).reshape(2, 16), jax.random.key(0, impl="threefry2x32"))).all()
    converts(folder, llada_workshop.folder / f"text-{loss}-hf", "--to=hf", "--verify")
    out = llada_workshop.folder / f"text-{loss}-evaluation"
    words = [f"--checkpoint={folder}", "--tasks=perplexity", f"--out={out}", "--config.perplexity.draws=1"]
    assert evaluate(words) == 0
    # Of the base, too, though it chats.
    words[0], words[2] = f"--checkpoint={llada_workshop.folder / 'model'}", f"{words[2]}-base"
    others = f"--config.perplexity.texts=sums=files:{texts}/*.txt"
    assert evaluate([*words, others, "--config.perplexity.own=False"]) == 0
