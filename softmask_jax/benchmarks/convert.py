"""How fast weights are converted, how much memory it takes, and how that compares with copying the files:

    python -m softmask_jax.benchmarks.convert --folder=/scratch [--layers=28] [--json out.json]

A Dream of random bfloat16 weights (7B by default: 15.2 GB in shards of 5 GB, like the original) is written to the
folder, copied, converted to our format, and converted back; every step is a process of its own, whose time and peak of
resident memory are printed. What is written reaches the disk before a step counts as done, the copies too, and files
are read from the disk, not from memory. The folder needs room for the model three times.
"""
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

from softmask_jax.benchmarks.timing import benchmark_parser, publish
from softmask_jax.config.command_line import command
from softmask_jax.convert import safetensors_files
from softmask_jax.convert.key_tables import Spec, keys
from softmask_jax.convert.tensors import PIECE_BYTES
from softmask_jax.io.files import check_writable
from softmask_jax.models.keys import dream
from softmask_jax.report.markdown import table

SEVEN_BILLION = {
    "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
}  # fmt: skip


class Random:
    """Tensors of random bfloat16 values of the size of weights, made as they are read."""

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


def write_dream(
    folder: Path,
    *,
    hidden_size: int = 3584,
    num_layers: int = 28,
    vocab_size: int = 152_064,
    shard_bytes: int = 5 * 10**9,
) -> int:
    """A folder like Hugging Face's of Dream, with random weights, on the disk when this returns. Returns its bytes."""
    scale = hidden_size / SEVEN_BILLION["hidden_size"]
    config = SEVEN_BILLION | {
        "hidden_size": hidden_size, "num_hidden_layers": num_layers, "vocab_size": vocab_size, "model_type": "Dream",
        "intermediate_size": round(SEVEN_BILLION["intermediate_size"] * scale), "tie_word_embeddings": False,
        "mask_token_id": vocab_size - 1,
    }  # fmt: skip
    if hidden_size % config["num_attention_heads"]:
        config |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    sizes = dream.sizes(config)
    specs = {
        key: Spec(np.dtype(jnp.bfloat16), tuple(sizes[letter] for letter in entry.shape))
        for entry in dream.BACKBONE for _, key in keys(entry, num_layers)
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    safetensors_files.write(folder, Random(specs), shard_bytes=shard_bytes)
    return sum(path.stat().st_size for path in folder.iterdir())


def copy(source: Path, target: Path) -> None:
    """Copies a folder's files in pieces through this process, and waits until they are on the disk."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        with open(path, "rb") as old, open(target / path.name, "wb", buffering=0) as new:
            while block := old.read(PIECE_BYTES):
                new.write(block)
            os.fsync(new.fileno())


def compare(source: Path, target: Path) -> None:
    """Raises ValueError unless a folder's safetensors are the same bytes in another."""
    for path in sorted(source.glob("*.safetensors")):
        if not filecmp.cmp(path, target / path.name, shallow=False):
            raise ValueError(f"{path.name} differs.")


def forget(folder: Path) -> None:
    """Asks the system to drop a folder's files from memory, so that they are read from the disk."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: Sequence[str]) -> dict:
    """Runs a command. Returns seconds and the peak of its resident memory in GiB."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}.")
    return {"seconds": time.perf_counter() - started, "peak_gib": usage.ru_maxrss / 2**20}


def measure(folder: Path, size: int) -> dict[str, dict]:
    """Seconds, GB/s and GiB of every step, for a model of `size` bytes in `folder`/theirs."""
    theirs, ours, back = (folder / name for name in ("theirs", "ours", "back"))
    here = "from softmask_jax.benchmarks.convert import compare, copy; from pathlib import Path; import sys"
    convert = ["-m", "softmask_jax.convert"]
    steps = {
        "copy": ["-c", f"{here}; copy(Path(sys.argv[1]), Path(sys.argv[2]))", str(theirs), str(folder / "copy")],
        "to ours": [*convert, f"--src={theirs}", f"--dst={ours}"],
        "verify": [*convert, f"--src={theirs}", f"--dst={ours}", "--verify"],
        "to hf": [*convert, f"--src={ours}", f"--dst={back}", "--to=hf"],
        "compare": ["-c", f"{here}; compare(Path(sys.argv[1]), Path(sys.argv[2]))", str(theirs), str(back)],
    }  # fmt: skip
    found = {}
    for name, words in steps.items():
        if name == "compare":
            shutil.rmtree(ours)
        for place in (theirs, ours):
            forget(place)
        found[name] = timed(words)
        found[name]["gb_per_second"] = size / 1e9 / found[name]["seconds"]
        if name == "copy":
            shutil.rmtree(folder / "copy")
    return found


def markdown(size: int, found: dict) -> str:
    what = {
        "copy": "copy the files", "to ours": "Hugging Face's format to ours", "verify": "--verify of that",
        "to hf": "and back", "compare": "(the files that came back are the same bytes)",
    }  # fmt: skip
    rows = [
        (what[name], f"{step['seconds']:.1f}", f"{step['gb_per_second']:.2f}", f"{step['peak_gib']:.2f}")
        for name, step in found.items()
    ]
    return f"{size / 1e9:.2f} GB\n\n{table(('step', 'seconds', 'GB/s', 'peak memory, GiB'), rows)}"


@command()
def main(argv: list[str]) -> None:
    parser = benchmark_parser("convert", __doc__)
    parser.add_argument("--folder", required=True, help="with room for the model, three times; removed at the end")
    parser.add_argument("--layers", type=int, default=28, help="of the Dream; 28 are 7B")
    flags = parser.parse_args(argv)
    place = Path(flags.folder) / "softmask_jax_convert"
    check_writable(flags.json)
    if flags.layers < 1:
        raise ValueError("--layers must be positive.")
    if place.exists():
        raise ValueError(f"{place} exists; remove it, or give another --folder.")
    try:
        size = write_dream(place / "theirs", num_layers=flags.layers)
        measured = measure(place, size)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    publish(markdown(size, measured), {"bytes": size, "steps": measured}, flags.json)


if __name__ == "__main__":
    sys.exit(main())
