"""Prepared corpora that are damaged, cut short by a full disk, or prepared by two at once."""
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from softmask_jax.data import build
from softmask_jax.data.prepare import main
from softmask_jax.data.shards.verifier import verify
from softmask_jax.data.sources.storage import Folder
from softmask_jax.io.files import locked
from tests.helpers.prepared import bpe_folder, files, from_shards, made
from tests.helpers.prepared import corpus as corpus  # the fixture


def damage(out: Path, how: str) -> str:
    path = sorted(out.glob("train-*.arrayrecord"))[1]
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-1000])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    return path.name


@pytest.mark.parametrize("how, said", [
    ("missing", "is missing"), ("truncated", "bytes instead of"), ("flipped", "checksum is wrong"),
])
def test_verify_names_a_damaged_shard_and_preparing_again_mends_it(corpus, tmp_path, how, said, capsys):
    out = tmp_path / "out"
    made(corpus, out)
    whole = files(out)
    assert verify(Folder(out)) == []
    name = damage(out, how)
    (problem,) = verify(Folder(out), threads=2)
    assert name in problem and said in problem and "delete it" in problem and "\n" not in problem
    assert main(["--verify", f"--out={out}"]) == 1 and name in capsys.readouterr().err
    if how != "flipped":  # a run looks at sizes alone; checksums are for --verify
        with pytest.raises(ValueError, match=f"{name} .*run the prepare command again"):
            from_shards(corpus, out)
    (out / name).unlink(missing_ok=True)
    made(corpus, out)
    assert files(out) == whole and verify(Folder(out)) == []


def test_verify_finds_any_flipped_byte(corpus, tmp_path):
    out = tmp_path / "out"
    made(corpus, out)
    path = sorted(out.glob("validation-*.arrayrecord"))[0]
    content = path.read_bytes()
    for place in np.linspace(0, len(content) - 1, 40).astype(int):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        assert len(verify(Folder(out))) == 1, place
    path.write_bytes(content)
    assert verify(Folder(out)) == []


def test_verify_names_strays_and_a_damaged_tokenizer_or_manifest(corpus, tmp_path):
    out = tmp_path / "out"
    made(corpus, out)
    shutil.copy(next(out.glob("train-*")), out / "train-99999.arrayrecord")
    (out / "tokenizer" / "softmask_tokenizer.json").write_text("{}")
    problems = verify(Folder(out))
    assert len(problems) == 2 and "train-99999.arrayrecord is not in manifest.json" in problems[0]
    assert "tokenizer is damaged" in problems[1]
    manifest = (out / "manifest.json").read_text()
    for broken in (manifest[:200], "[]", manifest.replace('"documents"', '"dokuments"', 1), "{}"):
        (out / "manifest.json").write_text(broken)
        with pytest.raises(ValueError, match="manifest.json is damaged"):
            verify(Folder(out))
    with pytest.raises(FileNotFoundError, match="no prepared corpus here"):
        verify(Folder(tmp_path / "nowhere"))


def test_shards_of_another_tokenizer_are_refused(corpus, tmp_path):
    made(corpus, tmp_path / "out")
    with pytest.raises(ValueError, match="another tokenizer than data.tokenizer names.*--config.data.tokenizer=shards"):
        build(corpus, source="shards", paths=str(tmp_path / "out"), tokenizer=str(bpe_folder(corpus, tmp_path)))
    with pytest.raises(ValueError, match="needs text, which shards do not hold"):
        build(corpus, source="shards", paths=str(tmp_path / "out"), tokenizer="bpe")
    with pytest.raises(ValueError, match="for data.source=shards"):
        build(corpus, tokenizer="shards")


def test_a_full_disk_is_one_line_and_the_same_command_finishes_later(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "--source=jsonl", f"--paths={corpus.paths}", "--tokenizer=bytes", f"--out={out}", "--workers=1",
        f"--cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        assert main(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert "File too large while writing" in line and "give another --out" in line
    assert not list(out.glob("*.arrayrecord")) and not list(out.rglob("*.tmp"))
    assert main(arguments) == 0 and verify(Folder(out)) == []


def test_two_preparations_of_one_folder_are_refused(corpus, tmp_path):
    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    with locked(tmp_path / "out" / ".prepare", ""), pytest.raises(RuntimeError, match="in use by .* another --out"):
        made(corpus, tmp_path / "out")
