"""Keys of a state_dict that torch.compile, DDP, Lightning and averages have wrapped."""
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from softmask_jax.convert.__main__ import main
from softmask_jax.convert.gpt2 import Checkpoint
from softmask_jax.convert.sources import open_model
from softmask_jax.convert.tensors import hashes
from softmask_jax.convert.wrappers import own_keys, without_wrappers
from tests.golden import FOLDER
from tests.helpers.checkpoint_files import mdlm_checkpoint, recorded

FILES = {"dream/tiny": "model.safetensors", "dora/adapter": "adapter_model.safetensors"}


def rewritten(folder, name, function):
    """The recorded safetensors, their dict as `function` has it."""
    src = recorded(name, folder)
    save_file(function(load_file(src / FILES[name])), src / FILES[name])
    return src


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module._orig_mod.", "model.", "ema_model.module."])
@pytest.mark.parametrize("name", [*FILES, "mdlm", "mdlm_sm"])
def test_wrapped_keys_are_the_same_model_and_that_is_said(tmp_path, name, wrapper):
    if name in FILES:
        plain, path = (
            rewritten(tmp_path / kind, name, lambda state: {prefix + key: x for key, x in state.items()})
            for kind, prefix in (("plain", ""), ("wrapped", wrapper))
        )
    else:
        plain = mdlm_checkpoint(tmp_path / "plain.ckpt", name)
        path = mdlm_checkpoint(tmp_path / "wrapped.ckpt", name, rename=lambda key: wrapper + key)
    plain, model = open_model(plain), open_model(path)
    assert list(model.table()) == list(plain.table()) and hashes(model.tensors) == hashes(plain.tensors)
    assert str(path) in model.notes[0] and wrapper.split(".")[0] in model.notes[0]


@pytest.mark.parametrize("rename", [
    lambda key: key.replace("backbone.", "backbone._orig_mod.", 1),
    lambda key: key.replace("blocks.0.", "blocks.0._orig_mod.").replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."),
    lambda key: key.replace("backbone.", "backbone.backbone.", 1),
])  # fmt: skip
def test_wrapped_parts_of_an_mdlm_are_unwrapped_with_their_average(tmp_path, rename):
    path = mdlm_checkpoint(tmp_path / "x.ckpt", "mdlm", average=True, rename=rename)
    plain = open_model(mdlm_checkpoint(tmp_path / "y.ckpt", "mdlm"))
    model = open_model(path)
    assert model.about["weights"] == "ema" and hashes(model.tensors) == hashes(plain.tensors)


@pytest.mark.parametrize("function, said", [
    (lambda key, i: ["_orig_mod." + key if i % 2 else key], "a wrapper on some keys only"),
    (lambda key, i: ["model." + key if i % 2 else key], "a wrapper on some keys only"),
    (lambda key, i: [key.replace("layers.", "layers._orig_mod.") if "mlp" in key else key], "a wrapper on some keys only"),
    (lambda key, i: [key, "_orig_mod." + key], "lm_head.weight twice, as _orig_mod.lm_head.weight and"),
    (lambda key, i: [key, "ema_model." + key], "lm_head.weight twice, as ema_model.lm_head.weight and"),
])  # fmt: skip
def test_keys_that_are_wrapped_in_part_or_twice_there_are_refused(tmp_path, capsys, function, said):
    def both(state):
        return {new: state[key].copy() for i, key in enumerate(sorted(state)) for new in function(key, i)}

    src = rewritten(tmp_path / "src", "dream/tiny", both)
    assert main([f"--src={src}", f"--dst={tmp_path / 'dst'}"]) == 1
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1 and not (tmp_path / "dst").exists()


def test_what_is_no_wrapper_stays_and_the_average_counter_goes():
    network = own_keys(r"model\.layers")
    keys = ["module.model.layers.0.x", "teacher.model.layers.0.x", "module.other.x", "n_averaged"]
    names, note = without_wrappers(keys, network, "file")
    assert names == {"model.layers.0.x": keys[0], keys[1]: keys[1], keys[2]: keys[2]}
    assert note == "file: 'module.' removed from its keys."


def test_a_scorer_is_unwrapped_too(tmp_path, caplog):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((FOLDER / "gpt2/tiny" / name).read_bytes())
    expected = Checkpoint(tmp_path).read()[1]
    state = load_file(tmp_path / "model.safetensors")
    save_file({f"_orig_mod.{key}": np.ascontiguousarray(x) for key, x in state.items()}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).read()[1] == expected
    assert "'_orig_mod.' removed" in caplog.text
