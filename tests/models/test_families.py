"""A family of one's own: one entry in the registry, then it trains, resumes, samples, converts, loads and is evaluated."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softmask_jax
from softmask_jax import config, main
from softmask_jax.config.kinds import KINDS, Kind
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.diffusion import soft_masking
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.diffusion.vocab.head import Head
from softmask_jax.evaluate.__main__ import main as evaluate
from softmask_jax.models import denoiser, families
from softmask_jax.models.keys import Entry, Keys

KEYS = (
    Entry("table", "embed.weight", "vocabulary", ("V", "D")),
    Entry("layers/mix", "layers.{i}.mix.weight", "transpose", ("D", "2D")),
    Entry("out", "head.weight", "vocabulary", ("V", "D")),
)


def build(model, soft_mask, about, *, mesh=None):
    """A network of one layer in which every position sees itself and the mean of all."""
    vocab_size, width, rows = about["vocab_size"], model.hidden_size, -(-about["vocab_size"] // 128) * 128
    rows_over = denoiser.layouts(mesh).rows_over
    real = (jnp.arange(rows) < vocab_size)[:, None]
    scalars = denoiser.initial_soft_mask(soft_mask, width)

    def init(key, base=None):
        table, mix, out = (0.1 * jax.random.normal(k, shape) for k, shape in zip(
            jax.random.split(key, 3), ((rows, width), (1, 2 * width, width), (rows, width))))  # fmt: skip
        return {"backbone": {"table": jnp.where(real, table, 0), "layers": {"mix": mix}, "out": jnp.where(real, out, 0)}, "soft_mask": scalars()}

    def trunk(backbone, x, *, sigma=None, positions=None, segment_ids=None, cache=None, dropout_keys=None):
        both = jnp.concatenate([x, jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)], -1)
        return rows_over(x + jnp.tanh(both @ backbone["layers"]["mix"][0])), None

    tables = {"table": ("vocab", "embed"), "layers": {"mix": ("layers", None, "embed")}, "out": ("vocab", "embed")}
    return denoiser.Denoiser(
        embedding=lambda backbone: backbone["table"], embed=lambda backbone, tokens: backbone["table"][tokens],
        trunk=trunk, head=lambda backbone: Head(backbone["out"], None, vocab_size, about["mask_token_id"], True), init=init,
        axes={"backbone": tables, "soft_mask": jax.tree.map(lambda _: (), soft_masking.init_scalars())},
        vocab_size=vocab_size, mask_token_id=about["mask_token_id"], num_params=2 * (vocab_size + width) * width,
        flops_per_token=lambda length: 2.0 * (vocab_size + 2 * width) * width,
    )  # fmt: skip


TOY = families.Family(
    Kind(), build, Nelbo.from_config,
    Keys("a toy", ("embed", "layers", "head"), lambda about: KEYS, lambda about: {"V": about["vocab_size"]}),
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with the family's run, trained by config, and its converted model."""
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", dict(families.FAMILIES))
        families.register("toy", TOY)
        arguments = ["--config=configs/stdlib.py:smoke", "--config.model.kind=toy", f"--workdir={folder / 'run'}"]
        assert main.main([*arguments, f"--config.data.cache_dir={folder / 'tokens'}"]) == 0
        yield folder / "run"
        del KINDS["toy"]


def test_it_trains_by_config_and_logs_as_every_model(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 6 and np.isfinite(summary["validation"]["two_pass/nelbo"])
    assert json.loads((run / "config.json").read_text())["model"]["kind"] == "toy"
    assert "A validation text, with plain and with soft masks" in (run / "trajectory.html").read_text("utf-8")
    assert "A text, step by step" in (run / "report.html").read_text("utf-8")


def test_a_loaded_checkpoint_has_the_one_model_class_and_its_validation_score(run):
    model = softmask_jax.load(run)
    out = model.generate(key=jax.random.key(0), count=2, steps=4)
    assert out.tokens.shape == (2, 32) and (np.asarray(out.tokens) != model.mask_token_id).all()
    assert len(model.decode(out.tokens)) == 2
    filled = model.generate(np.where(np.arange(32) % 2, model.mask_token_id, 65)[None], key=jax.random.key(1), steps=4)
    assert (np.asarray(filled.tokens)[0, ::2] == 65).all()
    tokens = np.arange(64).reshape(2, 32)
    assert model.logits(tokens).shape == (2, 32, model.denoiser.vocab_size)
    assert np.isfinite(model.nelbo(tokens, jax.random.key(0))).all()


def test_it_converts_to_a_model_with_the_same_logits(run):
    assert convert([f"--src={run}", f"--dst={run.parent / 'model'}", "--to=orbax", "--verify"]) == 0
    tokens = np.arange(64).reshape(2, 32)
    model, converted = softmask_jax.load(run), softmask_jax.load(run.parent / "model")
    np.testing.assert_array_equal(converted.logits(tokens), model.logits(tokens))
    assert converted.step == model.step == 6


def test_it_has_no_class_of_hugging_face(run, capsys):
    assert convert([f"--src={run}", f"--dst={run.parent / 'hf'}", "--to=hf"]) == 1
    assert "toy" in capsys.readouterr().err


def test_evaluate_measures_it_like_every_model(run):
    out = run.parent / "results"
    assert evaluate([f"--checkpoint=toy={run}", f"--out={out}", "--tasks=perplexity"]) == 0
    (row,) = json.loads((out / "results.json").read_text())["results"]
    assert (row["model"], row["task"]) == ("toy", "perplexity")
    assert 4 < row["estimates"]["nelbo"]["value"] < 7  # log 257 = 5.5, before it has learned much
    assert row["estimates"]["gain/nelbo"]["count"] > 1


def test_a_config_file_may_register_the_family_that_it_names(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.delitem(KINDS, "other", raising=False)
    file = tmp_path / "other.py"
    file.write_text(
        "from ml_collections import ConfigDict\nfrom softmask_jax.models import families\n"
        "from tests.models.test_families import TOY\n\nfamilies.register('other', TOY)\n\n\n"
        "def get_config():\n    return ConfigDict({'model': {'kind': 'other'}})\n"
    )
    assert config.load(str(file)).model.kind == "other" and families.of("other") is TOY
    assert config.load(str(file)).model.kind == "other"  # read again, as by a supervisor's next attempt
    del KINDS["other"]


def test_an_unknown_family_and_a_taken_name_are_errors_of_one_line():
    with pytest.raises(ValueError, match="config.model.kind is 'toi'; choose one of dit, dream"):
        config.load("configs/stdlib.py", ["model.kind=toi"])
    with pytest.raises(ValueError, match="dream is a family of this package"):
        families.register("dream", TOY)
