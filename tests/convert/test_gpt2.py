"""GPT-2's checkpoints in every form that they are found in, and what is refused."""
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from softmask_jax.convert.gpt2 import Checkpoint
from softmask_jax.models.nn import gpt2
from tests.golden import FOLDER
from tests.helpers import tiny_gpt2

FILES = {
    "tiny": ("gpt2/tiny/config.json", "gpt2/tiny/model.safetensors"),
    "half_sharded": (
        "gpt2/half_sharded/config.json", "gpt2/half_sharded/model.safetensors.index.json",
        "gpt2/half_sharded/model-00001-of-00002.safetensors", "gpt2/half_sharded/model-00002-of-00002.safetensors",
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "scorer"
    copy.mkdir()
    for name in FILES["tiny"]:
        shutil.copy(FOLDER / name, copy)
    return copy


def change(folder, function) -> None:
    """Rewrites the weights as `function` of their dict."""
    path = folder / "model.safetensors"
    save_file(function(load_file(path)), path)


def configure(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_same(ours, theirs) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture(scope="module")
def tiny():
    return Checkpoint(FOLDER / "gpt2/tiny").read()


def without_prefix(tensors):
    return {key.removeprefix("transformer."): x for key, x in tensors.items()}


def with_buffers(tensors):
    mask = np.tril(np.ones((1, 1, 24, 24), np.uint8))
    more = {f"transformer.h.{i}.attn.bias": mask for i in range(2)}
    more |= {f"transformer.h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(2)}
    return tensors | more


def with_head(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].copy()}


@pytest.mark.parametrize("function", [without_prefix, with_buffers, with_head], ids=lambda f: f.__name__)
def test_other_forms_of_the_same_weights_are_the_same_model(folder, tiny, function):
    change(folder, function)
    params, fingerprint = Checkpoint(folder).read()
    assert_same(params, tiny[0])
    assert fingerprint == tiny[1]


def test_layers_are_stacked_and_vocabularies_padded_with_zeros(tiny):
    config = Checkpoint(FOLDER / "gpt2/tiny").config
    stored = load_file(FOLDER / "gpt2/tiny/model.safetensors")
    for i in range(2):
        kernel = stored[f"transformer.h.{i}.attn.c_attn.weight"]
        np.testing.assert_array_equal(tiny[0]["layers"]["qkv"]["kernel"][i], kernel)
    table = tiny[0]["embed"]["table"]
    assert table.shape == (128, 32) and not table[96:].any()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), tiny[0]) == jax.tree.map(
        lambda x: (x.shape, x.dtype), gpt2.shapes(config)
    )


def test_float16_shards_are_read_as_float32():
    params, _ = Checkpoint(FOLDER / "gpt2/half_sharded").read()
    stored = load_file(FOLDER / "gpt2/half_sharded/model-00001-of-00002.safetensors")
    kernel = stored["transformer.h.0.mlp.c_fc.weight"]
    assert kernel.dtype == np.float16 and params["layers"]["mlp_in"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(params["layers"]["mlp_in"]["kernel"][0], kernel.astype(np.float32))


def test_matrices_alone_take_the_compute_dtype():
    params, _ = Checkpoint(FOLDER / "gpt2/tiny", "bfloat16").read()
    assert params["layers"]["qkv"]["kernel"].dtype == "bfloat16" and params["layers"]["qkv"]["bias"].dtype == "float32"


def test_any_other_weight_is_another_model(folder, tiny):
    name = "transformer.h.1.mlp.c_proj.weight"
    change(folder, lambda tensors: tensors | {name: tensors[name] + np.float32(1e-3)})
    assert Checkpoint(folder).read()[1] != tiny[1]


def test_a_head_of_its_own_is_read_where_the_config_says_so(folder):
    head = np.arange(96 * 32, dtype=np.float32).reshape(96, 32)
    change(folder, lambda tensors: tensors | {"lm_head.weight": head})
    with pytest.raises(ValueError, match="is not wte.weight, though config.json ties them"):
        Checkpoint(folder).read()
    configure(folder, tie_word_embeddings=False)
    np.testing.assert_array_equal(gpt2.head(Checkpoint(folder).read()[0])[:96], head)
    change(folder, lambda tensors: {key: x for key, x in tensors.items() if key != "lm_head.weight"})
    with pytest.raises(ValueError, match="missing: lm_head.weight"):
        Checkpoint(folder)


def test_keys_that_do_not_fit_are_all_named(folder):
    def spoil(tensors):
        del tensors["transformer.h.1.ln_2.bias"]
        return tensors | {
            "transformer.h.2.ln_1.bias": np.zeros(32, np.float32), "transformer.wpe.weight": np.zeros((23, 32), np.float32),
            "transformer.ln_f.bias": np.zeros(32, np.int32),
        }  # fmt: skip

    change(folder, spoil)
    with pytest.raises(ValueError) as error:
        Checkpoint(folder)
    for part in ("missing: h.1.ln_2.bias", "unexpected: h.2.ln_1.bias", "misshapen: wpe.weight", "mistyped: ln_f.bias"):
        assert part in str(error.value)


def test_a_key_with_and_without_its_prefix_is_refused(folder):
    change(folder, lambda tensors: tensors | {"wpe.weight": tensors["transformer.wpe.weight"].copy()})
    with pytest.raises(ValueError, match="has wpe.weight twice"):
        Checkpoint(folder)


def test_a_config_of_another_size_is_refused(folder):
    configure(folder, n_layer=1)
    with pytest.raises(ValueError, match="unexpected: h.1"):
        Checkpoint(folder)
    configure(folder, n_layer=2, vocab_size=95)
    with pytest.raises(ValueError, match="misshapen: wte.weight"):
        Checkpoint(folder)


def test_missing_files_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        Checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        Checkpoint(folder)


def test_another_family_is_refused_with_its_folder(folder):
    configure(folder, model_type="gpt_neo")
    with pytest.raises(ValueError, match=f"^{folder}.*'gpt_neo'"):
        Checkpoint(folder)


def test_the_tests_own_model_is_one(tmp_path):
    config = Checkpoint(tiny_gpt2.write(tmp_path / "made")).config
    assert config.vocab_size == 256 + len(tiny_gpt2.MERGES) + 1
