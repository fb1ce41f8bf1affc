"""Every config: the paper's values, and a smoke run of the very same code at toy size."""
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from softmask_jax import config
from softmask_jax.config import Texts
from softmask_jax.data import build
from softmask_jax.data.prepare import prepare
from softmask_jax.models import denoiser
from softmask_jax.training import loop, update_flops
from tests.helpers.tiny_run import home  # noqa: F401

# What fine-tunes Dream and LLaDA is run by test_dream_run.py and test_llada_run.py, what evaluates by evaluation/.
CONFIGS = sorted(path.stem for path in Path("configs").glob("*.py") if not path.stem.startswith(("dream", "llada", "eval")))
# In the core tier.
QUICK = ("mdlm_owt", "mdlm_owt_continued", "stdlib")
SETTINGS = ["train.compilation_cache={folder}/compiled", "data.cache_dir={folder}/tokens"]


def smoke(home, name: str, workdir: str, *overrides: str) -> dict:
    """The summary of a smoke run in `workdir`."""
    settings = [setting.format(folder=home.folder) for setting in SETTINGS]
    return loop.train(config.load(f"configs/{name}.py:smoke", [*settings, *overrides]), str(home.folder / workdir))


@pytest.fixture(scope="module")
def base(home):  # noqa: F811
    """A smoke run that others start from."""
    return smoke(home, "mdlm_owt", "mdlm_owt")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in CONFIGS]
)
def test_a_smoke_run_trains_validates_samples_saves_and_reports(home, base, name):  # noqa: F811
    start = [f"init.checkpoint={home.folder / 'mdlm_owt'}"] if name == "mdlm_owt_continued" else []
    summary = base if name == "mdlm_owt" else smoke(home, name, name, *start)
    assert summary["finished"] and summary["samples"] and summary["validation"]["two_pass/perplexity"] > 1
    folder = home.folder / name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} >= {"train", "validation", "samples", "final"}
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "checkpoints" / str(summary["step"])).is_dir()


@pytest.mark.parametrize(("seed", "kind"), [(0, "small"), (1, "large"), (2, "repeats"), (3, "unreadable")])
def test_smoke_runs_train_on_32_and_validate_on_8_documents_of_any_library(tmp_path, monkeypatch, seed, kind):
    random = np.random.default_rng(seed)
    library = tmp_path / "library"
    library.mkdir()
    for number in range(100 if kind == "large" else 40):
        path, text = library / f"{random.integers(1 << 40):x}.py", f"name = {number}\n" * random.integers(1, 9)
        path.write_text(text)
        if kind == "repeats":
            path.with_suffix(".again.py").write_text(text + "\n")
            path.with_suffix(".blank.py").write_text("\n" * random.integers(9))
        if kind == "unreadable":
            path.with_suffix(".latin.py").write_bytes(b"# caf\xe9\n")
            path.with_suffix(".gone.py").symlink_to("nothing")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    for name in CONFIGS:
        built = build(config.load(f"configs/{name}.py:smoke").data, cache_dir=str(tmp_path / "cache"))
        assert (built.info["train_documents"], built.info["validation_documents"]) == (32, 8), name


@pytest.mark.parametrize("count", [0, 1, 8])
def test_a_library_too_small_for_a_smoke_run_is_one_clear_line(tmp_path, monkeypatch, count):
    for number in range(count):
        (tmp_path / f"{number}.py").write_text(f"name = {number}\n" * 20)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match="no document for train" if count else "without") as error:
        build(config.load("configs/stdlib.py:smoke").data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mdlm_owt", "mdlm_owt_continued", "mdlm_lm1b", "text8"])
def test_the_169m_recipes_hold_the_papers_values(name):
    soft, binary = config.load(f"configs/{name}.py"), config.load(f"configs/{name}.py:binary")
    assert (soft.model.hidden_size, soft.model.num_blocks, soft.model.num_heads, soft.model.cond_dim) == (768, 12, 12, 128)
    assert (soft.model.dropout, soft.optimizer.learning_rate, soft.optimizer.warmup_steps) == (0.1, 3e-4, 2500)
    assert (soft.optimizer.sm_learning_rate, soft.optimizer.ema_decay, soft.optimizer.clip_norm) == (1e-2, 0.9999, 1.0)
    assert (soft.soft_mask.k, soft.soft_mask.p_sm, soft.soft_mask.variant) == (3, 0.8, "topk")
    assert (soft.soft_mask.init_scale, soft.soft_mask.init_centre, soft.soft_mask.init_steepness) == (0.0, -0.75, 6.66)
    assert (soft.train.global_batch_size, soft.train.seed) == (512, 1)
    steps, length = {
        "mdlm_owt": (1_000_000, 1024), "mdlm_owt_continued": (100_000, 1024), "mdlm_lm1b": (1_000_000, 128),
        "text8": (1_000_000, 256),
    }[name]  # fmt: skip
    assert (soft.train.steps, soft.data.seq_len, soft.updates) == (steps, length, steps)
    assert binary.soft_mask.variant == "none"
    halved = config.load(f"configs/{name}.py", ["train.budget=iso_compute_paper"])
    assert halved.updates == steps // 2


def test_the_continuations_of_the_long_run_cost_the_same_flops():
    soft, binary = config.load("configs/stdlib_bpe.py"), config.load("configs/stdlib_bpe.py:binary")
    network = denoiser.build(soft.model, soft.soft_mask, vocab_size=4099, mask_token_id=4098)
    plain, updates = update_flops.plain_passes(network, soft.model, soft.data.seq_len), update_flops.budgeted(soft, network).updates
    assert (updates, binary.updates) == (3119, 3800)
    assert updates * (plain + soft.soft_mask.p_sm) == pytest.approx(plain * binary.updates, rel=1e-3)


@pytest.mark.parametrize("name", ["dream7b", "dream_coder7b"])
def test_the_dream_recipes_hold_the_papers_values(name):
    c = config.load(f"configs/{name}.py")
    assert (c.model.adapter, c.model.adapter_rank, c.model.adapter_alpha, c.model.adapter_dropout) == ("dora", 16, 16.0, 0.0)
    assert (c.soft_mask.k, c.soft_mask.p_sm, c.soft_mask.init_scale, c.soft_mask.init_centre) == (1, 0.5, 0.0, -0.75)
    assert (c.objective.t_min, c.objective.t_max, c.objective.noise_eps, c.objective.weighting) == (0.2, 0.8, 1e-3, "time")
    assert (c.optimizer.learning_rate, c.optimizer.sm_learning_rate, c.optimizer.schedule) == (1e-5, 1e-2, "cosine")
    assert (c.optimizer.clip_norm, c.optimizer.weight_decay) == (7.0 / 8, 0.0)
    assert round(c.optimizer.warmup_steps / c.train.steps, 3) == 0.03
    assert (c.data.max_tokens, c.data.min_response, c.data.max_train, c.data.max_validation) == (2048, 5, 300_000, 500)
    assert (c.train.global_batch_size, c.train.micro_batches, c.eval.every) == (8, 8, 100)
    assert config.load(f"configs/{name}.py:binary").soft_mask.variant == "none"


def test_the_llada_recipe_is_dreams_but_for_the_base_and_lladas_own_loss():
    for variant in ("", ":binary", ":own", ":int8"):
        ours, dreams = (
            config.flatten(config.load(f"configs/{name}.py{variant}", ["data.paths=a.jsonl"]).to_dict())
            for name in ("llada8b", "dream7b")
        )  # fmt: skip
        differing = {name for name in ours if ours[name] != dreams[name]}
        assert differing == {"model.kind", "model.base", "model.base_source", "objective.loss", "data.pads", "data.buckets"}
    assert (ours["objective.loss"], ours["data.pads"], ours["objective.divisor"]) == ("llada", "row", "response")
    assert ours["model.base_source"] == "hf://GSAI-ML/LLaDA-8B-Instruct"


@pytest.mark.parametrize("name", ["dream7b", "dream_coder7b", "llada8b"])
def test_your_own_chats_are_named_by_a_flag(name):
    with pytest.raises(ValueError, match="say where with --config.data.paths='chats.jsonl'"):
        config.load(f"configs/{name}.py:own")
    own = config.load(f"configs/{name}.py:own", ["data.paths=chats.jsonl"])
    assert own.train.epochs and not own.counted and 2 <= own.sample.count <= 4


@pytest.mark.parametrize("name", [*CONFIGS, "dream7b", "dream_coder7b", "llada8b"])
def test_an_unknown_variant_names_those_there_are(name):
    with pytest.raises(ValueError, match="no variant 'tiny'; it has"):
        config.load(f"configs/{name}.py:tiny")


def test_a_recipe_without_its_shards_says_how_to_make_them(home):  # noqa: F811
    recipe = config.load("configs/mdlm_owt.py", [f"data.paths={home.folder}/nothing"])
    with pytest.raises(FileNotFoundError, match="no prepared corpus here.*python -m softmask_jax.data.prepare"):
        loop.train(recipe, str(home.folder / "no-shards"))


def test_a_continued_recipe_without_its_checkpoint_says_so(home):  # noqa: F811
    with pytest.raises(FileNotFoundError, match="config.init.checkpoint: no run in runs/mdlm_owt-smoke"):
        smoke(home, "mdlm_owt_continued", "no-checkpoint")


@pytest.mark.full
def test_a_run_from_shards_is_the_run_from_text_and_may_take_it_over(home, base):  # noqa: F811
    split = dict(max_documents=40, validation_rule="last", validation_documents=8)
    prepare(Texts(source="stdlib", tokenizer="bytes", **split), str(home.folder / "shards"), workers=1)
    shards = ["data.source=shards", f"data.paths={home.folder / 'shards'}"]
    assert smoke(home, "mdlm_owt", "from-shards", *shards)["validation"] == base["validation"]
    assert smoke(home, "mdlm_owt", "from-text", "train.steps=3")["step"] == 3
    assert smoke(home, "mdlm_owt", "from-text", *shards)["validation"] == base["validation"]
