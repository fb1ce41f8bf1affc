"""softmask_jax.load: what notebooks and scripts rely on."""
from pathlib import Path

import jax
import numpy as np
import pytest

import softmask_jax
from softmask_jax import config
from softmask_jax.data import ByteTokenizer
from softmask_jax.data.chat.template import ChatTemplate
from softmask_jax.distributed import sharding
from softmask_jax.generate.__main__ import main as generate
from softmask_jax.samplers import Options
from softmask_jax.training import loop
from tests.helpers import tiny_run

DREAM = config.Config(config.Model(kind="dream"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a finished run with checkpoints at steps 4 and 8."""
    folder = tmp_path_factory.mktemp("api")
    tiny_run.write_texts(folder / "texts")
    loop.train(config.from_dict(tiny_run.settings(folder)), str(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def model(run):
    return softmask_jax.load(run)


def tokens(rows=3, length=16):
    return np.random.default_rng(0).integers(0, 256, (rows, length))


def test_load_takes_the_newest_checkpoint_and_the_averaged_weights(run, model):
    raw = softmask_jax.load(run, weights="raw", step=4)
    assert (model.step, raw.step) == (8, 4)
    assert np.any(raw.params["backbone"]["head"]["bias"] != model.params["backbone"]["head"]["bias"])


def test_logits_cover_the_vocabulary_and_padding_is_not_attended_to(model):
    x = tokens(2)
    padded = np.concatenate([x, tokens(2)], 1)
    mask = np.concatenate([np.ones_like(x), np.zeros_like(x)], 1)
    plain, masked = model.logits(x), model.logits(padded, mask)
    assert plain.shape == (2, 16, model.tokenizer.vocab_size)
    np.testing.assert_allclose(masked[:, :16], plain, atol=2e-5)
    assert np.any(np.abs(model.logits(padded)[:, :16] - plain) > 1e-6)


def test_nelbo_per_row_is_reproducible_and_averages_its_draws(model):
    key = jax.random.key(0)
    once, again = model.nelbo(tokens(), key), model.nelbo(tokens(), key)
    np.testing.assert_array_equal(once, again)
    assert once.shape == (3,) and np.all(np.asarray(once) >= 0) and np.asarray(once).sum() > 0
    # Every row's draws cover all of t, so a row's estimate does not depend on where it stands in the batch.
    forward = np.asarray(model.nelbo(tokens(), key, draws=128))
    backward = np.asarray(model.nelbo(tokens()[::-1], key, draws=128))[::-1]
    np.testing.assert_allclose(forward, backward, rtol=0.15)


def test_generate_fills_masks_keeps_what_is_given_and_says_what_it_cost(model):
    x = tokens(2)
    x[:, ::2] = model.tokenizer.mask_token_id
    out = model.generate(x, key=jax.random.key(3), steps=3, trace=True)
    np.testing.assert_array_equal(np.asarray(out.tokens)[:, 1::2], x[:, 1::2])
    assert model.tokenizer.mask_token_id not in np.asarray(out.tokens)
    left = (np.asarray(out.trace.tokens) == model.mask_token_id).any(-1)
    assert int(out.calls) == left.any(-1).sum() <= 4
    np.testing.assert_array_equal(out.row_calls, left.sum(0))
    assert all(isinstance(text, str) for text in model.decode(out.tokens))


def test_write_gives_the_text_of_the_command_behind_its_prompt(run, model, capsys):
    for words, given in ((["--prompt=mask "], {"prompt": "mask "}), (["--unconditional=1", "--length=8"], {"max_new_tokens": 8})):
        assert generate([f"--checkpoint={run}", *words, "--steps=3", "--seed=7"]) == 0
        text = given.get("prompt", "") + capsys.readouterr().out.removesuffix("\n")
        assert model.write(**given, steps=3, seed=7) == text
        assert model.write(**given, steps=3, seed=8) != text


def test_a_seed_stands_for_its_key(model):
    one, other = (model.generate(**given, count=1, steps=3).tokens for given in ({"seed": 3}, {"key": jax.random.key(3)}))
    np.testing.assert_array_equal(one, other)


def test_encode_and_decode_are_each_others_inverse(model):
    ids = model.encode("mask token")
    assert ids.dtype == np.int32 and ids.tolist() == list(b"mask token")
    assert model.decode(ids) == model.decode(ids[None]) == ["mask token"]


def test_a_model_describes_itself_in_ten_lines(model):
    title, *lines = repr(model).splitlines()
    shown = {line[2:16].strip(): line[16:] for line in lines}
    assert len(shown) == 9 and shown["vocabulary"] == "258, mask 257" and shown["tokenizer"] == "bytes"
    assert shown["kind"] == "dit" and shown["step"] == "8" and shown["max length"] == "16 tokens"
    assert shown["parameters"] == f"{model.denoiser.num_params:,} (float32)" and shown["adapter"] == "none"
    assert shown["soft-masking"].startswith("topk, k 2 (scale 0.4") and shown["chats"] == "no"


def test_generate_replays_recorded_uniforms(model):
    draws = np.random.default_rng(0).random((3, 1, 16, model.tokenizer.vocab_size))
    runs = [model.generate(key=jax.random.key(i), count=1, steps=3, draws=draws).tokens for i in (0, 1)]
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("options", [
    dict(alg="remdm_conf", nucleus_p=0.9), dict(alg="entropy", temperature=0.5, soft_mask="none"),
    dict(alg="confidence_factor", factor=1.5, forbidden=[1, 2]), dict(compat=True),
])  # fmt: skip
def test_every_sampler_takes_a_model_of_running_text(model, options):
    out = model.generate(key=jax.random.key(5), count=2, length=12, steps=3 if "conf" not in str(options) else None, **options)
    assert model.mask_token_id not in np.asarray(out.tokens) and np.all(out.filled == 12)
    assert not np.isin(out.tokens, options.get("forbidden", ())).any()


@pytest.mark.full
@pytest.mark.parametrize("options", [
    dict(alg="remdm_cap", nucleus_p=0.9, steps=4, eta=0.3), dict(alg="origin", temperature=0.5, steps=4),
    dict(alg="confidence_threshold", threshold=0.02, block_length=8, cache="prefix"),
    dict(alg="low_confidence", steps=8, block_length=8, cache="dual", cfg_scale=0.5, temperature=0.5),
], ids=lambda options: options["alg"])  # fmt: skip
def test_on_a_mesh_every_sampler_gives_what_one_device_gives(run, model, options):
    spread = softmask_jax.load(run, mesh=sharding.make_mesh(2, 2, 2, jax.devices()[:8]))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(spread.params))
    # Five rows are no multiple of the four pieces that the mesh cuts a batch into.
    one, many = (m.generate(key=jax.random.key(5), count=5, length=16, **options) for m in (model, spread))
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_array_equal(many.row_calls, one.row_calls)


def test_an_answer_depends_on_its_own_key_alone(model):
    keys = jax.random.split(jax.random.key(9), 3)
    x = np.full((3, 16), model.mask_token_id)
    options = Options(alg="mdlm", steps=4)
    whole = model.fill(x, keys=keys, options=options).tokens
    np.testing.assert_array_equal(model.fill(x[1:2], keys=keys[1:2], options=options).tokens, whole[1:2])


@pytest.mark.parametrize(
    "call, error, said",
    [
        (lambda run, model: softmask_jax.load("/nowhere"), FileNotFoundError, "no config.json"),
        (lambda run, model: softmask_jax.load(run, step=77), FileNotFoundError, "steps there: 4, 8"),
        (lambda run, model: softmask_jax.load(run, weights="best"), ValueError, "choose ema or raw"),
        (lambda run, model: model.logits(np.zeros(4, int)), ValueError, r"\[B L\]"),
        (lambda run, model: model.logits(np.full((1, 4), 9999)), ValueError, "must lie in"),
        (lambda run, model: model.logits(np.zeros((1, 4), int), np.ones((1, 3))), ValueError, "shape of tokens"),
        (lambda run, model: model.generate(key=None, alg="magic"), ValueError, "choose one of mdlm"),
        (lambda run, model: model.generate(key=None, steps=0), ValueError, "at least 1 step"),
        (lambda run, model: model.generate(key=jax.random.key(0), top_k=5), ValueError, "option of Dream's"),
        (lambda run, model: model.generate(key=jax.random.key(0), alg="remdm_conf", eta=0.1), ValueError, "has none"),
        (lambda run, model: model.generate(key=None, cache="dual"), ValueError, "give block_length too"),
        (lambda run, model: model.generate(key=None, alg="entropy", threshold=0.5), ValueError, "option of confidence_threshold"),
        (lambda run, model: model.generate(key=jax.random.key(0), length=17), ValueError, "has 17 tokens, .* takes 16"),
        (lambda run, model: model.generate(key=None, alg="origin", block_length=4), ValueError, "cannot decode in blocks"),
        (lambda run, model: softmask_jax.load(run.parent), FileNotFoundError, "--workdir of .*convert wrote.*PEFT's folder"),
        (lambda run, model: model.generate(steeps=8), ValueError, "no option steeps .* the nearest is 'steps'"),
        (lambda run, model: model.write("a", steeps=8), ValueError, "no option steeps .* the nearest is 'steps'"),
        (lambda run, model: model.generate("a"), ValueError, "write continues a text"),
        (lambda run, model: model.generate(key=0), ValueError, r"pass seed=0, or key=jax.random.key\(0\)"),
        (lambda run, model: model.generate(), ValueError, "pass seed=0"),
        (lambda run, model: model.generate(seed=-1), ValueError, "integer in 0"),
        (lambda run, model: model.generate(seed=0, key=jax.random.key(0)), ValueError, "not both"),
        (lambda run, model: model.nelbo(np.zeros((1, 4), int), 0), ValueError, r"pass jax.random.key\(seed, impl"),
        (lambda run, model: model.write([1, 2]), ValueError, "generate takes token ids"),
        (lambda run, model: model.write("a" * 16), ValueError, "too long for the 16 positions"),
        (lambda run, model: model.write("a", max_new_tokens=0), ValueError, "at least 1"),
        (lambda run, model: model.write("a", seed=0.5), ValueError, "integer in 0"),
        (lambda run, model: model.chat([{"role": "user", "content": "a"}]), ValueError, "use write"),
        (lambda run, model: model.encode([1]), ValueError, "takes a text"),
    ],
)
def test_mistakes_are_one_clear_line(run, model, call, error, said):
    with pytest.raises(error, match=said) as raised:
        call(run, model)
    assert "\n" not in str(raised.value)


def test_a_chat_may_have_every_form_that_training_reads_and_a_bad_one_is_one_clear_line():
    dream = softmask_jax.Model(DREAM, ByteTokenizer(), None, None, 0, template=ChatTemplate("{{ messages[0].content }}"))
    for content in ("hi", ["h", {"type": "text", "text": "i"}]):
        assert dream.encode_chat([{"from": "human", "value": content}]).tolist() == list(b"hi")
    for messages, said in (
        ([], "The chat has in 'messages' an empty list instead of a list of messages."),
        ([{"role": "user", "content": [{"type": "image"}]}], "of the type 'image'; only text is read."),
        ("hi", "The chat has in 'messages' str instead of a list of messages."),
    ):
        with pytest.raises(ValueError, match=said):
            dream.encode_chat(messages)
