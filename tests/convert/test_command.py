"""The command: what it prints, what it refuses, what it leaves behind when it fails or is killed."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from softmask_jax.benchmarks.convert import write_dream
from softmask_jax.convert import orbax_files, outputs, safetensors_files
from softmask_jax.convert.__main__ import main
from softmask_jax.convert.model import SCALARS
from softmask_jax.convert.sources import open_model
from softmask_jax.convert.tensors import hashes, in_memory
from softmask_jax.io import files
from tests.golden import FOLDER
from tests.helpers.checkpoint_files import recorded

MDLM = FOLDER / "mdlm_dit/mdlm_sm.ckpt"


def fails(capsys, *arguments: str, message: str) -> str:
    assert main(list(arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and message in error, error
    return error


def test_every_key_that_does_not_fit_is_listed_at_once(tmp_path, capsys):
    src = recorded("dream/tiny", tmp_path / "src")
    state = load_file(src / "model.safetensors")
    del state["model.norm.weight"], state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.0.self_attn.o_proj.bias"] = np.zeros(64, np.float32)
    state["lm_head.weight"] = np.zeros((199, 64), np.float32)
    state["model.layers.1.self_attn.q_proj.bias"] = np.zeros(64, np.int32)
    state["model.layers.1.input_layernorm.weight"] = np.zeros(64, np.float16)
    save_file(state, src / "model.safetensors")
    error = fails(capsys, f"--src={src}", f"--dst={tmp_path / 'ours'}", message="not a Dream model of 2 blocks")
    assert sorted(line.strip().split(" ")[:2] for line in error.splitlines()[1:]) == [
        ["misshapen:", "lm_head.weight"],
        ["missing:", "model.layers.1.mlp.up_proj.weight"],
        ["missing:", "model.norm.weight"],
        ["mistyped:", "model.layers.1.input_layernorm.weight"],
        ["mistyped:", "model.layers.1.self_attn.q_proj.bias"],
        ["unexpected:", "model.layers.0.self_attn.o_proj.bias"],
    ]
    assert not (tmp_path / "ours").exists()


def test_parameters_of_ours_that_do_not_fit_are_listed_at_once(tmp_path, capsys):
    assert main([f"--src={MDLM}", f"--dst={tmp_path / 'ours'}"]) == 0
    metadata = tmp_path / "ours/params/_METADATA"
    tree = json.loads(metadata.read_text())
    entry = tree["tree_metadata"].pop("('backbone', 'head', 'bias')")
    (tmp_path / "ours/params/backbone.head.other").mkdir()
    for file in (tmp_path / "ours/params/backbone.head.bias").iterdir():
        (tmp_path / "ours/params/backbone.head.other" / file.name).write_bytes(file.read_bytes())
    entry["key_metadata"][2]["key"] = "other"
    tree["tree_metadata"]["('backbone', 'head', 'other')"] = entry
    metadata.write_text(json.dumps(tree))
    error = fails(capsys, f"--src={tmp_path / 'ours'}", f"--dst={tmp_path / 'hf'}", message="of another model")
    assert "missing: backbone/head/bias" in error and "unexpected: backbone/head/other" in error


@pytest.mark.parametrize(
    "file", ["params/backbone.blocks.qkv.kernel/1.0.0", "params/soft_mask.raw_scale/0", "config.json"]
)
def test_a_flipped_byte_in_our_folder_is_found(tmp_path, capsys, file):
    command = [f"--src={MDLM}", f"--dst={tmp_path / 'ours'}", "--verify"]
    assert main(command) == 0 and main(command) == 0
    assert "compared" in capsys.readouterr().out
    content = bytearray((tmp_path / "ours" / file).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "ours" / file).write_bytes(content)
    fails(capsys, *command, message="has changed" if file == "config.json" else "differs from its source in")


def test_a_pad_row_that_is_not_zero_is_found(tmp_path, capsys):
    command = [f"--src={recorded('dream/tiny', tmp_path / 'src')}", f"--dst={tmp_path / 'ours'}", "--verify"]
    assert main(command) == 0
    chunk = tmp_path / "ours/params/backbone.embed.table/0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\x3f")
    fails(capsys, *command, message="pad row")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_flipped_byte_in_an_exported_folder_is_found(tmp_path, capsys, file):
    command = [f"--src={MDLM}", f"--dst={tmp_path / 'hf'}", "--to=hf", "--verify"]
    assert main(command) == 0 and main(command) == 0
    capsys.readouterr()
    content = bytearray((tmp_path / "hf" / file).read_bytes())
    content[-20] ^= 1
    (tmp_path / "hf" / file).write_bytes(content)
    assert main(command) == 1
    assert str(tmp_path / "hf") in capsys.readouterr().err


def test_another_source_is_told_apart(tmp_path, capsys):
    assert main([f"--src={MDLM}", f"--dst={tmp_path / 'ours'}", "--weights=ema"]) == 0
    fails(
        capsys,
        f"--src={MDLM}",
        f"--dst={tmp_path / 'ours'}",
        "--weights=raw",
        "--verify",
        message="differs from its source",
    )


def test_what_exists_is_not_overwritten_but_an_empty_folder_is_filled(tmp_path, capsys):
    (tmp_path / "dst").mkdir()
    assert main([f"--src={MDLM}", f"--dst={tmp_path / 'dst'}"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").rglob("*")}
    fails(capsys, f"--src={MDLM}", f"--dst={tmp_path / 'dst'}", message="exists; give another folder")
    (tmp_path / "file").write_text("mine")
    fails(capsys, f"--src={MDLM}", f"--dst={tmp_path / 'file'}", message="exists")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").rglob("*")}


def test_flags_that_mean_nothing_here_are_refused(tmp_path, capsys):
    adapter, base = recorded("dora/adapter", tmp_path / "adapter"), recorded("dream/tiny", tmp_path / "base")
    to = f"--dst={tmp_path / 'dst'}"
    fails(capsys, f"--src={base}", to, "--weights=ema", message="one set of weights")
    fails(capsys, f"--src={base}", to, "--merge", f"--base={adapter}", message="--merge needs an adapter")
    fails(capsys, f"--src={MDLM}", to, "--tokenizer=bytes", message="has 258 tokens, the model 98")
    with pytest.raises(SystemExit):
        main([f"--src={base}", to, "--merge"])
    assert "--merge and --base belong together" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_weights_in_bfloat16_are_the_sources_rounded(tmp_path, to, capsys):
    models = []
    for name, flags in (("wide", []), ("narrow", ["--dtype=bfloat16", "--verify"])):
        assert main([f"--src={MDLM}", f"--dst={tmp_path / name}", f"--to={to}", *flags]) == 0
        models.append(open_model(tmp_path / name).tensors)
    for key in models[0].specs:
        wide, narrow = (np.concatenate([part.ravel() for part in one.pieces(key)]).astype(np.float32) for one in models)
        np.testing.assert_array_equal(narrow, wide if key in SCALARS else wide.astype(jnp.bfloat16).astype(np.float32))
    if to == "hf":
        wide, narrow = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("wide", "narrow"))
        assert narrow < 0.7 * wide
    else:
        # The folder of another dtype is not what the source converts to.
        flags = [f"--src={MDLM}", f"--dst={tmp_path / 'wide'}", "--dtype=bfloat16", "--verify"]
        fails(capsys, *flags, message="differs from its source in ")


def test_int8_kernels_have_no_other_dtype(tmp_path, capsys):
    src, int8 = recorded("dream/tiny", tmp_path / "src"), tmp_path / "int8"
    assert main([f"--src={src}", f"--dst={int8}", "--int8"]) == 0
    fails(capsys, f"--src={int8}", f"--dst={tmp_path / 'x'}", "--to=orbax", "--dtype=float32", message="--dtype is for float")


def test_a_base_of_another_depth_or_width_is_refused(tmp_path, capsys):
    adapter, base = recorded("dora/adapter", tmp_path / "adapter"), recorded("dream/tiny", tmp_path / "base")
    config, state = json.loads((base / "config.json").read_text()), load_file(base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    save_file({k: v for k, v in state.items() if ".layers.1." not in k}, base / "model.safetensors")
    merge = [f"--src={adapter}", f"--base={base}", "--merge", f"--dst={tmp_path / 'dst'}"]
    fails(capsys, *merge, message="has 2 layers, the base 1")


def test_a_full_disk_is_foreseen_and_one_that_fills_up_leaves_nothing(tmp_path, capsys, monkeypatch):
    command = [f"--src={MDLM}", f"--dst={tmp_path / 'dst'}"]
    with monkeypatch.context() as patch:
        patch.setattr(outputs.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
        fails(capsys, *command, message="Free space, or give another --dst")
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, os.strerror(28))

        patch.setattr(orbax_files, "_write_chunk", full)
        fails(capsys, *command, message="Free space and run the same command again, or give another --dst")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_write_the_same_folder(tmp_path, capsys):
    workshop = tmp_path / ".dst.partial"
    workshop.mkdir()
    with files.locked(workshop, "wait"):
        fails(capsys, f"--src={MDLM}", f"--dst={tmp_path / 'dst'}", message="is in use by process")


def test_the_hub_is_asked_for_weights_configs_and_tokenizers_only(tmp_path, monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")
    asked, downloaded = [], recorded("dream/tiny", tmp_path / "downloaded")

    def snapshot(name, revision, allow_patterns, cache_dir):
        assert (name, revision) == ("Dream-org/Dream-v0-Instruct-7B", "main")
        asked.append(allow_patterns)
        return str(downloaded)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    command = ["--src=hf://Dream-org/Dream-v0-Instruct-7B@main", f"--dst={tmp_path / 'ours'}"]
    assert main(command) == 0
    assert not any(pattern.endswith((".py", ".bin", "*", ".pt")) for pattern in asked[-1])
    # The config alone decides whether weights are downloaded.
    config = json.loads((downloaded / "config.json").read_text())
    (downloaded / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    asked.clear()
    fails(capsys, *command, message="hidden_act")
    assert len(asked) == 1 and all(pattern.endswith(".json") for pattern in asked[0])


def test_without_a_network_the_hub_says_what_to_do(tmp_path, monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    error = fails(capsys, "--src=hf://a/b", f"--dst={tmp_path / 'x'}", message="copy its *.safetensors and *.json here")
    assert len(error.splitlines()) == 1
    fails(capsys, "--src=hf://a/b/c/d", f"--dst={tmp_path / 'x'}", message="write hf://owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fails(capsys, "--src=hf://a/b", f"--dst={tmp_path / 'x'}", message="pip install 'softmask_jax[hub]'")


@pytest.mark.full
@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_kill_at_any_moment_leaves_nothing_and_the_same_command_finishes(tmp_path, to):
    src = tmp_path / "src"
    sizes = {"hidden_size": 512, "intermediate_size": 2706, "num_hidden_layers": 8, "vocab_size": 8000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "mask_token_id": 7999}
    write_dream(src, shard_bytes=20_000_000, **sizes, **heads)
    command = [sys.executable, "-m", "softmask_jax.convert", f"--src={src}", f"--dst={tmp_path / 'dst'}", f"--to={to}"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    rng, killed = random.Random(0), 0
    for _ in range(6):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / ".dst.partial/folder").exists():
            time.sleep(0.002)
        time.sleep(rng.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if (tmp_path / "dst").exists():  # finished before the signal came
            assert main([*command[3:], "--verify"]) == 0
            shutil.rmtree(tmp_path / "dst")
    assert killed
    assert main([*command[3:], "--verify"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_an_exception_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(key):
        raise KeyboardInterrupt

    tensors = in_memory({"a": np.zeros(3, np.float32)})._replace(pieces=interrupted)
    with pytest.raises(KeyboardInterrupt), outputs.whole_folder(tmp_path / "dst", 0) as folder:
        safetensors_files.write(folder, tensors)
    assert list(tmp_path.iterdir()) == []


def test_reading_a_large_tensor_takes_pieces_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "PIECE_BYTES", 1000)
    model = open_model(recorded("dream/tiny", tmp_path / "src"))
    for key in model.tensors.specs:
        assert all(piece.nbytes <= 1024 for piece in model.tensors.pieces(key))


def test_threads_that_share_a_checkpoint_read_what_one_reads():
    tensors = open_model(MDLM).tensors
    once = hashes(tensors)
    with ThreadPoolExecutor(8) as pool:
        assert all(found == once for found in pool.map(lambda _: hashes(tensors), range(24)))
