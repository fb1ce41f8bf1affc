"""Programs compiled for TPUs, cached on disk: optimised text and memory plan; running out of memory is a result."""
import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import re
import time
from pathlib import Path

from softmask_jax.data.shards.cache import cache_folder, write_cached
from softmask_jax.diffusion.vocab.positions import SCOPE

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """An optimised program and its memory plan, in bytes per chip."""

    text: str  # "" if it does not fit
    memory: dict  # arguments, temporary, output (without aliased arguments), program
    needed: int = 0  # 0 if it fits, like `free`
    free: int = 0
    seconds: float = 0.0

    @property
    def peak(self) -> int:
        """Bytes per chip, in total."""
        return self.needed or sum(self.memory.values())


def compile_program(lowered, topology: str, *, cache: Path | None = None) -> Compiled:
    """Compile a `jax.stages.Lowered`; cached in `cache` (None: the user's) by its text, the slice and the compiler's
    versions. Raises the compiler's errors, except out-of-memory."""
    parts = [topology, SCOPE]  # a name that the text must hold
    for name in ("jax", "jaxlib", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{name} {importlib.metadata.version(name)}")
    key = hashlib.sha256("\n".join([*parts, lowered.as_text()]).encode()).hexdigest()[:32]
    path = (cache or cache_folder() / "compiled") / f"{key}.json.gz"
    if path.is_file():
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
    started = time.perf_counter()
    try:
        program = lowered.compile()
    except Exception as error:  # JAX has no class for out-of-memory
        sizes = out_of_memory(str(error))
        if sizes is None:
            raise
        result = Compiled("", {}, *sizes, seconds=time.perf_counter() - started)
    else:
        planned = program.memory_analysis()
        memory = {
            "arguments": planned.argument_size_in_bytes, "temporary": planned.temp_size_in_bytes,
            "output": planned.output_size_in_bytes - planned.alias_size_in_bytes,
            "program": planned.generated_code_size_in_bytes,
        }  # fmt: skip
        result = Compiled(program.as_text(), memory, seconds=time.perf_counter() - started)
    write_cached(path, [gzip.compress(json.dumps(dataclasses.asdict(result)).encode(), 6, mtime=0)])
    return result


def out_of_memory(message: str) -> tuple[int, int] | None:
    """(needed, free) bytes from the compiler's out-of-memory message; None for another message."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    sizes = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT]?)\b(?:i?B)?(?=\)|\s+of\s|\s+hbm)", message)
    sizes = [round(float(number) * UNITS[unit]) for number, unit in sizes]
    return (sizes[0], sizes[1]) if len(sizes) > 1 else None
