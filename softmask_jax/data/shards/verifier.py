"""Verification of a prepared corpus against its manifest."""
import concurrent.futures

from softmask_jax.config.progress import Progress
from softmask_jax.data.shards import MANIFEST, Shard, open_tokenizer_folder, read_manifest
from softmask_jax.data.shards.cache import cache_folder
from softmask_jax.data.sources.storage import Folder
from softmask_jax.data.tokenizers import load_tokenizer


def verify(folder: Folder, threads: int = 1) -> list[str]:
    """A line with a remedy for each missing, damaged or unknown shard; prints progress. Raises as `read_manifest`."""
    manifest = read_manifest(folder)
    again = "delete it and run the prepare command again, which makes what is missing"
    problems, total = [], sum(shard.bytes for shard in manifest.shards)
    shown = Progress(total, "Verifying", "bytes", scaled=True)
    with shown, concurrent.futures.ThreadPoolExecutor(threads) as pool:
        states = pool.map(lambda shard: _state(folder, shard), manifest.shards)
        for shard, state in zip(manifest.shards, states, strict=True):
            shown.update(shard.bytes)
            if state:
                problems.append(f"{folder.path(shard.name)} {state}; {again}")
    known = {MANIFEST, *(shard.name for shard in manifest.shards)}
    problems += [f"{folder.path(name)} is not in {MANIFEST}; delete it" for name in folder.names() if name not in known]
    try:
        if load_tokenizer(open_tokenizer_folder(folder, cache_folder())).fingerprint() != manifest.tokenizer:
            problems.append(f"{folder.path('tokenizer')} is not the tokenizer of these shards; {again}")
    except (ValueError, OSError) as error:
        problems.append(f"{error}; {again}")
    if not problems:
        print(f"{folder}: {len(manifest.shards)} shards and their tokenizer are whole ({total:,} bytes).")
    return problems


def _state(folder: Folder, shard: Shard) -> str:
    """The problem with a shard; "" if there is none."""
    if wrong := folder.wrong_size(shard.name, shard.bytes):
        return wrong
    try:
        return "" if folder.sha256(shard.name) == shard.sha256 else "is damaged (its checksum is wrong)"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
