"""Does the loader keep up, and does its memory stay flat? On this machine:

    python -m softmask_jax.benchmarks.loader [--data=FOLDER] [--soak=180] [--json out.json]

Batches of windows of 1,024 tokens are read at random from shards (of FOLDER, which `softmask_jax.data.prepare` made, or
of made-up tokens), in turn with train steps of the paper's 169M model, and their speeds compared: medians with
quartiles. `--soak` then reads for so many seconds and prints the resident memory as it goes.
"""
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from softmask_jax import config, data
from softmask_jax.benchmarks.timing import alternate, benchmark_parser, publish, quartiles, spread_text
from softmask_jax.benchmarks.two_pass import random_training
from softmask_jax.config.command_line import command
from softmask_jax.config.jax_settings import root_key, settled
from softmask_jax.data.shards import Shard, ShardStream
from softmask_jax.data.shards.writer import RecordFile
from softmask_jax.io.files import check_writable
from softmask_jax.report.markdown import table

VOCAB_SIZE = 50_258
READ = 16  # batches a turn
WARM_UP = 0.2  # of a soak, while caches fill


def made_up(folder: Path, tokens: int, shards: int = 8) -> data.Windows:
    """Windows of so many random tokens in shards."""
    random, described = np.random.default_rng(0), []
    for number in range(shards):
        path = folder / f"train-{number:05}.arrayrecord"
        ids = random.integers(0, VOCAB_SIZE - 1, tokens // shards).astype(np.uint16)
        file = RecordFile(path, np.uint16)
        file.write(ids)
        file.close()
        described.append(Shard(path.name, len(ids), 1, path.stat().st_size, ""))
    files = [folder / shard.name for shard in described]
    return data.Windows(ShardStream(files, described, "uint16"), 1024, VOCAB_SIZE - 2, VOCAB_SIZE - 2, "train")


def compiled_step(settings: config.Config):
    """A train step as a call without arguments; the soft-masking coin falls as in training."""
    step, state, batch = random_training(settings, VOCAB_SIZE)

    def call():
        nonlocal state
        state, metrics = step(state, batch, root_key(0))
        return metrics

    return call


@settled()
def compare(windows: data.Windows, settings: config.Config, *, batch: int, rounds: int) -> dict:
    """Tokens per second of the loader and of the train step, in turn.

    Returns:
      "loader" and "step", each a list of tokens/s by round, and "ratio" of their medians.
    """
    length, step = settings.data.seq_len, compiled_step(settings)
    with data.batches(windows, global_batch_size=batch, seed=0, prefetch=0) as batches:
        seconds = alternate({"loader": lambda: [next(batches) for _ in range(READ)] and 0, "step": step}, rounds)
    speeds = {
        "loader": [READ * batch * length / s for s in seconds["loader"].seconds],
        "step": [settings.train.global_batch_size * length / s for s in seconds["step"].seconds],
    }
    return speeds | {"ratio": float(np.median(speeds["loader"]) / np.median(speeds["step"]))}


def soak(windows: data.Windows, *, batch: int, seconds: float, every: float = 5.0) -> dict:
    """Reads batches for so many seconds, as a run does.

    Returns:
      "seconds" and "resident_mib" of each look at the memory; "tokens_per_second"; "growth_mib_per_hour", the slope
      after the first fifth; "first_mib" and "last_mib", medians of the first and the last third after it.
    """
    at, resident, count, started = [], [], 0, time.perf_counter()
    with data.batches(windows, global_batch_size=batch, seed=0, prefetch=2) as batches:
        while (now := time.perf_counter() - started) < seconds:
            if not at or now - at[-1] >= every:
                at.append(now)
                resident.append(resident_bytes() / 2**20)
            next(batches)
            count += 1
    settled = np.array([(t, mib) for t, mib in zip(at, resident, strict=True) if t >= WARM_UP * seconds])
    third = max(1, len(settled) // 3)
    slope = np.polyfit(settled[:, 0], settled[:, 1], 1)[0] * 3600 if len(settled) > 1 else 0.0
    return {
        "seconds": at, "resident_mib": resident, "tokens_per_second": count * batch * windows.seq_len / now,
        "growth_mib_per_hour": float(slope), "first_mib": float(np.median(settled[:third, 1])),
        "last_mib": float(np.median(settled[-third:, 1])),
    }  # fmt: skip


def resident_bytes() -> int:
    """Of this process, now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return pages * 4096


def markdown(found: dict) -> str:
    rows = []
    for name, what in (("loader", "loader"), ("step", "train step, 169M")):
        rows.append((what, spread_text(quartiles(found[name]), ",.0f")))
    times = f"The loader delivers {found['ratio']:,.0f} times what the step takes."
    lines = [table(("what", "tokens/s"), rows), "", times]
    if "soak" in found:
        s = found["soak"]
        shown = np.unique(np.linspace(0, len(s["seconds"]) - 1, 10).astype(int))
        lines += ["", table(
            ("second", *(f"{s['seconds'][i]:.0f}" for i in shown)),
            [("resident memory, MiB", *(f"{s['resident_mib'][i]:.1f}" for i in shown))],
        ), ""]  # fmt: skip
        lines.append(
            f"{s['seconds'][-1]:.0f} s of reading at {s['tokens_per_second']:,.0f} tokens/s: resident memory "
            f"{s['first_mib']:.1f} MiB, then {s['last_mib']:.1f} MiB ({s['growth_mib_per_hour']:+.1f} MiB an hour)."
        )
    return "\n".join(lines)


@command()
def main(argv: list[str]) -> None:
    parser = benchmark_parser("loader", __doc__)
    parser.add_argument("--data", default="", help="a prepared folder; otherwise tokens are made up")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="made-up tokens")
    parser.add_argument("--batch", type=int, default=512, help="windows a batch of the loader")
    parser.add_argument("--step_batch", type=int, default=1, help="windows a train step")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of reading while memory is watched")
    flags = parser.parse_args(argv)
    if min(flags.batch, flags.step_batch, flags.rounds) < 1 or flags.tokens < 10_000_000:
        parser.error("--batch, --step_batch and --rounds must be positive, --tokens at least 10,000,000")
    settings = config.from_dict({"train": {"global_batch_size": flags.step_batch}})
    check_writable(flags.json)
    with tempfile.TemporaryDirectory() as folder:
        if flags.data:
            source = dataclasses.replace(settings.data, source="shards", paths=flags.data, tokenizer="shards")
            windows = data.build(source).train
        else:
            windows = made_up(Path(folder), flags.tokens)
        # The soak comes first: train steps leave memory behind that is not the loader's.
        soaked = soak(windows, batch=flags.batch, seconds=flags.soak) if flags.soak else None
        speeds = compare(windows, settings, batch=flags.batch, rounds=flags.rounds)
    found = speeds | ({"soak": soaked} if soaked else {})
    publish(markdown(found), found, flags.json)


if __name__ == "__main__":
    sys.exit(main())
