"""Models converted from and to folders in buckets, both ways."""
import json

import softmask_jax
from softmask_jax.convert import outputs, tiny_dream
from softmask_jax.convert.__main__ import main as convert


def arguments(**flags) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()] + ["--verify"]


def test_a_model_goes_to_a_bucket_and_back_and_is_loaded_from_it(bucket, tmp_path, monkeypatch, capsys):
    tiny_dream.make(tmp_path, conversations=2)
    for path in (tmp_path / "hf").iterdir():
        (bucket / "hf" / path.name).write_bytes(path.read_bytes())
    assert convert(arguments(src=bucket / "hf", dst=bucket / "model")) == 0
    assert convert(arguments(src=bucket / "hf", dst=bucket / "model")) == 0 and "compared" in capsys.readouterr().out
    assert sorted(path.name for path in bucket.iterdir()) == ["hf", "model"]
    assert convert([f"--src={bucket / 'hf'}", f"--dst={bucket / 'model'}"]) == 1
    assert "exists; give another folder" in capsys.readouterr().err
    assert softmask_jax.load(bucket / "model").config.model.base == str(bucket / "model")

    def killed(self, target, last):
        (target / "params" / "half").write_bytes(b"")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "copy_objects", killed)
        assert convert(arguments(src=bucket / "model", dst=bucket / "again", to="hf")) == 130
    assert convert(arguments(src=bucket / "model", dst=bucket / "again", to="hf")) == 0
    names = [path.name for path in (tmp_path / "hf").glob("*.safetensors*")]
    assert names and all((bucket / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes() for name in names)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (bucket / "again", tmp_path / "hf"))
    assert ours == theirs


def test_a_safetensors_file_that_is_cut_off_is_refused(bucket, tmp_path, capsys):
    tiny_dream.make(tmp_path, conversations=2)
    for path in (tmp_path / "hf").iterdir():
        content = path.read_bytes()
        (bucket / "hf" / path.name).write_bytes(content[:-8] if path.suffix == ".safetensors" else content)
    assert convert([f"--src={bucket / 'hf'}", f"--dst={bucket / 'model'}"]) == 1
    assert "is no valid safetensors file" in capsys.readouterr().err
    assert not outputs.is_taken(bucket / "model")
