"""Generation with real, tiny models: the same answers whatever the batch, chats, holes, pages; killed processes."""
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import softmask_jax
from softmask_jax import config
from softmask_jax.convert import tiny_dream
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.data import ByteTokenizer
from softmask_jax.generate import __main__ as generate
from softmask_jax.models import denoiser
from tests.helpers.tiny_run import settings
from tests.helpers.xla_flags import ONE_DEVICE

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def dream16(tmp_path_factory):
    """A tiny Dream in bfloat16."""
    folder = tmp_path_factory.mktemp("dream")
    tiny_dream.make(folder, conversations=2)
    assert convert([f"--src={folder / 'hf'}", f"--dst={folder / 'model'}"]) == 0
    return folder / "model"


@pytest.fixture(scope="module")
def dream(dream16, tmp_path_factory):
    """The same in float32."""
    folder = tmp_path_factory.mktemp("dream32")
    shutil.copytree(dream16.parent / "hf", folder / "hf")
    file = folder / "hf" / "model.safetensors"
    save_file({name: value.astype(np.float32) for name, value in load_file(file).items()}, file)
    assert convert([f"--src={folder / 'hf'}", f"--dst={folder / 'model'}"]) == 0
    return folder / "model"


def test_the_nelbo_of_a_dream_is_that_of_its_logits(dream):
    model, tokens, key = softmask_jax.load(dream), np.arange(32, dtype=np.int32).reshape(2, 16) * 7 % 250, jax.random.key(3)
    noisy = model.objective.draw(tokens, jnp.arange(2), 1, key, 0, mask_token_id=model.mask_token_id)
    log_p = jax.nn.log_softmax(model.logits(noisy.xt, shifted=True))
    nll = -jnp.take_along_axis(log_p, jnp.asarray(tokens)[..., None], -1)[..., 0]
    assert noisy.masked.any(1).all()
    np.testing.assert_allclose(model.nelbo(tokens, key, two_pass=False), (noisy.weights * nll).sum(-1), rtol=1e-5)


@pytest.fixture(scope="module")
def mdlm(tmp_path_factory):
    """The name of a model of windows of 16 bytes, as if it were loaded."""
    wanted, tokenizer = config.from_dict(settings(tmp_path_factory.mktemp("mdlm"))), ByteTokenizer()
    network = denoiser.build(wanted.model, wanted.soft_mask, vocab_size=258, mask_token_id=tokenizer.mask_token_id)
    params = jax.jit(network.init)(jax.random.key(0))
    LOADED["mdlm"] = softmask_jax.Model(wanted, tokenizer, network, params, 8)
    return "mdlm"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run it in an empty folder; each model is loaded, and its samplers compiled, once."""
    monkeypatch.chdir(tmp_path)
    load = softmask_jax.load
    once = lambda path, **given: LOADED.get(path) or LOADED.setdefault(path, load(path, **given))  # noqa: E731
    monkeypatch.setattr(softmask_jax, "load", once)
    return lambda checkpoint, *words: generate.main([f"--checkpoint={checkpoint}", *map(str, words)])


LOADED: dict = {}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--prompts={path}"


def rows_of(path):
    found = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


ROWS = [
    "What is 2 + 3?", {"prompt": "x" * 70, "forced": {"0": "ab", "5": "c"}}, {"parts": ["The ", 4, " and ", 3, "."]},
    {"prompt": "z" * 64, "id": "full"}, {"messages": [{"role": "user", "content": "hello"}]}, "again",
]  # fmt: skip


@pytest.mark.full
def test_a_dream_answers_every_kind_of_row_the_same_whatever_the_batch(command, dream, tmp_path):
    prompts = write(tmp_path / "in.jsonl", ROWS)
    options = ["--max_new_tokens=8", "--steps=3", "--alg=entropy", "--temperature=1", "--num_samples=2"]
    for batch_size in (3, 64):
        assert command(dream, prompts, f"--out={batch_size}.jsonl", *options, f"--batch_size={batch_size}") == 0
    rows = rows_of(tmp_path / "3.jsonl")
    assert rows == rows_of(tmp_path / "64.jsonl")
    assert len(rows) == 2 * len(ROWS) and rows[0]["tokens"] != rows[1]["tokens"]
    assert [len(row["tokens"]) for row in rows[::2]] == [8, 8, 17, 8, 8, 8]
    model = softmask_jax.load(str(dream))
    forced = rows[2]["tokens"]
    assert model.tokenizer.decode(np.array([*forced[:2], forced[5]])) == "abc"
    holes = rows[4]
    assert holes["text"].startswith("The ") and len(holes["fills"]) == 2
    assert all(0 < row["calls"] <= 3 and row["filled"] > 0 and row["positions"] > 0 for row in rows)


def test_in_bfloat16_an_answer_does_not_depend_on_what_else_is_in_the_file(command, dream16, tmp_path):
    options = ["--max_new_tokens=8", "--steps=3", "--temperature=1", "--batch_size=4"]
    texts = ["one", "two", "three", "four", "five", "six", "seven"]
    for count in (2, 7):
        assert command(dream16, write(tmp_path / "in.jsonl", texts[:count]), f"--out={count}.jsonl", *options) == 0
    assert rows_of(tmp_path / "7.jsonl")[:2] == rows_of(tmp_path / "2.jsonl")


def test_a_dream_is_prompted_through_its_chat_template(command, dream, capsys, tmp_path):
    options = ["--max_new_tokens=4", "--steps=2", "--alg=entropy"]
    assert command(dream, "--prompt=hello", "--chat", "--system=Be brief.", "--out=a.jsonl", *options) == 0
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert command(dream, write(tmp_path / "in.jsonl", [{"messages": chat}, "hello"]), "--out=b.jsonl", *options) == 0
    (flagged,), (given, plain) = rows_of(tmp_path / "a.jsonl"), rows_of(tmp_path / "b.jsonl")
    assert flagged["tokens"] == given["tokens"] != plain["tokens"]


def test_a_prompt_longer_than_the_model_is_one_line(command, dream, capsys):
    assert command(dream, "--prompt=" + "a" * 2041, "--max_new_tokens=8", "--steps=2") == 1
    errors = capsys.readouterr().err
    assert "2,041 tokens and 8 new ones are too long for the 2,048 positions" in errors and errors.count("\n") == 1
    model = LOADED[str(dream)]
    with pytest.raises(ValueError, match="2049 positions; 2048 are allowed"):
        model.generate([[97] * 2041], max_new_tokens=8, steps=2)
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        model.generate([[97]], max_new_tokens=8, steps=0)


def test_forbidden_tokens_are_never_written(command, dream, tmp_path):
    model = softmask_jax.load(str(dream))
    options = ["--max_new_tokens=16", "--steps=4", "--alg=entropy", "--temperature=1"]
    assert command(dream, "--prompt=a", "--out=free.jsonl", *options) == 0
    free, = rows_of(tmp_path / "free.jsonl")
    taken = sorted({token for token in free["tokens"] if token != model.mask_token_id})
    assert command(dream, "--prompt=a", "--out=bound.jsonl", *options, *[f"--forbid={token}" for token in taken]) == 0
    bound, = rows_of(tmp_path / "bound.jsonl")
    assert not set(bound["tokens"]) & set(taken)


@pytest.mark.full
def test_a_trained_run_continues_prompts_fills_holes_and_writes_freely(command, mdlm, tmp_path):
    rows = ["mask", {"parts": ["ma", 2, " tok", 3]}, {"prompt": "no", "max_new_tokens": 4}]
    prompts = write(tmp_path / "in.jsonl", rows)
    for batch_size in (1, 4):
        assert command(mdlm, prompts, f"--out={batch_size}.jsonl", "--steps=4", f"--batch_size={batch_size}") == 0
    found = rows_of(tmp_path / "4.jsonl")
    assert found == rows_of(tmp_path / "1.jsonl")
    assert [len(row["tokens"]) for row in found] == [16 - 1 - 4, 1 + 2 + 2 + 4 + 3, 4]
    assert found[1]["tokens"][:3] == [256, *b"ma"] and found[1]["tokens"][5:9] == list(b" tok")
    assert command(mdlm, "--unconditional=4", "--steps=4", "--out=free.jsonl") == 0
    assert [len(row["tokens"]) for row in rows_of(tmp_path / "free.jsonl")] == [16] * 4


def test_what_a_trained_run_writes_freely_is_what_its_notebook_writes(command, mdlm, tmp_path):
    assert command(mdlm, "--unconditional=4", "--steps=4", "--out=free.jsonl") == 0
    model = softmask_jax.load(str(mdlm))
    tokens = np.asarray(model.generate(key=jax.random.key(0), count=4, steps=4).tokens)
    assert [row["tokens"] for row in rows_of(tmp_path / "free.jsonl")] == tokens.tolist()


def test_a_page_shows_the_first_answer(command, mdlm, dream, tmp_path):
    assert command(mdlm, "--prompt=mask", "--steps=4", "--trajectory=page.html") == 0
    assert command(dream, "--prompt=a", "--max_new_tokens=4", "--steps=2", "--alg=entropy", "--trajectory=dream.html") == 0
    for name in ("page.html", "dream.html"):
        page = (tmp_path / name).read_text()
        assert "network calls" in page and "<script" in page and "Rounding differs" not in page


def test_a_page_of_answers_that_are_there_is_made_without_others_and_tells_where_they_differ(command, mdlm, capsys, tmp_path):
    words = ["--prompt=mask", "--steps=4", "--out=out.jsonl"]
    assert command(mdlm, *words) == 0
    row, = rows_of(tmp_path / "out.jsonl")
    # As if the answer had been rounded otherwise in a larger batch.
    write(tmp_path / "out.jsonl", [row | {"seconds": 1.0, "tokens": [(token + 1) % 256 for token in row["tokens"]]}])
    capsys.readouterr()
    assert command(mdlm, *words, "--trajectory=page.html") == 0
    assert "Generating" not in capsys.readouterr().err
    assert "Rounding differs" in (tmp_path / "page.html").read_text()


def test_a_model_of_nan_is_one_line_and_its_rows_say_so(command, mdlm, capsys, tmp_path):
    whole = LOADED[mdlm]
    LOADED["broken"] = dataclasses.replace(whole, params=jax.tree.map(lambda x: x * np.nan, whole.params))
    assert command("broken", "--prompt=mask", "--prompt=two", "--steps=4", "--out=out.jsonl", "--batch_size=4") == 1
    assert "Error: 2 of 2 answers failed: the model's logits were NaN or infinite" in capsys.readouterr().err
    assert all(row["error"] and not row["tokens"] for row in rows_of(tmp_path / "out.jsonl"))


@pytest.mark.parametrize("words, said", [
    (["--steps=0"], "step"),
    (["--alg=magic"], "magic"),
    (["--alg=entropy", "--temperature=-1"], "temperature"),
    (["--tokens_per_step=2", "--steps=4"], "leave --steps out"),
    (["--alg=confidence_threshold", "--block_length=8", "--steps=4"], "leave --steps out"),
    (["--threshold=0.5"], "threshold is an option of confidence_threshold and low_confidence; 'entropy' has none"),
])
def test_options_that_make_no_sense_are_one_line(command, dream, capsys, words, said):
    assert command(dream, "--prompt=a", "--max_new_tokens=4", *words) == 1
    errors = capsys.readouterr().err
    assert said in errors and errors.startswith("Error: ") and errors.count("\n") == 1


def start(folder, *words):
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_DEVICE, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "softmask_jax.generate", *map(str, words)], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def complete(folder, *words):
    process = start(folder, *words)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


@pytest.mark.full
@pytest.mark.parametrize("total, shares, other", [
    (200, (0, 0.65), 0), pytest.param(1000, (0, 0.3, 0.65), 5, marks=pytest.mark.soak)
])  # fmt: skip
def test_many_prompts_killed_in_the_middle_give_the_file_of_an_undisturbed_run(dream, tmp_path, total, shares, other):
    moments = random.Random()
    lengths = np.random.default_rng(0).integers(1, 190, total)
    prompts = write(tmp_path / "in.jsonl", [chr(97 + i % 26) * int(n) for i, n in enumerate(lengths)])
    words = [f"--checkpoint={dream}", prompts, "--max_new_tokens=8", "--steps=3", "--alg=entropy", "--temperature=1"]
    complete(tmp_path, *words, "--out=whole.jsonl", "--batch_size=16")
    out = tmp_path / "killed.jsonl"
    count = lambda: out.read_bytes().count(b"\n") if out.exists() else 0  # noqa: E731
    for share in shares:
        process = start(tmp_path, *words, "--out=killed.jsonl", "--batch_size=16")
        while count() < max(1, share * total) and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and count() < total
    complete(tmp_path, *words, "--out=killed.jsonl", "--batch_size=16")
    whole = rows_of(tmp_path / "whole.jsonl")
    assert [row["index"] for row in whole] == list(range(total))
    assert rows_of(out) == whole
    if other:
        complete(tmp_path, *words, "--out=other.jsonl", f"--batch_size={other}")
        assert rows_of(tmp_path / "other.jsonl") == whole
