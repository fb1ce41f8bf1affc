"""How fast weights are converted, how much memory it takes, and how that compares with copying the files:

    python -m softmask_jax.benchmarks.convert --folder=/scratch [--layers=28] [--json out.json]

A Dream of random bfloat16 weights (7B by default: 15.2 GB in shards of 5 GB, like the original) is written to the
folder, copied, converted to our format and back; every step is a process of its own, whose time and peak of resident
memory are printed. Files are read from the disk, not from memory, and a step ends when its files are on the disk. The
folder needs room for the model three times."""
import filecmp
import json
import math
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from softmask_jax.benchmarks.timing import benchmark_parser, positive, publish
from softmask_jax.config.command_line import command
from softmask_jax.convert import safetensors_files
from softmask_jax.convert.key_tables import Spec, keys
from softmask_jax.convert.tensors import PIECE_BYTES
from softmask_jax.models.keys import dream
from softmask_jax.report.markdown import table

SEVEN_BILLION = {
    "model_type": "Dream", "vocab_size": 152_064, "mask_token_id": 152_063, "tie_word_embeddings": False,
    "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
}  # fmt: skip


class Random:
    """Random bfloat16 tensors with the scale of weights, made when read."""

    def __init__(self, specs: dict[str, Spec]):
        self.specs = specs
        noise = np.random.default_rng(0).standard_normal(2**22 + 977).astype(np.float32)
        self.noise = (0.02 * noise).astype(jnp.bfloat16)

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        shape = self.specs[key].shape
        rows = max(1, PIECE_BYTES // (2 * math.prod(shape[1:])))
        for start in range(0, shape[0], rows):
            piece = (min(rows, shape[0] - start), *shape[1:])
            yield np.resize(np.roll(self.noise, zlib.crc32(f"{key} {start}".encode()) % 2**20), piece)


def write_dream(folder: Path, *, shard_bytes: int = 5 * 10**9, **changes) -> int:
    """Write a folder like Hugging Face's Dream-7B with random weights and config `changes`; return its bytes."""
    config = SEVEN_BILLION | changes
    sizes = dream.KEYS.sizes({"hf_config": config})
    specs = {
        key: Spec(np.dtype(jnp.bfloat16), tuple(sizes[letter] for letter in entry.shape))
        for entry in dream.backbone() for _, key in keys(entry, config["num_hidden_layers"])
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    safetensors_files.write(folder, Random(specs), shard_bytes=shard_bytes)
    return sum(path.stat().st_size for path in folder.iterdir())


def copy(source: Path, target: Path) -> None:
    """Copy files in pieces through this process; return once they are on disk."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        with open(path, "rb") as old, open(target / path.name, "wb", buffering=0) as new:
            shutil.copyfileobj(old, new, PIECE_BYTES)
            os.fsync(new.fileno())


def compare(source: Path, target: Path) -> None:
    """ValueError unless the safetensors of both folders are identical."""
    for path in sorted(source.glob("*.safetensors")):
        if not filecmp.cmp(path, target / path.name, shallow=False):
            raise ValueError(f"{path.name} differs.")


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: Sequence[str]) -> dict:
    """Run a command; return seconds and peak resident memory in GiB."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}.")
    return {"seconds": time.perf_counter() - started, "peak_gib": usage.ru_maxrss / 2**20}


def measure(folder: Path, size: int) -> dict[str, dict]:
    """Seconds, GB/s and GiB of every step for a model of `size` bytes in `folder`/theirs."""
    theirs, ours, back, copied = (folder / name for name in ("theirs", "ours", "back", "copy"))

    def here(function: str, target: Path) -> list[str]:
        code = f"from softmask_jax.benchmarks.convert import {function}; from pathlib import Path; import sys"
        return ["-c", f"{code}; {function}(Path(sys.argv[1]), Path(sys.argv[2]))", str(theirs), str(target)]

    def convert(source: Path, target: Path, *words: str) -> list[str]:
        return ["-m", "softmask_jax.convert", f"--src={source}", f"--dst={target}", *words]

    # Name, command, folder to delete afterwards.
    steps = (
        ("copy", here("copy", copied), copied),
        ("to ours", convert(theirs, ours), None),
        ("verify", convert(theirs, ours, "--verify"), None),
        ("to hf", convert(ours, back, "--to=hf"), ours),
        ("compare", here("compare", back), None),
    )
    figures = {}
    for name, words, useless in steps:
        forget(theirs)
        forget(ours)
        figures[name] = timed(words)
        figures[name]["gb_per_second"] = size / 1e9 / figures[name]["seconds"]
        if useless:
            shutil.rmtree(useless)
    return figures


def markdown(size: int, figures: dict) -> str:
    names = {
        "copy": "copy the files", "to ours": "Hugging Face's format to ours", "verify": "--verify of that",
        "to hf": "and back", "compare": "(the files that came back are the same bytes)",
    }  # fmt: skip
    rows = [
        (names[name], f"{step['seconds']:.1f}", f"{step['gb_per_second']:.2f}", f"{step['peak_gib']:.2f}")
        for name, step in figures.items()
    ]
    return f"{size / 1e9:.2f} GB\n\n{table(('step', 'seconds', 'GB/s', 'peak memory, GiB'), rows)}"


@command()
def main(argv: list[str]) -> None:
    parser = benchmark_parser("convert", __doc__)
    parser.add_argument("--folder", required=True, help="with room for the model, three times; removed at the end")
    parser.add_argument("--layers", type=positive, default=28, help="of the Dream; 28 are 7B")
    flags = parser.parse_args(argv)
    folder = Path(flags.folder) / "softmask_jax_convert"
    if folder.exists():
        raise ValueError(f"{folder} exists; remove it, or give another --folder.")
    try:
        size = write_dream(folder / "theirs", num_hidden_layers=flags.layers)
        steps = measure(folder, size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    publish(markdown(size, steps), {"bytes": size, "steps": steps}, flags.json)


if __name__ == "__main__":
    sys.exit(main())
