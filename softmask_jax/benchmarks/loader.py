"""Does the loader keep up, and does its memory stay flat? On this machine:

    python -m softmask_jax.benchmarks.loader [--data=FOLDER] [--soak=180] [--json out.json]

Batches of windows of 1,024 tokens are read at random from shards (of FOLDER, made by `softmask_jax.data.prepare`, or
of made-up tokens), in turn with train steps of the paper's 169M model: medians of their speeds with quartiles. `--soak`
reads for that many seconds first and prints the resident memory as it goes."""
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from softmask_jax import config, data
from softmask_jax.benchmarks.random_step import RandomStep
from softmask_jax.benchmarks.timing import alternate, benchmark_parser, positive, publish, quartiles, spread_text
from softmask_jax.config.command_line import command
from softmask_jax.config.jax_settings import settled
from softmask_jax.data.shards import Shard, ShardStream
from softmask_jax.data.shards.writer import RecordFile
from softmask_jax.report.markdown import table

VOCAB_SIZE = 50_258
READ = 16  # batches per turn
WARM_UP = 0.2  # share of a soak, while caches fill


def made_up(folder: Path, tokens: int, shards: int = 8) -> data.Windows:
    """Windows over shards of `tokens` random tokens."""
    random, count = np.random.default_rng(0), tokens // shards
    files = [folder / f"train-{number:05}.arrayrecord" for number in range(shards)]
    for path in files:
        file = RecordFile(path, np.uint16)
        file.write(random.integers(0, VOCAB_SIZE - 1, count).astype(np.uint16))
        file.close()
    described = [Shard(path.name, count, 1, path.stat().st_size, "") for path in files]
    return data.Windows(ShardStream(files, described, "uint16"), 1024, VOCAB_SIZE - 2, VOCAB_SIZE - 2, "train")


@settled()
def compare(windows: data.Windows, settings: config.Config, *, batch: int, rounds: int) -> dict:
    """Loader and train step in turn: tokens/s of each by round, and the "ratio" of their medians."""
    length, step = settings.data.seq_len, RandomStep(settings, VOCAB_SIZE)
    with data.batches(windows, global_batch_size=batch, seed=0, prefetch=0) as batches:
        seconds = alternate({"loader": lambda: [next(batches) for _ in range(READ)] and 0, "step": step}, rounds)
    loader = READ * batch * length / seconds["loader"]
    trained = settings.train.global_batch_size * length / seconds["step"]
    return {"loader": loader, "step": trained, "ratio": float(np.median(loader) / np.median(trained))}


def soak(windows: data.Windows, *, batch: int, seconds: float, every: float = 5.0) -> dict:
    """Read batches for `seconds`, as a run does, sampling the memory.

    Returns "seconds", "resident_mib" of each sample; "tokens_per_second"; "growth_mib_per_hour", the slope after the
    first fifth; "first_mib", "last_mib", medians of the first and last third of the rest."""
    looks, count, started = [], 0, time.perf_counter()
    with data.batches(windows, global_batch_size=batch, seed=0, prefetch=2) as batches:
        while (now := time.perf_counter() - started) < seconds:
            if not looks or now - looks[-1][0] >= every:
                pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
                looks.append((now, pages * 4096 / 2**20))
            next(batches)
            count += 1
    at, resident = np.transpose(looks)
    warm, warm_resident = at[at >= WARM_UP * seconds], resident[at >= WARM_UP * seconds]
    third = max(1, len(warm) // 3)
    slope = np.polyfit(warm, warm_resident, 1)[0] * 3600 if len(warm) > 1 else 0.0
    return {
        "seconds": at, "resident_mib": resident, "tokens_per_second": count * batch * windows.seq_len / now,
        "growth_mib_per_hour": float(slope), "first_mib": float(np.median(warm_resident[:third])),
        "last_mib": float(np.median(warm_resident[-third:])),
    }  # fmt: skip


def markdown(figures: dict) -> str:
    names = {"loader": "loader", "step": "train step, 169M"}
    rows = [(name, spread_text(quartiles(figures[key]), ",.0f")) for key, name in names.items()]
    times = f"{figures['ratio']:,.0f} times"
    parts = [table(("what", "tokens/s"), rows), f"The loader delivers {times} what the step takes."]
    if soaked := figures.get("soak"):
        shown = np.unique(np.linspace(0, len(soaked["seconds"]) - 1, 10).astype(int))
        header = "second", *(f"{soaked['seconds'][i]:.0f}" for i in shown)
        parts += [
            table(header, [("resident memory, MiB", *(f"{soaked['resident_mib'][i]:.1f}" for i in shown))]),
            f"{soaked['seconds'][-1]:.0f} s of reading at {soaked['tokens_per_second']:,.0f} tokens/s: resident memory "
            f"{soaked['first_mib']:.1f} MiB, then {soaked['last_mib']:.1f} MiB "
            f"({soaked['growth_mib_per_hour']:+.1f} MiB an hour).",
        ]
    return "\n\n".join(parts)


@command()
def main(argv: list[str]) -> None:
    parser = benchmark_parser("loader", __doc__)
    parser.add_argument("--data", default="", help="a prepared folder; otherwise tokens are made up")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="made-up tokens")
    parser.add_argument("--batch", type=positive, default=512, help="windows a batch of the loader")
    parser.add_argument("--step_batch", type=positive, default=1, help="windows a train step")
    parser.add_argument("--rounds", type=positive, default=5, help="timed calls of each")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of reading while memory is watched")
    flags = parser.parse_args(argv)
    if flags.tokens < 10_000_000:
        parser.error("--tokens must be at least 10,000,000")
    settings = config.from_dict({"train": {"global_batch_size": flags.step_batch}})
    with tempfile.TemporaryDirectory() as folder:
        if flags.data:
            source = dataclasses.replace(settings.data, source="shards", paths=flags.data, tokenizer="shards")
            windows = data.build(source).train
        else:
            windows = made_up(Path(folder), flags.tokens)
        # Soak first: train steps leave memory behind.
        soaked = {"soak": soak(windows, batch=flags.batch, seconds=flags.soak)} if flags.soak else {}
        figures = compare(windows, settings, batch=flags.batch, rounds=flags.rounds) | soaked
    publish(markdown(figures), figures, flags.json)


if __name__ == "__main__":
    sys.exit(main())
