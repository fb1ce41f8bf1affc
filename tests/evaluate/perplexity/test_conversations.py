"""Conversations: the recipe's loss of a Dream's validation split, what training reports, and more draws of it."""
import jax
import numpy as np
import pytest

import softmask_jax
from softmask_jax import config
from softmask_jax.convert import tiny_dream
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.data.chat.buckets import bucket_validation_batches
from softmask_jax.diffusion import soft_masking, two_pass
from softmask_jax.diffusion.dream_loss import DreamLoss
from softmask_jax.distributed import sharding
from softmask_jax.evaluate.models import without_soft_masking
from softmask_jax.evaluate.perplexity.task import Validation
from softmask_jax.evaluate.task import Stopped
from softmask_jax.io.checkpoint import Checkpoints
from softmask_jax.io.files import write_json
from softmask_jax.training.tasks.conversations import Conversations
from tests.helpers import validated
from tests.helpers.validated import columns, work

STEP = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("conversations")
    tiny_dream.make(at, conversations=120, sizes={"torch_dtype": "float32"})
    assert convert([f"--src={at / 'hf'}", f"--dst={at / 'model'}"]) == 0
    return at


@pytest.fixture(scope="module")
def task(folder) -> Conversations:
    """What training validates with."""
    overrides = [
        f"model.base={folder / 'model'}", f"data.paths=jsonl:{folder / 'chats.jsonl'}", "data.buckets=",
        f"data.cache_dir={folder / 'cache'}", "train.global_batch_size=2", "train.micro_batches=2",
        "model.compute_dtype=float32", "model.param_dtype=float32", "soft_mask.p_sm=0.5",
    ]  # fmt: skip
    return Conversations(config.load("configs/dream7b.py:smoke", overrides), validated.mesh(1))


@pytest.fixture(scope="module")
def run(folder, task):
    """The folder of a run with an adapter and open soft-masking, as a training leaves it."""
    shapes = jax.eval_shape(task.denoiser.init, jax.random.key(0))
    random = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: 0.3 * random.standard_normal(x.shape, np.float32), shapes["backbone"]["adapter"])
    params = {"backbone": {"adapter": adapter}, "soft_mask": soft_masking.init_scalars(scale=0.8, centre=-6.0)}
    path = folder / "run"
    path.mkdir()
    write_json(path / "config.json", task.config.to_dict())
    task.save_tokenizer(path / "tokenizer")
    with Checkpoints(path / "checkpoints") as checkpoints:
        cursor = {"step": STEP, "data": task.info["fingerprint"]}
        checkpoints.save(STEP, {"params": params, "ema": params["backbone"]}, cursor)
    return path


@pytest.fixture(scope="module")
def model(run):
    return softmask_jax.load(run)


@pytest.fixture(scope="module")
def whole(folder, run, model):
    made = work(folder / "whole", run, model)
    return made, Validation().run(made)


def test_compat_is_what_training_reports(folder, run, model, task):
    made = work(folder / "compat", run, model, compat=True, batch_size=3)
    estimates = Validation().run(made).estimates
    assert list(estimates) == ["loss", "one_pass/loss", "two_pass/loss", "gain/loss"]
    by_pass = task._validation(model.params)
    for name, reported in {"loss": by_pass[""], "one_pass/loss": by_pass["one_pass"], "two_pass/loss": by_pass["two_pass"]}.items():
        assert estimates[name].value == pytest.approx(reported.mean, rel=1e-5)
        assert (estimates[name].low, estimates[name].high) == pytest.approx(reported.interval(), rel=1e-5)
    coins = columns(made).mixed != columns(made).one_pass
    assert 0 < coins.sum() < len(coins) and estimates["gain/loss"].value != 0


def test_more_draws_are_the_recipes_loss_at_their_recorded_t(whole, model, task):
    """Recomputed by the training loss, bucket by bucket, from the t that are on record."""
    found, spec = columns(whole[0]), DreamLoss.from_config(task.config)
    key = jax.random.key(validated.SEED)

    @jax.jit
    def losses(params, batch, t, coin):
        noisy = spec.draw(batch, key, mask_token_id=model.mask_token_id, t=t, epoch=1)
        feedback = two_pass.feedback_if(True, model.denoiser, spec.soft_mask, params, noisy)
        nll = two_pass.token_nll(model.denoiser, spec.soft_mask, params, noisy, feedback, coin)
        return (nll * noisy.weights).sum(-1), noisy.masked.sum(-1)

    seen = 0
    for batch in bucket_validation_batches(task.validation, global_batch_size=2):
        index = batch["index"]
        for name, coin in (("one_pass", 0.0), ("two_pass", 1.0)):
            loss, masked = losses(model.params, batch, found.t[index, 1].astype(np.float32), np.float32(coin))
            np.testing.assert_allclose(getattr(found, name)[index, 1], loss, rtol=2e-5)
            np.testing.assert_array_equal(found.masked[index, 1], masked)
        seen += batch["valid"].sum()
    assert seen == len(task.validation) == len(found.numbers)


def test_t_covers_the_recipes_range_evenly_over_examples_and_draws(whole):
    t = columns(whole[0]).t
    place = (t - 0.2) / 0.6 * t.size
    np.testing.assert_array_equal(np.sort(np.floor(place).ravel()), np.arange(t.size))
    np.testing.assert_array_equal(np.sort((t > 0.5), 1), np.tile([False, True], (len(t), 1)))
    curve = whole[1].details["cross_entropy_by_t"]["validation"]
    assert [row["t"] for row in curve] == [[n / 4, (n + 1) / 4] for n in range(4)]


def test_a_stopped_validation_goes_on_and_devices_change_nothing(folder, run, model, whole):
    with pytest.raises(Stopped):
        Validation().run(work(folder / "stopped", run, model, stop_after=1))
    assert Validation().run(work(folder / "stopped", run, model)) == whole[1]
    spread = softmask_jax.load(run, mesh=sharding.make_mesh(4, devices=jax.devices()[:4]))
    made = work(folder / "spread", run, spread, devices=4, batch_size=6)
    Validation().run(made)
    np.testing.assert_array_equal(columns(made).masked, columns(whole[0]).masked)
    for name in ("one_pass", "two_pass"):
        np.testing.assert_allclose(getattr(columns(made), name), getattr(columns(whole[0]), name), rtol=2e-4)


def test_the_same_weights_without_soft_masking_are_compared_example_by_example(folder, run, model, whole):
    plain = work(folder / "plain", run, without_soft_masking(model))
    found = Validation().run(plain).estimates
    assert list(found) == ["loss"]
    assert found["loss"].value == pytest.approx(whole[1].estimates["one_pass/loss"].value, rel=1e-6)
    made = Validation().compare(plain, whole[0])
    assert made["loss"].value == pytest.approx(-whole[1].estimates["gain/loss"].value, rel=1e-3)
    assert made["loss"].unit == "nats" and abs(made["one_pass/loss"].value) < 1e-6


def test_what_cannot_be_measured_so_is_refused_in_a_line(folder, run, model, tmp_path):
    with pytest.raises(ValueError, match="measured on those alone"):
        Validation().run(work(tmp_path / "texts", run, model, texts="a=stdlib:"))
    with pytest.raises(ValueError, match="is a converted model or an adapter, which brings no validation split"):
        Validation().run(work(tmp_path / "base", folder / "model", model))
    assert convert([f"--src={run}", "--to=hf", f"--dst={tmp_path / 'peft'}"]) == 0
    with pytest.raises(ValueError, match="peft is a converted model or an adapter"):
        Validation().run(work(tmp_path / "adapter", tmp_path / "peft", model))


CHAT = b'{"messages": [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "No, %d."}]}\n'


@pytest.mark.parametrize("name, content, message", [
    ("model/manifest.json", b"{}", "have changed since the run"),
    ("chats.jsonl", None, "cannot be read here .*chats.jsonl"),
    ("chats.jsonl", b"".join(CHAT % (n, n) for n in range(40)), "have changed since the run"),
])  # fmt: skip
def test_conversations_or_a_base_that_are_not_the_runs_are_refused(folder, run, model, tmp_path, name, content, message):
    path = folder / name
    before = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    try:
        with pytest.raises(ValueError, match=message):
            Validation().run(work(tmp_path / "changed", run, model))
    finally:
        path.write_bytes(before)
