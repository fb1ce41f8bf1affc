"""Every format in and out: the same numbers, bit for bit where the type is the same."""
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import softmask_jax
from softmask_jax import config, data
from softmask_jax.convert import converted, mdlm, safetensors_files
from softmask_jax.convert.sources import open_model
from softmask_jax.convert.tensors import in_memory, whole
from softmask_jax.diffusion import soft_masking
from softmask_jax.io import checkpoint, tree_files
from softmask_jax.io.run_folder import RunFolder
from softmask_jax.models import denoiser
from softmask_jax.models.nn import dit
from tests.golden import FOLDER, load
from tests.helpers import torch_weights
from tests.helpers.checkpoint_files import recorded
from tests.helpers.checkpoint_files import converts, same_files

LOGITS = {"mdlm": "mdlm_dit/mdlm_ckpt_logits.npz", "mdlm_sm": "mdlm_dit/mdlm_sm_ckpt_logits.npz"}


@pytest.mark.parametrize("name", ["dream/tiny", "dream/tiny_sharded", "dream/tiny_bf16"])
def test_dream_comes_back_as_the_same_files(tmp_path, name):
    src = recorded(name, tmp_path / "src")
    (src / "tokenizer_config.json").write_text('{"any": "thing"}')
    converts(src, tmp_path / "ours", "--verify")
    converts(tmp_path / "ours", tmp_path / "back", "--verify")
    same_files(src, tmp_path / "back")


def test_dream_becomes_stacked_transposed_and_padded_arrays_of_its_own_type(tmp_path):
    src = recorded("dream/tiny_bf16", tmp_path / "src")
    converts(src, tmp_path / "ours")
    theirs = load_file(src / "model.safetensors")
    backbone = tree_files.read_trees(tmp_path / "ours", ("params",))["params"]["backbone"]
    assert set(backbone) == {"embed", "layers", "final_norm", "head"}
    assert backbone["embed"]["table"].shape == (256, 64) and backbone["embed"]["table"].dtype == jnp.bfloat16
    assert not np.any(backbone["head"]["weight"][200:])
    np.testing.assert_array_equal(backbone["head"]["weight"][:200], theirs["lm_head.weight"])
    for i in range(2):
        down, bias = theirs[f"model.layers.{i}.mlp.down_proj.weight"], theirs[f"model.layers.{i}.self_attn.k_proj.bias"]
        np.testing.assert_array_equal(backbone["layers"]["down"]["kernel"][i], down.T)
        np.testing.assert_array_equal(backbone["layers"]["k"]["bias"][i], bias)
    assert backbone["layers"]["gate"]["kernel"].shape == (2, 64, 128)


def test_tensors_in_many_pieces_and_rows_in_many_chunks_are_the_same(tmp_path, monkeypatch):
    src = recorded("dream/tiny", tmp_path / "src")
    for module in ("orbax_files", "safetensors_files"):
        monkeypatch.setattr(f"softmask_jax.convert.{module}.PIECE_BYTES", 3000)
    monkeypatch.setattr("softmask_jax.convert.orbax_files.CHUNK_BYTES", 128 * 64 * 4)
    converts(src, tmp_path / "ours", "--verify")
    assert len(list((tmp_path / "ours/params/backbone.embed.table").iterdir())) == 3
    monkeypatch.undo()
    converts(tmp_path / "ours", tmp_path / "back", "--verify")
    same_files(src, tmp_path / "back")


def test_weights_above_the_limit_go_into_several_files_with_an_index(tmp_path):
    arrays = {f"t{i}": np.full((4, 8), i, np.float32) for i in range(5)}
    safetensors_files.write(tmp_path, in_memory(arrays), shard_bytes=300)
    assert len(list(tmp_path.glob("model-0000?-of-00003.safetensors"))) == 3
    folder = safetensors_files.SafetensorsFolder(tmp_path)
    for key, array in arrays.items():
        np.testing.assert_array_equal(whole(folder, key), array)
        np.testing.assert_array_equal(load_file(tmp_path / folder.files[key])[key], array)


@pytest.mark.parametrize("name", ["mdlm", "mdlm_sm"])
@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_lightning_checkpoint_gives_its_logits_through_load(tmp_path, name, weights):
    converts(FOLDER / f"mdlm_dit/{name}.ckpt", tmp_path / "ours", f"--weights={weights}", "--verify")
    model, recorded_logits = softmask_jax.load(tmp_path / "ours"), load(LOGITS[name])
    np.testing.assert_allclose(model.logits(recorded_logits["ids"]), recorded_logits[f"logits_{weights}"], atol=2e-5)
    assert (model.denoiser.mask_token_id, model.denoiser.vocab_size, model.step) == (97, 98, 3)
    assert model.config.soft_mask.variant == ("topk" if name == "mdlm_sm" else "none")
    assert model.config.data.seq_len == 32


def test_without_a_choice_the_averaged_weights_are_taken_and_scalars_stay_raw(tmp_path):
    default = open_model(FOLDER / "mdlm_dit/mdlm_sm.ckpt")
    assert default.about["weights"] == "ema"
    raw = open_model(FOLDER / "mdlm_dit/mdlm_sm.ckpt", "raw")
    assert np.any(
        whole(default.tensors, "backbone.output_layer.linear.bias")
        != whole(raw.tensors, "backbone.output_layer.linear.bias")
    )
    assert (
        default.raw_scalars() == raw.raw_scalars() != {k: np.float32(v) for k, v in soft_masking.init_scalars().items()}
    )


def test_mdlm_goes_to_hugging_faces_format_and_back(tmp_path):
    converts(FOLDER / "mdlm_dit/mdlm_sm.ckpt", tmp_path / "ours")
    converts(tmp_path / "ours", tmp_path / "hf", "--verify")
    theirs = load_file(tmp_path / "hf/model.safetensors")
    assert set(theirs) == set(load("mdlm_dit/params.npz"))
    np.testing.assert_array_equal(
        theirs[mdlm.INVERSE_FREQUENCIES], load("mdlm_dit/params.npz")[mdlm.INVERSE_FREQUENCIES]
    )
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert (written["model_type"], written["hidden_dim"], written["n_heads"], written["vocab_size"]) == (
        "mdlm",
        64,
        2,
        98,
    )
    converts(tmp_path / "hf", tmp_path / "again", "--verify")
    one, other = (tree_files.read_trees(tmp_path / name, ("params",)) for name in ("ours", "again"))
    chex.assert_trees_all_equal(one, other)
    again = softmask_jax.load(tmp_path / "again")
    assert (again.config.soft_mask.variant, again.config.soft_mask.k) == ("topk", 3)


def test_a_plain_mdlm_exports_no_soft_masking(tmp_path):
    converts(FOLDER / "mdlm_dit/mdlm.ckpt", tmp_path / "hf", "--to=hf")
    assert not any(key.startswith("tran_head") for key in load_file(tmp_path / "hf/model.safetensors"))


def test_half_precision_weights_of_mdlm_become_float32(tmp_path):
    converts(FOLDER / "mdlm_dit/mdlm.ckpt", tmp_path / "hf", "--to=hf")
    rounded = {k: v.astype(jnp.bfloat16) for k, v in load_file(tmp_path / "hf/model.safetensors").items()}
    save_file(rounded, tmp_path / "hf/model.safetensors")
    converts(tmp_path / "hf", tmp_path / "ours", "--verify")
    model = softmask_jax.load(tmp_path / "ours")
    np.testing.assert_array_equal(
        model.params["backbone"]["head"]["weight"][:98],
        rounded["backbone.output_layer.linear.weight"].astype(np.float32),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with one checkpoint of step 4, its averaged weights twice the raw ones."""
    folder = tmp_path_factory.mktemp("run")
    sizes = {"hidden_size": 16, "num_blocks": 2, "num_heads": 2, "cond_dim": 8, "compute_dtype": "float32"}
    settings = config.from_dict({"model": sizes, "data": {"seq_len": 16}})
    tokenizer = data.ByteTokenizer()
    model = denoiser.build(settings.model, settings.soft_mask, vocab_size=258, mask_token_id=257)
    params = jax.jit(model.init)(jax.random.key(0))
    params["backbone"]["head"]["bias"] = params["backbone"]["head"]["bias"].at[:258].set(0.1)
    with (
        RunFolder(folder) as written,
        checkpoint.Checkpoints(folder / "checkpoints", keep=1, keep_best=0) as checkpoints,
    ):
        written.write_config(settings.to_dict())
        tokenizer.save(folder / "tokenizer")
        trees = {"params": params, "ema": jax.tree.map(lambda x: 2 * x, params["backbone"])}
        checkpoints.save(4, trees, {"step": 4}, {})
        checkpoints.wait()
    return folder


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_run_becomes_a_model_with_the_same_parameters(tmp_path, run, weights):
    converts(run, tmp_path / "ours", "--to=orbax", f"--weights={weights}", "--verify")
    wanted, found = softmask_jax.load(run, weights=weights), softmask_jax.load(tmp_path / "ours")
    chex.assert_trees_all_equal(found.params, wanted.params)
    assert (found.tokenizer, found.config, found.step) == (wanted.tokenizer, wanted.config, 4)


def test_a_run_is_exported_and_read_again_by_the_key_table(tmp_path, run):
    converts(run, tmp_path / "hf", "--verify")
    again = torch_weights.from_torch(load_file(tmp_path / "hf/model.safetensors"), 2)
    chex.assert_trees_all_equal(again, softmask_jax.load(run).params)


def test_a_tokenizer_may_be_added_and_without_one_ids_are_shown(tmp_path):
    model = dit.DiTConfig(vocab_size=258, hidden_size=8, num_blocks=1, num_heads=2, cond_dim=4, mlp_ratio=4, rope_base=1e4)
    params = {"backbone": jax.jit(lambda key: dit.init(model, key))(jax.random.key(0))}
    (tmp_path / "src").mkdir()
    save_file(torch_weights.to_torch(params, 258, num_heads=2), tmp_path / "src/model.safetensors")
    sizes = {"hidden_dim": 8, "cond_dim": 4, "n_blocks": 1, "n_heads": 2, "vocab_size": 258, "model_type": "mdlm"}
    (tmp_path / "src/config.json").write_text(json.dumps(sizes))
    converts(tmp_path / "src", tmp_path / "with", "--tokenizer=bytes", "--verify")
    assert softmask_jax.load(tmp_path / "with").decode([[104, 105]]) == ["hi"]
    converts(tmp_path / "src", tmp_path / "without")
    without = softmask_jax.load(tmp_path / "without")
    assert without.decode([[104, 257]]) == [" 104 ▁"]
    with pytest.raises(ValueError, match="--tokenizer"):
        without.tokenizer.encode("hi")


def test_a_run_starts_from_a_converted_model_with_its_tokenizer(tmp_path, run):
    converts(run, tmp_path / "learned", "--to=orbax", "--weights=raw")
    loaded = softmask_jax.load(run, weights="raw")
    abstract = jax.eval_shape(loaded.denoiser.init, jax.random.key(0))
    started = converted.start(tmp_path / "learned", data.ByteTokenizer(), abstract)
    chex.assert_trees_all_equal(started, loaded.params)
    with pytest.raises(ValueError, match="another tokenizer"):
        converted.start(tmp_path / "learned", data.open_tokenizer("text8"), abstract)
    converts(FOLDER / "mdlm_dit/mdlm.ckpt", tmp_path / "plain")
    plain = softmask_jax.load(tmp_path / "plain")
    assert set(converted.start(tmp_path / "plain", plain.tokenizer, plain.params)) == {"backbone"}
    with pytest.raises(ValueError, match="another model"):
        converted.start(tmp_path / "plain", plain.tokenizer, abstract)


def test_the_manifest_lists_hashes_types_and_shapes(tmp_path):
    converts(recorded("dream/tiny_bf16", tmp_path / "src"), tmp_path / "ours")
    manifest = json.loads((tmp_path / "ours/manifest.json").read_text())
    assert manifest["arrays"]["backbone/layers/q/kernel"] == {"dtype": "bfloat16", "shape": [2, 64, 64]}
    head = manifest["tensors"]["lm_head.weight"]
    assert (head["dtype"], head["shape"], len(head["sha256"])) == ("bfloat16", [200, 64], 64)
    assert tree_files.verify(tmp_path / "ours")


def test_damaged_parameters_are_not_loaded(tmp_path):
    converts(FOLDER / "mdlm_dit/mdlm.ckpt", tmp_path / "ours")
    victim = tmp_path / "ours/params/backbone.head.bias/0"
    content = bytearray(victim.read_bytes())
    content[7] ^= 1
    victim.write_bytes(content)
    with pytest.raises(RuntimeError, match="has changed since it was written"):
        softmask_jax.load(tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours/params")
    with pytest.raises((RuntimeError, FileNotFoundError)):
        softmask_jax.load(tmp_path / "ours")


def test_only_an_mdlm_is_loaded_yet(tmp_path):
    converts(recorded("dream/tiny", tmp_path / "src"), tmp_path / "ours")
    with pytest.raises(ValueError, match="converted dream model"):
        converted.read_tokenizer(tmp_path / "ours")
