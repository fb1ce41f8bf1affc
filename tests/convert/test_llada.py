"""LLaDA's Hugging Face folders in and out, which of its configs are refused, and adapters on it."""
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import softmask_jax
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.models.nn import llada_config
from tests.golden import FOLDER
from tests.helpers import llada_model
from tests.helpers.checkpoint_files import converts

MODULE = "base_model.model.model.transformer.blocks.{}.{}"
TARGETS = {"q_proj": "q", "attn_out": "o", "ff_proj": "gate", "ff_out": "down"}


def changed(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return folder


@pytest.mark.parametrize("name", llada_model.NAMES)
def test_llada_comes_back_as_the_same_files(tmp_path, name):
    src = llada_model.folder(name, tmp_path / "src")
    converts(src, tmp_path / "ours", "--verify")
    converts(tmp_path / "ours", tmp_path / "back", "--verify")
    assert {path.name for path in src.iterdir()} == {path.name for path in (tmp_path / "back").iterdir()}
    for path in src.iterdir():
        back = tmp_path / "back" / path.name
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads(back.read_text())
        else:
            theirs, ours = load_file(path), load_file(back)
            assert theirs.keys() == ours.keys() and all(theirs[key].dtype == ours[key].dtype for key in theirs)
            for key, value in theirs.items():
                np.testing.assert_array_equal(ours[key], value)


def test_sizes_that_are_null_or_absent_are_those_that_the_model_code_takes():
    about = llada_model.config_json("tiny_gqa_sharded")
    config = llada_config.from_hf(about)
    assert (config.num_heads, config.num_kv_heads, config.intermediate_size, config.vocab_size) == (6, 2, 80, 320)
    config = llada_config.from_hf(about | {"n_kv_heads": None, "mlp_hidden_size": None, "embedding_size": None})
    assert (config.num_kv_heads, config.intermediate_size, config.vocab_size) == (6, 4 * 48, 300)
    assert llada_config.from_hf(about | {"n_kv_heads": None, "multi_query_attention": True}).num_kv_heads == 1
    assert llada_config.from_hf(about | {"n_kv_heads": None, "multi_query_attention": False}).num_kv_heads == 6
    assert llada_config.from_hf({name: value for name, value in about.items() if name != "weight_tying"}).tied


@pytest.mark.parametrize("name, value", [
    ("alibi", True), ("include_bias", True), ("include_qkv_bias", True), ("bias_for_layer_norm", True),
    ("block_type", "sequential"), ("activation_type", "swiglu"), ("layer_norm_type", "default"),
    ("attention_layer_norm", True), ("clip_qkv", 8.0), ("scale_logits", True), ("input_emb_norm", True),
    ("rope", False), ("layer_norm_with_affine", False), ("embedding_size", 299), ("d_model", 0), ("d_model", 20),
    ("n_heads", "4"), ("vocab_size", None), ("rms_norm_eps", 0), ("rope_theta", "big"), ("n_kv_heads", 3),
    ("multi_query_attention", True), ("multi_query_attention", 1), ("weight_tying", None), ("mask_token_id", None), ("mask_token_id", 300), ("rope_scaling", {"type": "linear"}),
    ("num_experts", 64), ("emb_scale", 2.0), ("model_type", "llada2_moe"), ("mlp_ratio", "4"),
])  # fmt: skip
def test_another_network_is_refused_in_one_line_that_names_the_entry(tmp_path, capsys, name, value):
    remove = {"mlp_hidden_size": None} if name == "mlp_ratio" else {}
    src = changed(llada_model.folder("tiny", tmp_path / "src"), **remove, **{name: value})
    assert convert([f"--src={src}", f"--dst={tmp_path / 'ours'}"]) == 1
    error = capsys.readouterr().err
    assert name in error and len(error.splitlines()) == 1 and not (tmp_path / "ours").exists(), error


@pytest.mark.parametrize("name", ["activation_type", "block_type", "layer_norm_type", "rope"])
def test_an_entry_whose_default_is_another_network_must_be_there(name):
    about = llada_model.config_json()
    del about[name]
    with pytest.raises(ValueError, match=name):
        llada_config.from_hf(about)
    with pytest.raises(ValueError, match=name):
        llada_config.from_hf(about | {name: None})


def adapter(folder, targets=tuple(TARGETS), dora=True, **entries):
    """A random adapter on the layers of `tiny` in PEFT's format."""
    base, random = load_file(FOLDER / "llada/tiny/model.safetensors"), np.random.default_rng(0)
    tensors = {}
    for i in range(3):
        for target in targets:
            out, width = base[f"model.transformer.blocks.{i}.{target}.weight"].shape
            key = MODULE.format(i, target)
            tensors[f"{key}.lora_A.weight"] = random.normal(0, 0.1, (4, width)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = random.normal(0, 0.1, (out, 4)).astype(np.float32)
            if dora:
                tensors[f"{key}.lora_magnitude_vector"] = random.uniform(0.5, 2, out).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(targets), "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps(config | entries))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return llada_model.converted("tiny", tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_read_written_and_merged(tmp_path, base, dora):
    peft = adapter(tmp_path / "peft", dora=dora)
    converts(peft, tmp_path / "ours", "--verify")
    converts(tmp_path / "ours", tmp_path / "back", "--verify")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[key], ours[key]) for key in theirs)
    # PEFT would put "ff_out" onto the head as well.
    assert "exclude_modules" not in json.loads((peft / "adapter_config.json").read_text())
    config = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert config["exclude_modules"] == ["model.transformer.ff_out"]
    converts(peft, tmp_path / "merged", f"--base={base}", "--merge", "--verify", "--to=orbax")
    tokens = np.random.default_rng(1).integers(0, 288, (2, 12))
    models = (base, {}), (tmp_path / "ours", {"base": base}), (tmp_path / "merged", {})
    plain, apart, merged = (np.asarray(softmask_jax.load(path, **own).logits(tokens)) for path, own in models)
    assert np.abs(apart - plain).max() > 0.1
    np.testing.assert_allclose(merged, apart, atol=1e-4)


def test_an_adapter_on_attention_alone_is_told_apart_by_its_keys(tmp_path, base, capsys):
    peft = adapter(tmp_path / "peft", ("q_proj", "v_proj"), target_modules=r".*\.(q|v)_proj")
    converts(peft, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text())["base_kind"] == "llada"
    dream = FOLDER / "dream/tiny"
    assert convert([f"--src={peft}", f"--base={dream}", "--merge", f"--dst={tmp_path / 'merged'}"]) == 1
    assert "The adapter is for a model of kind llada, --base is dream" in capsys.readouterr().err
    converts(dream, tmp_path / "dream")
    with pytest.raises(ValueError, match="for a model of kind llada"):
        softmask_jax.load(tmp_path / "ours", base=tmp_path / "dream")


def test_an_adapter_on_the_head_is_refused_as_its_name_is_that_of_the_down_projection(tmp_path, capsys):
    peft = adapter(tmp_path / "peft", ("q_proj", "ff_out"))
    tensors = load_file(peft / "adapter_model.safetensors")
    key = "base_model.model.model.transformer.ff_out.lora_A.weight"
    save_file(tensors | {key: np.zeros((4, 64), np.float32)}, peft / "adapter_model.safetensors")
    assert convert([f"--src={peft}", f"--dst={tmp_path / 'ours'}"]) == 1
    error = capsys.readouterr().err
    assert "exclude_modules=['model.transformer.ff_out']" in error and len(error.splitlines()) == 1


def test_int8_kernels_of_llada_are_close_and_load(tmp_path, base):
    assert convert([f"--src={base}", f"--dst={tmp_path / 'int8'}", "--int8", "--verify"]) == 0
    tokens = np.random.default_rng(1).integers(0, 288, (2, 12))
    small, plain = softmask_jax.load(tmp_path / "int8"), softmask_jax.load(base)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(small.params["backbone"]["layers"]["q"]["kernel"])} == {"int8"}
    ours, theirs = (np.asarray(model.logits(tokens)) for model in (small, plain))
    assert 0 < np.abs(ours - theirs).mean() < 0.05 * np.abs(theirs).mean()
