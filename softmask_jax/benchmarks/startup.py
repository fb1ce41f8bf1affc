"""Seconds from the command to the first training step, by phase, without and with compiled programs in the cache:

    python -m softmask_jax.benchmarks.startup --config=configs/stdlib.py [--config.SECTION.KEY=VALUE ...]

It runs `python -m softmask_jax.main` in an empty folder until its first step is done and kills it, as often as
--starts; the first start finds an empty compilation cache, the others what it left there. Tokenizing is in
the figures unless an earlier run with this --config.data.cache_dir has done it."""
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from softmask_jax.benchmarks.timing import benchmark_parser, positive, publish
from softmask_jax.config.command_line import command, split_overrides
from softmask_jax.report.markdown import table

FIRST_STEP = re.compile(r"First step after ([\d.]+) s: (.*)\.$")
# Lines of JAX_LOG_COMPILES, one a program.
STAGES = {
    "tracing": r"Finished tracing .* in ([\d.e+-]+) sec",
    "lowering": r"Finished jaxpr to MLIR module conversion .* in ([\d.e+-]+) sec",
    "compiling": r"Finished XLA compilation of .* in ([\d.e+-]+) sec",
}


def start(config: str, overrides: Sequence[str], folder: Path) -> dict[str, float]:
    """Seconds of one start: "total", the phases that the run prints, and those of `STAGES` of all programs together.
    RuntimeError if it ends before its first step."""
    with tempfile.TemporaryDirectory(dir=folder) as run, open(Path(run) / "log", "w+", encoding="utf-8") as log:
        words = [f"--config={config}", f"--workdir={run}/run", *(f"--config.{word}" for word in overrides),
                 f"--config.train.compilation_cache={folder / 'compiled'}"]  # fmt: skip
        environment = os.environ | {"JAX_LOG_COMPILES": "1", "PYTHONUNBUFFERED": "1"}
        began = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-m", "softmask_jax.main", *words], stdout=subprocess.PIPE, stderr=log, env=environment,
            text=True, encoding="utf-8",
        )  # fmt: skip
        try:
            line = next((match for line in child.stdout if (match := FIRST_STEP.search(line.strip()))), None)
            total = time.perf_counter() - began
        finally:
            child.send_signal(signal.SIGKILL)  # nothing is to be saved
            child.wait()
            child.stdout.close()
        log.seek(0)
        text = log.read()
    if line is None:
        raise RuntimeError(f"The run ended before its first step: {(text.strip().splitlines() or ['(nothing)'])[-1]}")
    phases = {name: float(s) for name, s in (part.rsplit(" ", 1) for part in line[2].split(", "))}
    # What Python does before the command's own clock starts belongs to the imports.
    phases["imports"] += total - float(line[1])
    stages = {name: sum(map(float, re.findall(form, text))) for name, form in STAGES.items()}
    return {"total": total, **phases, **stages}


def markdown(starts: Sequence[dict[str, float]]) -> str:
    names = ["compilation cache", *starts[0]]
    cells = [("empty" if not i else "filled", *(f"{s:.1f}" for s in row.values())) for i, row in enumerate(starts)]
    return table([name if name == names[0] else f"{name}, s" for name in names], cells)


@command()
def main(argv: list[str]) -> None:
    parser = benchmark_parser("startup", __doc__, None)
    parser.add_argument("--config", required=True, help="a name such as stdlib or dream7b:int8, or a file")
    parser.add_argument("--starts", type=positive, default=2, help="the first with an empty compilation cache")
    parser.add_argument("--config.SECTION.KEY", metavar="VALUE", dest="_", help="override a key of the config")
    words, overrides = split_overrides(argv)
    flags = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        starts = [start(flags.config, overrides, Path(folder)) for _ in range(flags.starts)]
    publish(markdown(starts), {"starts": starts}, flags.json)


if __name__ == "__main__":
    sys.exit(main())
