"""What a run does before its first step: JAX's compilation cache, and the seconds of each phase."""
import os
import time

import jax

from softmask_jax.config import Config
from softmask_jax.data.shards.cache import cache_folder

FOLDER = "compiled"  # in the cache folder of the data


class Stopwatch:
    """Seconds by phase. begun: `time.perf_counter()` of the process's start, None for now."""

    def __init__(self, begun: float | None = None):
        self.seconds, self.begun = {}, time.perf_counter() if begun is None else begun
        self.last = self.begun
        if begun is not None:
            self.lap("imports")

    @property
    def begun_unix(self) -> float:
        """Unix time of the beginning."""
        return time.time() - (time.perf_counter() - self.begun)

    def lap(self, phase: str) -> None:
        """End a phase; the next one begins."""
        now = time.perf_counter()
        self.seconds[phase], self.last = now - self.last, now

    def line(self) -> str:
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"First step after {self.last - self.begun:.1f} s: {parts}."


def keep_compiled_programs(config: Config) -> str:
    """Turn on JAX's compilation cache as `config.train.compilation_cache` has it; returns its folder, "" for none.

    "auto" leaves JAX's own setting; without one it is a folder in the cache of the data, not for a CPU, whose programs
    may not run on another one."""
    folder = config.train.compilation_cache
    if folder == "auto":
        folder = jax.config.jax_compilation_cache_dir or ""
        if not folder and jax.default_backend() != "cpu":
            folder = str(cache_folder(config.data.cache_dir) / FOLDER)
    folder = os.path.expanduser(folder)
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
    return folder
