"""A program through the TPU compiler: its text and its memory, kept on disk, and what is said where it does not fit."""
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import re
import time
from pathlib import Path

from softmask_jax.data.shards.cache import cache_folder, write_cached

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """text: the optimised program, "" where it does not fit. memory: bytes of a chip as the compiler plans them:
    arguments, temporary, output (what the arguments do not hold already), program. needed, free: bytes, where it says
    that it does not fit. seconds: that it took, when it was compiled."""

    text: str
    memory: dict
    needed: int = 0
    free: int = 0
    seconds: float = 0.0

    @property
    def fits(self) -> bool:
        return not self.needed

    @property
    def peak(self) -> int:
        """Bytes of a chip, all together."""
        return self.needed or sum(self.memory.values())


def compile_program(lowered, topology: str, *, cache: Path | None = None) -> Compiled:
    """Compiles a `jax.stages.Lowered`, or finds what was compiled before.

    cache: a folder; None is the user's. The key is the program's own text, the slice and the versions of the compiler.
    Raises what the compiler raises, but for want of memory, which is a result.
    """
    folder = cache_folder() / "compiled" if cache is None else cache
    path = folder / f"{_key(lowered.as_text(), topology)}.json.gz"
    if path.is_file():
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
    started = time.perf_counter()
    try:
        program = lowered.compile()
    except Exception as error:  # JAX has no class for one kind of failure
        found = out_of_memory(str(error))
        if found is None:
            raise
        result = Compiled("", {}, *found, seconds=time.perf_counter() - started)
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
    """(bytes needed, bytes free) of the compiler's message that a program does not fit; None for another message."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    sizes = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT]?)\b(?:i?B)?(?=\)|\s+of\s|\s+hbm)", message)
    found = [round(float(number) * UNITS[unit]) for number, unit in sizes]
    return (found[0], found[1]) if len(found) > 1 else None


def _key(text: str, topology: str) -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu") if _installed(name)]
    return hashlib.sha256("\n".join([topology, *versions, text]).encode()).hexdigest()[:32]


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False
