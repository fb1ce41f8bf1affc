"""Conversion to int8 kernels: what is in the folder, and what is refused."""
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import softmask_jax
from softmask_jax.convert import int8, tensors
from softmask_jax.convert.__main__ import main
from softmask_jax.convert.sources import open_model
from softmask_jax.io import tree_files
from softmask_jax.models.keys import dream
from softmask_jax.models.nn import layers
from tests.golden import FOLDER
from tests.helpers.checkpoint_files import recorded

KINDS = ["dream/tiny", "dream/tiny_bf16"]


def arrays(folder) -> dict[str, np.ndarray]:
    found = tree_files.flat(tree_files.read_trees(folder, ("params",))["params"]["backbone"])
    return {"/".join(path): np.asarray(leaf) for path, leaf in found.items()}


def converted(tmp_path, name: str = "dream/tiny"):
    """(source, float folder, int8 folder), all written."""
    src, plain, small = (tmp_path / part for part in ("src", "float", "int8"))
    recorded(name, src)
    assert main([f"--src={src}", f"--dst={plain}"]) == 0
    assert main([f"--src={src}", f"--dst={small}", "--int8", "--verify"]) == 0
    return src, plain, small


def fails(capsys, *arguments, message: str) -> None:
    capsys.readouterr()
    assert main(list(arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and message in error and len(error.splitlines()) == 1, error


@pytest.mark.parametrize("name", KINDS)
def test_kernels_are_int8_within_half_a_step_and_the_rest_is_the_same(tmp_path, name):
    _, plain, small = (arrays(folder) if folder.name != "src" else None for folder in converted(tmp_path, name))
    kernels = {path for path in plain if path.endswith("/kernel")}
    assert len(kernels) == len(dream.PRODUCTS.linear) and small.keys() == plain.keys() | {f"{path}_scale" for path in kernels}
    for path, value in plain.items():
        if path not in kernels:
            np.testing.assert_array_equal(small[path], value)
            continue
        scale, value = small[f"{path}_scale"], value.astype(np.float32)
        assert small[path].dtype == np.int8 and np.abs(small[path]).max() == 127 and scale.dtype == np.float32
        assert (np.abs(small[path] * scale[:, None] - value) <= 0.5001 * scale[:, None]).all()


def test_it_is_what_the_model_would_make_of_a_kernel():
    rows = np.random.default_rng(0).normal(0, 0.05, (48, 96)).astype(np.float32)
    rows[7] = 0
    (values, scale), (theirs, other) = int8.quantised(rows), layers.quantised(jnp.asarray(rows.T))
    np.testing.assert_allclose(scale, other, rtol=1e-6)
    assert (values.T != np.asarray(theirs)).mean() < 1e-3 and np.abs(values.T - np.asarray(theirs, np.int32)).max() <= 1


def test_pieces_of_any_size_give_the_same_bytes_and_scales_may_come_first(tmp_path, monkeypatch):
    src = recorded("dream/tiny", tmp_path / "src")
    whole = int8.quantise(open_model(src)).tensors
    monkeypatch.setattr("softmask_jax.convert.safetensors_files.PIECE_BYTES", 1000)
    cut = int8.quantise(open_model(src)).tensors
    for key in reversed(whole.specs):
        found, expected = tensors.whole(cut, key), tensors.whole(whole, key)
        assert found.dtype == expected.dtype == whole.specs[key].dtype
        np.testing.assert_array_equal(found, expected)


def test_the_manifest_and_the_config_say_what_it_is(tmp_path):
    _, _, small = converted(tmp_path)
    assert json.loads((small / "config.json").read_text())["base_dtype"] == "int8"
    manifest = json.loads((small / "manifest.json").read_text())
    key = "model.layers.1.mlp.down_proj.weight"
    assert manifest["tensors"][key]["dtype"] == "int8" and manifest["tensors"][f"{key}_scale"]["shape"] == [64]
    assert manifest["arrays"]["backbone/layers/down/kernel"]["dtype"] == "int8"


def test_our_own_folder_is_quantised_to_the_same_bytes_and_again_to_itself(tmp_path):
    _, plain, small = converted(tmp_path)
    for number, src in enumerate((plain, small)):
        dst = tmp_path / f"again{number}"
        assert main([f"--src={src}", f"--dst={dst}", "--int8", "--verify"]) == 0
        ours, theirs = arrays(dst), arrays(small)
        assert ours.keys() == theirs.keys() and all(ours[path].tobytes() == theirs[path].tobytes() for path in ours)


def test_a_flipped_byte_in_an_int8_kernel_or_a_scale_is_found(tmp_path, capsys):
    src, _, small = converted(tmp_path)
    for file in ("backbone.layers.up.kernel/1.0.0", "backbone.layers.q.kernel_scale/0.0"):
        path = small / "params" / file
        before = path.read_bytes()
        path.write_bytes(bytes([before[0] ^ 1]) + before[1:])
        fails(capsys, f"--src={src}", f"--dst={small}", "--int8", "--verify", message="differs from its source in model.layers.")
        with pytest.raises(RuntimeError, match="damaged"):
            softmask_jax.load(small)
        path.write_bytes(before)


def test_logits_are_near_those_of_the_source(tmp_path):
    _, plain, small = converted(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 190, (2, 24))
    exact, ours = (np.asarray(softmask_jax.load(folder).logits(tokens)) for folder in (plain, small))
    assert 0 < np.abs(ours - exact).max() < 0.03 * np.abs(exact).max()


def test_what_int8_cannot_be_is_refused_in_one_line(tmp_path, capsys):
    src, plain, small = converted(tmp_path)
    adapter = recorded("dora/adapter", tmp_path / "adapter")
    dst = f"--dst={tmp_path / 'dst'}"
    fails(capsys, f"--src={FOLDER / 'mdlm_dit/mdlm_sm.ckpt'}", dst, "--int8", message="--int8 is for a Dream model")
    fails(capsys, f"--src={adapter}", dst, "--int8", message="this is adapter")
    fails(capsys, f"--src={small}", dst, message="int8 kernels cannot be exported")
    fails(capsys, f"--src={src}", dst, "--int8", "--to=hf", message="int8 kernels cannot be exported")
    fails(capsys, f"--src={adapter}", f"--base={small}", "--merge", dst, message="--base is int8, too coarse to merge into")
    fails(capsys, f"--src={src}", f"--dst={small}", "--verify", message="compare with --int8")
    fails(capsys, f"--src={src}", f"--dst={plain}", "--int8", "--verify", message="compare without --int8")
    state = load_file(src / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(state, src / "model.safetensors")
    fails(capsys, f"--src={src}", dst, "--int8", message="model.layers.0.mlp.up_proj.weight holds numbers that are not finite")
    assert not (tmp_path / "dst").exists()


def test_an_adapter_is_merged_into_the_float_base_and_the_result_quantised(tmp_path):
    _, plain, _ = converted(tmp_path)
    adapter = recorded("dora/adapter", tmp_path / "adapter")
    dst = tmp_path / "merged"
    assert main([f"--src={adapter}", f"--base={plain}", "--merge", "--int8", f"--dst={dst}", "--verify"]) == 0
    assert arrays(dst)["layers/q/kernel"].dtype == np.int8
