"""Every mistake in a config gets one line that says what to do."""
import pytest

from softmask_jax import config
from softmask_jax.config import keys


def test_defaults_are_the_papers_169m_recipe():
    c = config.from_dict({})
    assert (c.model.hidden_size, c.model.num_blocks, c.model.num_heads, c.model.cond_dim) == (768, 12, 12, 128)
    assert (c.train.steps, c.train.global_batch_size, c.data.seq_len) == (1_000_000, 512, 1024)
    assert (c.optimizer.learning_rate, c.optimizer.sm_learning_rate, c.optimizer.warmup_steps) == (3e-4, 1e-2, 2500)
    assert (c.soft_mask.k, c.soft_mask.p_sm, c.soft_mask.init_scale) == (3, 0.8, 0.0)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"modle": {}}, "nearest is 'model'"),
        ({"model": {"hiden_size": 64}}, "nearest is 'hidden_size'"),
        ({"model": {"hidden_size": "big"}}, "must be int"),
        ({"train": {"steps": 0}}, "must be positive"),
        ({"train": {"steps": True}}, "must be int"),
        ({"soft_mask": {"p_sm": 1.5}}, "between 0 and 1"),
        ({"soft_mask": {"variant": "top"}}, "choose one of topk, full, slerp, hidden, none"),
        ({"optimizer": {"learning_rate": float("nan")}}, "finite"),
        ({"optimizer": {"b1": 1.0}}, "below 1"),
        ({"objective": {"t_eps": 0.0}}, "above 0"),
        ({"sample": {"nucleus_p": 0.0}}, "above 0"),
        ({"data": {"prefetch": -1}}, "zero or positive"),
        ({"train": {"global_batch_size": 10, "micro_batches": 3}}, "multiple of"),
        ({"checkpoint": {"every": 100}, "eval": {"every": 150}}, "a multiple of config.checkpoint.every"),
        ({"model": {"hidden_size": 65}}, "multiple of twice"),
        ({"data": {"source": "files"}}, "--config.data.paths"),
        ({"data": {"source": "parquet"}}, r"--config.data.paths='texts/\*.parquet'"),
        ({"data": {"validation_rule": "paths"}}, "belong together"),
        ({"data": {"validation_paths": "a.txt"}}, "belong together"),
        ({"train": {"budget": "iso_time"}}, "choose one of iso_update, iso_compute_paper, iso_flops"),
        ({"model": {"base_dtype": "int4"}}, "choose one of float, int8"),
        ({"model": {"base_dtype": "int8"}}, "base_dtype are for config.model.kind=dream"),
        ({"model": {"kind": "dream", "base": "x", "base_dtype": "int8"}, "data": {"source": "chat", "paths": "x"}},
         "cannot be trained: train an adapter"),
        ({"model": 3}, "must be a section"),
    ],
)
def test_a_mistake_is_one_clear_line(values, said):
    with pytest.raises(ValueError, match=said) as error:
        config.from_dict(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "budget, variant, p_sm, updates",
    [
        ("iso_update", "topk", 0.8, 1000),
        ("iso_compute_paper", "topk", 0.8, 500),
        ("iso_flops", "topk", 0.8, 789),  # 1000 x 3 / 3.8
        ("iso_flops", "topk", 0.0, 1000),
        ("iso_compute_paper", "none", 0.8, 1000),
        ("iso_flops", "none", 0.8, 1000),
    ],
)
def test_a_budget_says_how_many_updates_a_soft_masked_run_makes_for_the_steps_of_a_binary_one(
    budget, variant, p_sm, updates
):
    values = {"train": {"steps": 1000, "budget": budget}, "soft_mask": {"variant": variant, "p_sm": p_sm}}
    assert config.from_dict(values).updates == updates


@pytest.mark.parametrize("remat, adapter, updates", [
    ("none", "none", 857), ("full", "none", 889), ("none", "dora", 800), ("none", "lora", 800), ("full", "dora", 857),
])  # fmt: skip
def test_before_a_network_is_built_iso_flops_counts_the_products_of_its_layers(remat, adapter, updates):
    model = {"kind": "dream", "base": "x", "remat": remat, "adapter": adapter}
    values = {"model": model, "data": {"source": "chat", "paths": "x"}, "train": {"steps": 1000, "budget": "iso_flops"}}
    assert config.from_dict(values | {"soft_mask": {"p_sm": 0.5}}).updates == updates


def test_a_run_keeps_the_number_of_updates_that_it_was_begun_with():
    values = {"train": {"steps": 1000, "budget": "iso_flops"}, "model": {"remat": "full"}}
    asked = config.from_dict(values)
    # Before the number was recorded, 3 forward passes an update were counted.
    old = asked.to_dict()
    del old["train"]["updates"]
    assert config.of_run(old).updates == config.begun(asked, old).updates == 789
    recorded = asked.with_updates(820).to_dict()
    assert config.of_run(recorded).updates == config.begun(asked, recorded).updates == 820
    # What is run again may change on the way, the budget may not.
    changed = config.from_dict(values | {"model": {"remat": "none"}})
    assert config.begun(changed, recorded).updates == 820
    more = config.from_dict({**values, "train": {"steps": 2000, "budget": "iso_flops"}})
    assert config.begun(more, recorded).updates == more.updates == 1667
    assert config.begun(asked, None) == asked


def test_every_key_has_a_meaning_and_is_listed_with_its_default():
    listed = {words[0]: words[1:] for line in keys.table(config.Config).splitlines() if (words := line.split())}
    for name, value in config.flatten(config.Config().to_dict()).items():
        section, key = name.split(".")
        meaning = getattr(config.Config(), section).__dataclass_fields__[key].metadata["help"]
        assert listed[name][0] in (str(value), "''") and listed[name][1] == meaning.split()[0]


def test_the_list_of_keys_is_as_wide_as_asked():
    assert 90 < max(map(len, keys.table(config.Config, 100).splitlines())) <= 100


def test_overrides_reach_every_key_of_the_schema_also_those_the_file_leaves_out():
    c = config.load("configs/stdlib.py", ["train.log_every=7", "soft_mask.variant=none", "model.dropout=0.2"])
    assert (c.train.log_every, c.soft_mask.variant, c.model.dropout) == (7, "none", 0.2)


@pytest.mark.parametrize("text", ["512", "512,1024", "'512'", "None", "1e3"])
def test_text_may_look_like_numbers(text):
    assert config.load("configs/stdlib.py", [f"data.buckets={text}"]).data.buckets == text.strip("'")


@pytest.mark.parametrize("override, said", [("train.stepz=3", "nearest is 'steps'"), ("train.steps", "of the form")])
def test_a_wrong_override_is_refused(override, said):
    with pytest.raises(ValueError, match=said):
        config.load("configs/stdlib.py", [override])


def test_a_missing_config_file_names_those_that_exist():
    with pytest.raises(FileNotFoundError, match="configs/stdlib.py"):
        config.load("configs/stdlibb.py")


@pytest.mark.parametrize(
    "text, variant, said",
    [
        ("def get_config(:", "", "is no config file"),
        ("import nowhere_at_all", "", "No module named"),
        ("x = 1", "", "has no function get_config"),
        ("def get_config():\n    return None", "", "must return an ml_collections.ConfigDict, not NoneType"),
        ("def get_config():\n    return None", ":tiny", "has no variants"),
        ("def get_config(variant):\n    return None", "", "needs a variant"),
    ],
)
def test_a_broken_config_file_is_one_clear_line(tmp_path, text, variant, said):
    path = tmp_path / "broken.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        config.load(f"{path}{variant}")
    assert "\n" not in str(error.value)


def test_a_colon_in_the_path_of_a_config_file_begins_no_variant(tmp_path, monkeypatch):
    path = tmp_path / "proj:v2" / "a:b.py"
    path.parent.mkdir()
    path.write_text("from ml_collections import ConfigDict\n\ndef get_config(name=''):\n    return ConfigDict({'data': {'paths': name}})\n")
    monkeypatch.chdir(path.parent)
    for spec, variant in ((path, ""), (f"{path}:smoke", "smoke"), ("a:b.py", ""), ("a:b.py:smoke", "smoke")):
        assert config.load(str(spec)).data.paths == variant
