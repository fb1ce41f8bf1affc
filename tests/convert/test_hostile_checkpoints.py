"""PyTorch checkpoints that are broken or mean harm: each is refused in one line, and none of their code runs."""
import zipfile

import numpy as np
import pytest

from softmask_jax.convert.__main__ import main
from tests.golden import FOLDER
from tests.helpers.checkpoint_files import Global, pickled, tensor, torch_zip
from tests.helpers.refused import refused

TENSORS = {
    "beyond its storage": tensor(0, (3,), (1,), 3),
    "an offset beyond": tensor(0, (2,), (1,), 2, offset=1),
    "a negative offset": tensor(0, (1,), (1,), 2, offset=-1),
    "a storage that is missing": tensor(9, (2,), (1,), 2),
    "strides of zero, blown up": tensor(0, (10**12,), (0,), 2),
    "negative strides": tensor(0, (2,), (-1,), 2),
    "sizes that overflow": tensor(0, (2**40, 2**40), (2**40, 1), 2),
    "an unknown type": tensor(0, (2,), (1,), 2, kind="QuantizedStorage"),
    "a storage named by a path": Global(
        "torch._utils._rebuild_tensor_v2",
        tensor(0, (2,), (1,), 2).args[0][:2] + ("../data.pkl", "cpu", 2), 0, (2,), (1,),
    ),
    "no storage": Global("torch._utils._rebuild_tensor_v2", None, 0, (2,), (1,)),
    "no arguments": Global("torch._utils._rebuild_tensor_v2", ()),
}  # fmt: skip


@pytest.mark.parametrize("value", TENSORS.values(), ids=list(TENSORS))
def test_tensors_that_lie_are_refused(tmp_path, value):
    path = torch_zip(tmp_path / "x.ckpt", {"state_dict": {"a": value}}, [np.zeros(2, np.float32)])
    refused(path, "refused")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    marker = tmp_path / "run"
    attacks = [
        Global("os.system", f"touch {marker}"),
        Global("builtins.exec", f"open({str(marker)!r}, 'w')"),
        Global("subprocess.check_call", ["touch", str(marker)]),
        Global("builtins.getattr", Global("builtins.__import__", "os"), "system"),
    ]
    for attack in attacks:
        refused(torch_zip(tmp_path / "x.ckpt", {"state_dict": {"a": attack}}), "no tensor that can be read")
        refused(torch_zip(tmp_path / "x.ckpt", attack), "no state_dict")
    assert not marker.exists()
    # Where they are no part of what is read, they are left alone.
    with zipfile.ZipFile(FOLDER / "mdlm_dit/mdlm.ckpt") as source, zipfile.ZipFile(tmp_path / "y.ckpt", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                inside = pickled(attacks)[2:-1]  # without its protocol and end
                content = content[:-1] + b"X\x08\x00\x00\x00callback" + inside + b"s."
            target.writestr(name, content)
    assert main([f"--src={tmp_path / 'y.ckpt'}", f"--dst={tmp_path / 'ours'}"]) == 0
    assert not marker.exists()


def test_zip_files_that_are_no_checkpoints_are_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"")
    refused(path, "no whole zip file")
    path.write_bytes(pickled({"state_dict": {}}))
    refused(path, "PyTorch 1.6")
    whole = (FOLDER / "mdlm_dit/mdlm.ckpt").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "no whole zip file")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("hello.txt", "hello")
    refused(path, "no data.pkl")
    refused(torch_zip(path, b"\x80\x02}X\x05"), "damaged pickle")
    refused(torch_zip(path, {"state_dict": {}}, byteorder="big"), "big-endian")
    refused(torch_zip(path, {"epoch": 3}), "no state_dict")


def test_zip_bombs_are_refused(tmp_path):
    bomb = torch_zip(tmp_path / "x.ckpt", {"state_dict": {}}, [np.zeros(10**7)], compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10**6
    refused(bomb, "compressed")
    with zipfile.ZipFile(tmp_path / "y.ckpt", "w") as file:
        file.writestr("archive/data.pkl", pickled({}))
        file.writestr("archive/data/0", b"\0" * 10**6)
        for i in range(1, 100):  # many entries of the same bytes
            file.filelist.append(file.getinfo("archive/data/0").__class__(f"archive/data/{i}"))
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(file.filelist[-1], name, getattr(file.getinfo("archive/data/0"), name))
    refused(tmp_path / "y.ckpt", "overlap")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "z.ckpt", "w") as file:
        for _ in range(2):
            file.writestr("archive/data.pkl", pickled({}))
    refused(tmp_path / "z.ckpt", "twice")


def test_a_flipped_byte_in_a_checkpoint_is_found(tmp_path):
    content = bytearray((FOLDER / "mdlm_dit/mdlm.ckpt").read_bytes())
    with zipfile.ZipFile(FOLDER / "mdlm_dit/mdlm.ckpt") as file:
        content[file.getinfo("archive/data/8").header_offset + 500] ^= 1
    (tmp_path / "x.ckpt").write_bytes(content)
    assert main([f"--src={tmp_path / 'x.ckpt'}", f"--dst={tmp_path / 'ours'}", "--weights=raw"]) == 1
    assert not (tmp_path / "ours").exists()


def test_averaged_weights_that_do_not_fit_are_refused(tmp_path):
    values = {"state_dict": {"backbone.a": tensor(0, (2,), (1,), 2)}, "ema": {"shadow_params": []}}
    storages = [np.zeros(2, np.float32)]
    refused(torch_zip(tmp_path / "x.ckpt", values, storages), "no MDLM")
    refused(torch_zip(tmp_path / "x.ckpt", values, storages), "no averaged weights", weights="ema")
    values["ema"] = {"shadow_params": [tensor(0, (1,), (1,), 2)]}
    refused(torch_zip(tmp_path / "x.ckpt", values, storages), "do not fit its state_dict")
