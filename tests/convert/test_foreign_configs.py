"""What the configs of other tools say: read, without effect, or refused by name before any weights are read."""
import argparse
import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

import softmask_jax
from softmask_jax.convert.__main__ import main
from softmask_jax.convert.model import read_adapter
from softmask_jax.convert.safetensors_files import SafetensorsFile
from softmask_jax.convert.sources import open_model
from softmask_jax.convert.tensors import hashes
from softmask_jax.models.nn.dream_config import DreamConfig
from tests.golden import FOLDER
from tests.helpers.checkpoint_files import mdlm_checkpoint, recorded

MODEL = {"length": 32, "n_heads": 2, "n_blocks": 2, "type": "ddit"}
MDLM = {
    "diffusion": "absorbing_state", "parameterization": "subs", "backbone": "dit", "time_conditioning": False, "T": 0,
    "subs_masking": False, "noise": {"type": "loglinear"}, "model": MODEL,
}  # fmt: skip


def changed(folder, file, change):
    """`change`: entries of a JSON file; those that are `...` go."""
    content = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    return folder


@pytest.fixture
def unread(monkeypatch):
    """No tensor may be read."""
    monkeypatch.setattr(SafetensorsFile, "_read", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(SafetensorsFile, "__init__", lambda *_: pytest.fail("weights were opened"))


# A Dream's config.json


@pytest.mark.parametrize("change", [
    {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    {"rope_theta": ..., "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default", "partial_rotary_factor": 1.0}},
    {"rope_parameters": {"rope_theta": 1e6}}, {"rope_scaling": {"rope_type": "default"}}, {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {}}, {"rope_scaling": {"rope_theta": 1e6, "rope_type": "default"}},
    {"layer_types": ["full_attention"] * 2, "sliding_window": 4096}, {"use_sliding_window": ..., "tie_word_embeddings": None},
    {"attention_bias": True, "mlp_bias": False, "head_dim": 16}, {"torch_dtype": ..., "dtype": "bfloat16", "temperature": 0.2},
    {"quantization_config": None, "some_new_entry": False, "another": {}},
], ids=str)  # fmt: skip
def test_a_dreams_config_that_says_the_same_in_other_words_is_the_same_network(tmp_path, change):
    src = changed(recorded("dream/tiny", tmp_path / "src"), "config.json", change)
    model = open_model(src)
    model.table()
    expected = DreamConfig.from_hf(json.loads((FOLDER / "dream/tiny/config.json").read_text()))
    assert DreamConfig.from_hf(model.about["hf_config"]) == expected


@pytest.mark.parametrize("change, said", [
    *(({"rope_parameters": {"rope_theta": 1e6, "rope_type": kind, "factor": 4.0}}, f"rope_type = '{kind}'")
      for kind in ("yarn", "linear", "dynamic", "llama3", "longrope")),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has type = 'linear'"),
    ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "factor": 2.0}}, "rope_parameters has factor = 2.0"),
    ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "full_attention"),
    ({"rope_parameters": "yarn"}, "no JSON object"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "disagree"),
    ({"rope_theta": "1e6"}, "rope_theta is '1e6'"), ({"rope_theta": ...}, "lacks rope_theta"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0"), ({"hidden_size": 64.0}, "hidden_size is 64.0"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"), ({"layer_types": 2}, "layer_types"),
    ({"use_sliding_window": True}, "use_sliding_window"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": False}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"), ({"head_dim": 32}, "head_dim"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"use_qk_norm": True}, "use_qk_norm = True"),
    ({"logit_scale": 0}, "logit_scale = 0"), ({"mask_token_id": ...}, "mask_token_id"), ({"eos_token_id": [1, 200]}, "eos_token_id"),
], ids=str)  # fmt: skip
def test_a_dream_of_another_network_is_refused_before_its_weights_are_read(tmp_path, unread, capsys, change, said):
    src = changed(recorded("dream/tiny", tmp_path / "src"), "config.json", change)
    assert main([f"--src={src}", f"--dst={tmp_path / 'dst'}"]) == 1
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


# PEFT's adapter_config.json


@pytest.mark.parametrize("change", [
    *({"init_lora_weights": how} for how in (None, False, "gaussian", "Gaussian", "eva", "orthogonal", "mica")),
    {"corda_config": {"covariance_file": "x"}, "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}},
    {"qalora_group_size": 16, "peft_version": "0.21.2", "ensure_weight_tying": True, "lora_dropout": 0.1, "task_type": None},
    {"layers_pattern": "layers", "runtime_config": {"ephemeral_gpu_offload": False}, "megatron_core": "megatron.core"},
    {"use_bdlora": None, "arrow_config": None, "alora_invocation_tokens": [], "a_field_of_tomorrow": False},
    {"exclude_modules": ["lm_head"]}, {"target_modules": r".*self_attn\.[qkvo]_proj"},
    {"target_modules": ["self_attn.q_proj", "self_attn.k_proj", "v_proj", "o_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
], ids=str)  # fmt: skip
def test_an_adapters_config_that_leaves_the_weights_meaning_alone_is_read(tmp_path, change):
    plain = open_model(recorded("dora/adapter", tmp_path / "plain"))
    model = open_model(changed(recorded("dora/adapter", tmp_path / "src"), "adapter_config.json", change))
    model.table()
    assert read_adapter(model.about) == read_adapter(plain.about)
    assert hashes(model.tensors) == hashes(plain.tensors)


@pytest.mark.parametrize("change, said", [
    *(({"init_lora_weights": how}, "changes the base")
      for how in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga", "loftq", "of_tomorrow")),
    ({"use_qalora": True}, "use_qalora"), ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"), ({"arrow_config": {"k": 1}}, "arrow_config"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"), ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
    ({"monteclora_config": {"num_samples": 8}}, "monteclora_config"), ({"velora_config": {"scale": 1.0}}, "velora_config"),
    ({"layers_to_transform": 0}, "layers_to_transform"), ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"trainable_token_indices": [5]}, "trainable_token_indices"), ({"target_parameters": ["x"]}, "target_parameters"),
    ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"), ({"lora_bias": True}, "lora_bias"), ({"bias": "all"}, "bias = 'all'"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"), ({"megatron_config": {"x": 1}}, "megatron_config"),
    ({"use_dora": "false"}, "use_dora"), ({"use_rslora": 1}, "use_rslora"), ({"a_field_of_tomorrow": 0.5}, "a_field_of_tomorrow"),
], ids=str)  # fmt: skip
def test_an_adapters_config_that_means_other_weights_is_refused_by_name(tmp_path, change, said):
    src = changed(recorded("dora/adapter", tmp_path / "src"), "adapter_config.json", change)
    with pytest.raises(ValueError, match=said) as error:
        open_model(src)
    assert "\n" not in str(error.value)


def test_an_adapter_on_some_layers_only_is_refused_in_one_line(tmp_path):
    src = changed(recorded("dora/adapter", tmp_path / "src"), "adapter_config.json", {"exclude_modules": r".*\.1\..*o_proj"})
    state = load_file(src / "adapter_model.safetensors")
    save_file({key: x for key, x in state.items() if "layers.1.self_attn.o_proj" not in key}, src / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="exclude_modules leave o_proj of layer 1 away"):
        open_model(src)


# MDLM's checkpoints


@pytest.mark.parametrize("content", [
    {"hyper_parameters": {"config": MDLM, "tokenizer": None}}, {"hyper_parameters": MDLM}, {"config": MDLM},
    {"hyper_parameters": {"config": {"algo": {"name": "mdlm", "parameterization": "subs", "T": 1000}, "model": MODEL}}},
], ids=["of MDLM", "flat", "beside", "of Duo's repository"])  # fmt: skip
def test_an_mdlm_says_so_wherever_its_config_is(tmp_path, content):
    model = open_model(mdlm_checkpoint(tmp_path / "x.ckpt", **content))
    assert model.about["config"]["data"]["seq_len"] == 32 and not model.notes


@pytest.mark.parametrize("config, said", [
    (MDLM | {"parameterization": "sedd"}, "parameterization = 'sedd'"), (MDLM | {"parameterization": "d3pm"}, "'d3pm'"),
    (MDLM | {"backbone": "ar"}, "backbone = 'ar'"), (MDLM | {"time_conditioning": True}, "time_conditioning"),
    (MDLM | {"time_conditioning": "yes"}, "time_conditioning"), (MDLM | {"diffusion": "uniform"}, "diffusion = 'uniform'"),
    (MDLM | {"parameterization": "${algo.kind}"}, "parameterization"), (MDLM | {"subs_masking": True}, "subs_masking"),
    (MDLM | {"model": MODEL | {"causal": True}}, "causal"), (MDLM | {"model": MODEL | {"type": "dimamba"}}, "type = 'dimamba'"),
    (MDLM | {"model": MODEL | {"n_heads": "2"}}, "model.n_heads = '2'"),
    *(({"algo": {"name": name}, "model": MODEL}, f"name = '{name}'") for name in ("sedd", "d3pm", "ar", "duo", "duo_base", "distillation")),
    ({"algo": {"parameterization": "mean"}, "model": MODEL}, "parameterization = 'mean'"), ({"algo": "sedd"}, "name = 'sedd'"),
    ({"algo": {"name": "mdlm", "causal_attention": True}}, "causal_attention"),
    ({"algo": {"name": "mdlm", "time_conditioning": True}}, "time_conditioning"),
], ids=str)  # fmt: skip
def test_another_method_with_mdlms_network_is_refused_by_name(tmp_path, config, said):
    for parameters in ({"config": config}, config):
        path = mdlm_checkpoint(tmp_path / "x.ckpt", hyper_parameters=parameters)
        with pytest.raises(ValueError) as error:
            open_model(path)
        assert said in str(error.value) and str(path) in str(error.value)


def test_a_namespace_is_read_as_a_config(tmp_path):
    config = argparse.Namespace(**MDLM | {"algo": argparse.Namespace(name="sedd")})
    with pytest.raises(ValueError, match="name = 'sedd'"):
        open_model(mdlm_checkpoint(tmp_path / "x.ckpt", hyper_parameters={"config": config}))


def test_a_checkpoint_without_a_config_is_converted_and_that_is_said(tmp_path, capsys):
    path = mdlm_checkpoint(tmp_path / "x.ckpt")
    assert main([f"--src={path}", f"--dst={tmp_path / 'dst'}"]) == 0
    assert f"Note: {path} does not say what it was trained as" in capsys.readouterr().out


def test_an_mdlm_of_hugging_face_is_known_by_its_config(tmp_path):
    hf = tmp_path / "hf"
    assert main([f"--src={FOLDER / 'mdlm_dit/mdlm_sm.ckpt'}", f"--dst={hf}", "--to=hf"]) == 0
    written = (hf / "config.json").read_text()
    open_model(changed(hf, "config.json", {"dtype": "float32", "return_dict": False, "_attn_implementation_autoset": True}))
    for change in (
        {"time_conditioning": True}, {"parameterization": "score"}, {"a_field_of_tomorrow": 3}, {"transparency_alg": "x"},
        {"mixinputs_k": "3"},
    ):  # fmt: skip
        (hf / "config.json").write_text(written)
        with pytest.raises(ValueError, match=next(iter(change))):
            open_model(changed(hf, "config.json", change))


# Soft-masking, and folders of this package


def test_a_transparency_config_without_soft_masking_needs_no_scalars(tmp_path):
    src = recorded("dora/adapter", tmp_path / "src")
    (src / "transparency_config.json").write_text('{"transparency_alg": "none"}')
    model = open_model(src)
    model.table()
    assert model.soft_mask is None and not model.raw_scalars()


@pytest.mark.parametrize("change, said", [
    ({"version": 2}, "newer version of softmask_jax (version 2)"), ({"of_tomorrow": {"x": 1}}, "newer version of softmask_jax (of_tomorrow)"),
    ({"base_dtype": "int4"}, "base_dtype = 'int4'"), ({"version": "1"}, "convert its source again"),
], ids=str)  # fmt: skip
def test_a_model_of_a_newer_version_is_refused(tmp_path, change, said):
    ours = {"format": "softmask_jax model", "version": 1, "kind": "dit"}
    (tmp_path / "config.json").write_text(json.dumps(ours | change))
    with pytest.raises(ValueError) as error:
        open_model(tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize("kind", ["dream", "mdlm"])
def test_configs_beside_the_weights_are_no_tokenizer(tmp_path, kind):
    src = recorded("dream/tiny", tmp_path / "src") if kind == "dream" else tmp_path / "src"
    if kind == "mdlm":
        assert main([f"--src={FOLDER / 'mdlm_dit/mdlm.ckpt'}", f"--dst={src}", "--to=hf"]) == 0
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (src / name).write_text("{}")
    assert main([f"--src={src}", f"--dst={tmp_path / 'ours'}"]) == 0
    model = softmask_jax.load(tmp_path / "ours")
    if kind == "mdlm":
        assert model.tokenizer.kind == "ids"
        return
    assert model.tokenizer is None
    with pytest.raises(ValueError, match="no tokenizer; convert it again"):
        model.decode([[1, 2]])


# Folders of checkpoints


def test_a_folder_of_several_checkpoints_lists_them(tmp_path):
    folder = tmp_path / "logs [v2]#?/checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(FOLDER / "mdlm_dit/mdlm.ckpt", folder / "0-100.ckpt")
    (folder / "last.ckpt").symlink_to("0-100.ckpt")
    for path in (folder, folder.parent, folder.parent.parent):
        assert open_model(path).kind == "dit"
    shutil.copy(FOLDER / "mdlm_dit/mdlm.ckpt", folder / "best.ckpt")
    for path in (folder, folder.parent, folder.parent.parent):
        with pytest.raises(ValueError, match=r"several checkpoints \(.*0-100.ckpt, .*best.ckpt, .*last.ckpt\); give one"):
            open_model(path)
