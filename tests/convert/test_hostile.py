"""Folders of weights that are broken or mean harm: each is refused in one line, and none of their code runs."""
import json
import os
import re

import pytest

from softmask_jax.convert import safe_files, safetensors_files
from softmask_jax.convert.sources import open_model
from tests.helpers.checkpoint_files import recorded, safetensors
from tests.helpers.refused import refused

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "a header longer than the file": safetensors({"a": ONE}, b"\0" * 8, length=10**6),
    "a header of 2^63 bytes": safetensors({"a": ONE}, b"\0" * 8, length=2**63),
    "a header of 2^64 - 1 bytes": safetensors({"a": ONE}, b"\0" * 8, length=2**64 - 1),
    "an empty file": b"",
    "seven bytes": b"\0" * 7,
    "no JSON": safetensors(b"not JSON", b"\0" * 8),
    "a list for a header": safetensors(b"[1, 2, 3, 4, 5]", b"\0" * 8),
    "nesting": safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "overlapping tensors": safetensors({"a": ONE, "b": ONE}, b"\0" * 8),
    "a gap": safetensors({"a": ONE, "b": {**ONE, "data_offsets": [16, 24]}}, b"\0" * 24),
    "a shape that does not fit its bytes": safetensors({"a": {**ONE, "shape": [3]}}, b"\0" * 8),
    "a shape that overflows": safetensors({"a": {**ONE, "shape": [2**62, 2**62]}}, b"\0" * 8),
    "a negative size": safetensors({"a": {**ONE, "shape": [-2]}}, b"\0" * 8),
    "offsets that run backwards": safetensors({"a": {**ONE, "data_offsets": [8, 0]}}, b"\0" * 8),
    "data cut off": safetensors({"a": ONE}, b"\0" * 7),
    "data left over": safetensors({"a": ONE}, b"\0" * 9),
    "an unknown type": safetensors({"a": {**ONE, "dtype": "Q7"}}, b"\0" * 8),
    "a type that is not read here": safetensors(
        {"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, b"\0" * 8
    ),
    "a key twice": safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(ONE).encode(),) * 2), b"\0" * 8),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=list(HEADERS))
def test_safetensors_that_lie_are_refused(tmp_path, content):
    src = recorded("dream/tiny", tmp_path / "src")
    (src / "model.safetensors").write_bytes(content)
    refused(src, "model.safetensors")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\0b", 7, ["x"]])
def test_index_entries_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    src = recorded("dream/tiny_sharded", tmp_path / "src")
    (tmp_path / "x.safetensors").write_bytes((src / "model-00001-of-00005.safetensors").read_bytes())
    index = json.loads((src / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = name
    (src / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(src)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    src = recorded("dream/tiny_sharded", tmp_path / "src")
    index = json.loads((src / "model.safetensors.index.json").read_text())

    def with_map(change):
        (src / "model.safetensors.index.json").write_text(
            json.dumps(index | {"weight_map": change(dict(index["weight_map"]))})
        )

    with_map(lambda m: m | {"model.norm.weight": "model-00005-of-00005.safetensors"})
    refused(src, "not in model-00005-of-00005.safetensors: model.norm.weight")
    with_map(
        lambda m: {k: v for k, v in m.items() if k != "lm_head.weight"} | {"x": "model-00005-of-00005.safetensors"}
    )
    refused(src, "not in the index: lm_head.weight")
    with_map(lambda m: m | {"x": "model-00009-of-00005.safetensors"})
    refused(src, "model-00009-of-00005.safetensors is missing")
    with_map(lambda m: {})
    refused(src, "no weight_map")


def test_links_out_of_the_folder_loops_and_pipes_are_refused(tmp_path):
    src = recorded("dream/tiny", tmp_path / "src")
    weights = src / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(src, "link to a file outside")
    weights.unlink()
    weights.symlink_to(weights)
    refused(src, "cannot be read")
    weights.unlink()
    os.mkfifo(weights)
    refused(src, "no regular file")
    weights.unlink()
    (tmp_path / "elsewhere.safetensors").rename(weights)
    (src / "tokenizer.json").symlink_to("/etc/passwd")
    refused(src, "link to a file outside")


def test_the_hubs_own_links_into_its_cache_are_read(tmp_path):
    src = recorded("dream/tiny", tmp_path / "models--a--b/snapshots/abc")
    blobs = tmp_path / "models--a--b/blobs"
    blobs.mkdir()
    (src / "model.safetensors").rename(blobs / "123")
    (src / "model.safetensors").symlink_to("../../blobs/123")
    open_model(src).table()


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "no valid JSON"),
        ("[]", "no JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"model_type": "Dream", "model_type": "mdlm"}', "twice"),
        ('{"model_type": "gpt2"}', "model_type"),
        ('{"model_type": "Dream"}', "vocab_size"),
        ('{"model_type": "mdlm", "hidden_dim": "9"}', "must be given as a number"),
        ('{"format": "softmask_jax model", "version": 99, "kind": "dit"}', "convert its source again"),
    ],
)
def test_configs_that_make_no_sense_are_refused(tmp_path, text, said):
    src = recorded("dream/tiny", tmp_path / "src")
    (src / "config.json").write_text(text)
    refused(src, said)


def test_a_config_of_absurd_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_files, "JSON_BYTES", 100)
    refused(recorded("dream/tiny", tmp_path / "src"), "more than the 100")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_key_value_heads": 3}, "divisible"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": 10**9}, "vocab_size"),
    ],
)
def test_a_dream_that_is_not_built_here_is_refused(tmp_path, change, said):
    src = recorded("dream/tiny", tmp_path / "src")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | change))
    refused(src, said)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"peft_type": "IA3"}, "LORA"),
        ({"r": 0}, "above 0"),
        ({"r": True}, "above 0"),
        ({"lora_alpha": "8"}, "numbers"),
        ({"target_modules": ["q_proj", "os.system"]}, "target_modules"),
        ({"target_modules": 7}, "target_modules"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ],
)
def test_an_adapter_that_is_not_built_here_is_refused(tmp_path, change, said):
    src = recorded("dora/adapter", tmp_path / "src")
    config = json.loads((src / "adapter_config.json").read_text())
    (src / "adapter_config.json").write_text(json.dumps(config | change))
    refused(src, said)


@pytest.mark.parametrize(
    "change",
    [
        {"transparency_alg": "eval"}, {"transparency_scale": 2.0}, {"transparency_centre": 1.0}, {"mixinputs_k": 0},
        {"transparency_scheduling": "x"}, {"transparency_steepness": None}, {"mixture_temp": "nan"},
    ],
)  # fmt: skip
def test_soft_masking_out_of_range_is_refused(tmp_path, change):
    src = recorded("dora/adapter", tmp_path / "src")
    config = json.loads((src / "transparency_config.json").read_text())
    (src / "transparency_config.json").write_text(json.dumps(config | change))
    refused(src, "transparency_config.json")


def test_pickled_adapters_and_unknown_folders_are_refused(tmp_path):
    src = recorded("dora/adapter", tmp_path / "src")
    (src / "adapter_model.safetensors").rename(src / "adapter_model.bin")
    refused(src, "is a pickle")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "nothing that can be converted")
    refused(tmp_path / "nowhere", "does not exist")


def test_an_adapter_with_the_same_tensor_twice_is_refused(tmp_path):
    src = recorded("dora/adapter", tmp_path / "src")
    folder = safetensors_files.SafetensorsFolder(src, "adapter_model.safetensors")
    key = next(iter(folder.specs))
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(
        (key, re.sub(r"\.weight$", ".default.weight", key)))}  # fmt: skip
    (src / "adapter_model.safetensors").write_bytes(safetensors(header, b"\0" * 8))
    refused(src, "the same tensor")
