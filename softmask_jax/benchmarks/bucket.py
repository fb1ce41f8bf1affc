"""What a run's folder in a bucket costs beside one on the local disk:

    python -m softmask_jax.benchmarks.bucket --config=configs/stdlib.py:smoke [--config.SECTION.KEY=VALUE ...]

It trains the config into both folders in turn, and saves a checkpoint of --megabytes in both. The bucket is an
emulator on this machine (package gcp-storage-emulator): it has no latency of a network, and takes time of the same processor."""
import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.benchmarks.emulator import Emulator
from softmask_jax.benchmarks.timing import benchmark_parser, positive, publish, quartiles, spread_text
from softmask_jax.config import load
from softmask_jax.config.command_line import command, split_overrides
from softmask_jax.io import run_log
from softmask_jax.io.checkpoint import Checkpoints
from softmask_jax.io.paths import to_path
from softmask_jax.report.markdown import table
from softmask_jax.training import loop

NAME = "bench"


def run(config, folder: Path, emulator: Emulator) -> dict[str, float]:
    """Steps/s between interruptions, seconds of the whole run, requests and bytes that reached the bucket."""
    emulator.requests.clear()
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        loop.train(config, str(folder))
    seconds = time.perf_counter() - began
    _, speeds = run_log.read(folder).column("train", "tokens_per_second")
    tokens = config.train.global_batch_size * config.data.seq_len
    return {"steps_per_second": float(np.median(speeds)) / tokens, "seconds": seconds} | sent(emulator)


def save(folder: Path, megabytes: int, emulator: Emulator) -> dict[str, float]:
    """Seconds until a save returns, and until the checkpoint is whole and has been read back."""
    random = np.random.default_rng(0)
    arrays = {f"array {n}": jnp.asarray(random.random(2**18, np.float32)) for n in range(megabytes)}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"params": {"first": jnp.zeros(1)}}, {})
        checkpoints.wait()
        emulator.requests.clear()
        began = time.perf_counter()
        checkpoints.save(2, {"params": jax.block_until_ready(arrays)}, {})
        returned = time.perf_counter() - began
        checkpoints.wait()
        return {"returned": returned, "whole": time.perf_counter() - began} | sent(emulator)


def sent(emulator: Emulator) -> dict[str, int]:
    return {"requests": len(emulator.requests), "bytes": sum(request.size for request in emulator.requests)}


def markdown(runs: dict[str, Sequence[dict]], saves: dict[str, Sequence[dict]]) -> str:
    def rows(measured: dict, names: Sequence[str]) -> list:
        spreads = {where: [quartiles([one[name] for one in all_]) for name in names] for where, all_ in measured.items()}
        last = {where: all_[-1] for where, all_ in measured.items()}
        return [
            (where, *map(spread_text, spreads[where]), f"{last[where]['requests']:,}", f"{last[where]['bytes'] / 2**20:,.1f}")
            for where in measured
        ]  # fmt: skip

    return "\n\n".join([
        table(["run in", "steps/s", "s in all", "requests", "MiB sent"], rows(runs, ("steps_per_second", "seconds"))),
        table(["checkpoint in", "s until it returns", "s until it is whole", "requests", "MiB sent"],
              rows(saves, ("returned", "whole"))),
    ])  # fmt: skip


@command()
def main(argv: list[str]) -> None:
    parser = benchmark_parser("bucket", __doc__, None)
    parser.add_argument("--config", required=True, help="a name such as stdlib or dream7b:int8, or a file")
    parser.add_argument("--rounds", type=positive, default=3, help="of each; one more comes first, untimed")
    parser.add_argument("--megabytes", type=positive, default=64, help="of the checkpoint, in arrays of one")
    parser.add_argument("--config.SECTION.KEY", metavar="VALUE", dest="_", help="override a key of the config")
    words, overrides = split_overrides(argv)
    flags = parser.parse_args(words)
    config = load(flags.config, overrides)
    runs, saves = {"disk": [], "bucket": []}, {"disk": [], "bucket": []}
    with Emulator(NAME) as emulator, tempfile.TemporaryDirectory() as disk:
        os.environ.update(emulator.environment)
        places = {"disk": Path(disk), "bucket": to_path(f"gs://{NAME}/runs")}
        for number in range(flags.rounds + 1):
            for where, folder in places.items():
                measured = run(config, folder / str(number), emulator)
                saved = save(folder / str(number) / "more", flags.megabytes, emulator)
                if number:
                    runs[where].append(measured)
                    saves[where].append(saved)
    publish(markdown(runs, saves), {"runs": runs, "saves": saves}, flags.json)


if __name__ == "__main__":
    sys.exit(main())
