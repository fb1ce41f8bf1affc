"""Adapters in and out of PEFT's format, and merged."""
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from softmask_jax import config
from softmask_jax.diffusion import soft_masking
from softmask_jax.io import checkpoint, tree_files
from softmask_jax.io.run_folder import RunFolder
from tests.golden import load
from tests.helpers.checkpoint_files import recorded
from tests.helpers.checkpoint_files import converts, same_files


def test_an_adapter_comes_back_as_the_same_files(tmp_path):
    src = recorded("dora/adapter", tmp_path / "src")
    converts(src, tmp_path / "ours", "--verify")
    converts(tmp_path / "ours", tmp_path / "back", "--verify")
    same_files(src, tmp_path / "back")
    params = tree_files.read_trees(tmp_path / "ours", ("params",))["params"]
    assert params["adapter"]["layers"]["k"]["a"].shape == (2, 64, 4)
    assert params["adapter"]["layers"]["k"]["b"].shape == (2, 4, 32)
    assert params["adapter"]["layers"]["k"]["magnitude"].shape == (2, 32)
    effective = soft_masking.effective(params["soft_mask"])
    np.testing.assert_allclose(effective, [0.8984375, -3.0, 1.5, 0.80078125], rtol=1e-6)


def test_an_adapter_without_soft_masking_and_with_other_infixes_is_read(tmp_path):
    src = recorded("dora/adapter", tmp_path / "src")
    (src / "transparency_config.json").unlink()
    before = load_file(src / "adapter_model.safetensors")
    save_file(
        {k.replace(".weight", "").replace("base_model.model.", "") + ".default.weight": v for k, v in before.items()},
        src / "adapter_model.safetensors",
    )
    converts(src, tmp_path / "back", "--to=hf", "--verify")
    after = load_file(tmp_path / "back/adapter_model.safetensors")
    assert set(after) == set(before) and all(np.array_equal(after[k], before[k]) for k in before)
    assert not (tmp_path / "back/transparency_config.json").exists()


@pytest.mark.parametrize("ours", [False, True])
def test_a_merged_adapter_is_what_peft_merges(tmp_path, ours):
    adapter, base = recorded("dora/adapter", tmp_path / "adapter"), recorded("dream/tiny", tmp_path / "base")
    if ours:
        for name in ("adapter", "base"):
            converts(tmp_path / name, tmp_path / f"{name}-ours")
        adapter, base = tmp_path / "adapter-ours", tmp_path / "base-ours"
    converts(adapter, tmp_path / "merged", f"--base={base}", "--merge", "--to=hf", "--verify")
    merged = load_file(tmp_path / "merged/model.safetensors")
    untouched = load_file(tmp_path / "base/model.safetensors")
    golden = {k.removeprefix("merged/"): v for k, v in load("dora/dora.npz").items() if k.startswith("merged/")}
    assert golden
    for key, value in golden.items():
        np.testing.assert_allclose(merged[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    np.testing.assert_array_equal(
        merged["model.layers.0.mlp.up_proj.weight"], untouched["model.layers.0.mlp.up_proj.weight"]
    )
    assert (tmp_path / "merged/transparency_config.json").exists()
    converts(adapter, tmp_path / "merged-ours", f"--base={base}", "--merge", "--to=orbax", "--verify")


def test_a_merge_in_bfloat16_rounds_once(tmp_path):
    adapter, base = recorded("dora/adapter", tmp_path / "adapter"), recorded("dream/tiny_bf16", tmp_path / "base")
    converts(adapter, tmp_path / "merged", f"--base={base}", "--merge", "--to=hf")
    merged, before = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    low = load_file(adapter / "adapter_model.safetensors")
    key = "model.layers.1.self_attn.v_proj"
    a, b = (low[f"base_model.model.{key}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    w = before[f"{key}.weight"].astype(np.float64) + 2.0 * b @ a
    w *= (low[f"base_model.model.{key}.lora_magnitude_vector"] / np.linalg.norm(w, axis=1))[:, None]
    assert merged[f"{key}.weight"].dtype == jnp.bfloat16
    wanted = w.astype(np.float32).astype(jnp.bfloat16)
    assert np.mean(merged[f"{key}.weight"] == wanted) > 0.999


def test_an_adapter_that_was_trained_here_is_exported_for_peft(tmp_path):
    recorded_adapter = recorded("dora/adapter", tmp_path / "theirs")
    converts(recorded("dream/tiny", tmp_path / "hub"), tmp_path / "base")
    converts(recorded_adapter, tmp_path / "ours")
    params = tree_files.read_trees(tmp_path / "ours", ("params",))["params"]
    model = {
        "kind": "dream",
        "base": str(tmp_path / "base"),
        "adapter": "dora",
        "adapter_rank": 4,
        "adapter_alpha": 8.0,
    }
    settings = config.from_dict({"model": model, "data": {"source": "chat", "paths": "jsonl:x"}})
    with (
        RunFolder(tmp_path / "run") as folder,
        checkpoint.Checkpoints(tmp_path / "run/checkpoints", keep_best=0) as saved,
    ):
        folder.write_config(settings.to_dict())
        trained = {"backbone": {"adapter": params["adapter"]}, "soft_mask": params["soft_mask"]}
        saved.save(7, {"params": trained}, {"step": 7}, {})
        saved.wait()
    converts(tmp_path / "run", tmp_path / "back", "--verify")
    one, other = (load_file(path / "adapter_model.safetensors") for path in (recorded_adapter, tmp_path / "back"))
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    written, before = (
        json.loads((p / "adapter_config.json").read_text()) for p in (tmp_path / "back", recorded_adapter)
    )
    for name in ("r", "lora_alpha", "use_dora", "target_modules", "peft_type", "bias"):
        assert written[name] == before[name], name
    assert written["base_model_name_or_path"] == str(tmp_path / "hub")
    assert json.loads((tmp_path / "back/transparency_config.json").read_text()) == json.loads(
        (recorded_adapter / "transparency_config.json").read_text()
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_a_plain_lora_is_merged_by_its_scaling(tmp_path, rslora):
    src, base = recorded("dora/adapter", tmp_path / "src"), recorded("dream/tiny", tmp_path / "base")
    settings = json.loads((src / "adapter_config.json").read_text()) | {"use_dora": False, "use_rslora": rslora}
    (src / "adapter_config.json").write_text(json.dumps(settings))
    low = load_file(src / "adapter_model.safetensors")
    save_file({k: v for k, v in low.items() if "magnitude" not in k}, src / "adapter_model.safetensors")
    converts(src, tmp_path / "merged", f"--base={base}", "--merge", "--to=hf")
    merged, before = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    key = "model.layers.0.self_attn.o_proj"
    a, b = (low[f"base_model.model.{key}.lora_{x}.weight"] for x in "AB")
    wanted = before[f"{key}.weight"] + (4.0 if rslora else 2.0) * b @ a
    np.testing.assert_allclose(merged[f"{key}.weight"], wanted, rtol=1e-5, atol=1e-6)
