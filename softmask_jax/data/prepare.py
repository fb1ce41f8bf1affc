"""Tokenize any text into shards, with all cores, once; then train from them:

    python -m softmask_jax.data.prepare --source=jsonl --paths='texts/*.jsonl' --tokenizer=gpt2/ --out=data/texts
    python -m softmask_jax.data.prepare --verify --out=data/texts
    python -m softmask_jax.main ... --config.data.{source,tokenizer}=shards --config.data.paths=data/texts

After a kill the same command continues and ends with the same bytes. --out may be a `gs://` folder. Memory: about 150
bytes a document.
"""
import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from softmask_jax.config import Texts
from softmask_jax.config.command_line import command
from softmask_jax.data import make_tokenizer, rule_of, sources_of
from softmask_jax.data.shards import (
    MANIFEST, RECORD_TOKENS, Manifest, Shard, Split, open_tokenizer_folder, read_manifest,
)
from softmask_jax.data.shards.cache import cache_folder, content_key
from softmask_jax.data.shards.pool import progress_bar, run
from softmask_jax.data.shards.verifier import verify
from softmask_jax.data.shards.writer import Job, Task, keep_shards, read_scan, read_shards, scan_part, write_shards
from softmask_jax.data.sources import Source
from softmask_jax.data.sources.corpus import Corpus, DROPPED, SPLIT_NAMES, enough, joined, sort_documents, token_dtype
from softmask_jax.data.sources.storage import ELSEWHERE, Folder
from softmask_jax.data.tokenizers import Tokenizer, load_tokenizer
from softmask_jax.io.files import explained, locked, write_json

MILLION = 1_000_000
# Settings of reading windows, not of a preparation.
NOT_HERE = ("seq_len", "prefetch")


def prepare(config: Texts, out: str, *, workers: int = 0, shard_megabytes: int = 256) -> Manifest:
    """Make, or finish, the prepared corpus in the folder `out`.

    workers: processes; 0 is one a core, 1 this process. shard_megabytes: million characters of text a shard; a longer
    document is a shard of its own. Raises ValueError or OSError, one line, for wrong settings, changed text or a full
    disk; RuntimeError when another process prepares this folder or a worker was killed.
    """
    if config.source in ("mixture", "shards"):
        raise ValueError(f"data.source={config.source} cannot be prepared; prepare each text by itself, then mix them")
    if shard_megabytes < 1 or workers < 0:
        raise ValueError("--shard_megabytes must be positive, --workers 0 (one a core) or more")
    rule, folder, cache = rule_of(config), Folder(out), cache_folder(config.cache_dir)
    scratch = cache / f"prepare-{content_key(out=folder.url)}" if folder.is_remote else Path(folder.url) / ".prepare"
    with explained(scratch, ELSEWHERE):
        scratch.mkdir(parents=True, exist_ok=True)
    with locked(scratch, ELSEWHERE):
        source, validation_source = sources_of(config)
        _check_apart(folder, source, validation_source)
        job = Job(joined(source, validation_source), scratch, folder)
        workers = workers or len(os.sched_getaffinity(0))
        tokenizer = None if config.tokenizer == "bpe" else make_tokenizer(config, [], cache)
        settings = _settings(config, job, tokenizer, shard_megabytes)
        done = _check_settings(job, settings)
        for leftover in scratch.glob(".*.tmp"):  # of a worker that was killed
            leftover.unlink()
        if done and _is_complete(job, done, cache):
            print(f"{out} is prepared already: {_summary(done)}")
            shutil.rmtree(scratch)
            return done
        if done:
            _keep_finished_shards(job, done)
        scans = _scan(job, workers, config.max_documents if validation_source is None else 0)
        corpus = sort_documents(source, scans, rule, config.max_documents, validation_source=validation_source)
        tokenizer = tokenizer or make_tokenizer(config, [corpus], cache)
        job = dataclasses.replace(job, tokenizer=tokenizer)
        tasks = list(_tasks(corpus, [len(scan.items) for scan in scans], shard_megabytes * MILLION))
        _check_unchanged(done, shards := _write(job, tasks, corpus, workers), tokenizer)
        manifest = _manifest(settings, corpus, tokenizer, shards)
        _finish(job, manifest)
        shutil.rmtree(scratch)
    for line in corpus.bad:
        print(f"Bad row: {line}")
    print(f"Prepared {out}: {_summary(manifest)}")
    return manifest


def _check_apart(folder: Folder, *sources: Source | None) -> None:
    """Raise ValueError if texts are in the folder of the shards: patterns would match both."""
    ours = os.path.abspath(folder.url)
    for source in sources:
        for file in getattr(getattr(source, "source", source), "listing", ()):
            if not folder.is_remote and os.path.dirname(os.path.abspath(file.path)) == ours:
                raise ValueError(f"--out={folder} holds files that data.paths names ({file.name}); give another --out")


def _settings(config: Texts, job: Job, tokenizer: Tokenizer | None, shard_megabytes: int) -> dict:
    """Everything that decides the bytes."""
    chosen = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(Texts)
        if field.name not in (*NOT_HERE, "cache_dir", "bpe_vocab_size")
    }
    return chosen | {
        "tokenizer": tokenizer.fingerprint() if tokenizer else f"bpe {config.bpe_vocab_size}",
        "texts": hashlib.sha256(job.source.identity().encode()).hexdigest(),
        "shard_megabytes": shard_megabytes,
        "record_tokens": RECORD_TOKENS,
    }


def _check_settings(job: Job, settings: dict) -> Manifest | None:
    """The manifest of a folder that was finished with these settings, or None. Raises ValueError for other settings."""
    try:
        manifest = read_manifest(job.folder)
    except FileNotFoundError:
        manifest = None
    path = job.scratch / "settings.json"
    began = manifest.settings if manifest else json.loads(path.read_text("utf-8")) if path.exists() else settings
    shards = [name for name in job.folder.names() if name.endswith(".arrayrecord")]
    differing = sorted(key for key in settings if began.get(key) != settings[key])
    if differing and not (manifest or shards):  # nothing is made yet, as after a mistake in the command
        for leftover in (*job.scratch.glob("scan-*.npz"), *job.scratch.glob("shards-*.json")):
            leftover.unlink()
    elif differing:
        state = "holds a corpus that was prepared" if manifest else "holds a preparation that began"
        begun = f"repeat it as it was, delete {job.folder.path('*.arrayrecord')}, or give another --out"
        remedy = "give another --out" if manifest else begun
        named = "the files of the source" if differing == ["texts"] else ", ".join(differing)
        raise ValueError(f"{job.folder} {state} with other settings ({named}); {remedy}")
    if not manifest:
        others = shards + [f"tokenizer/{name}" for name in Folder(job.folder.path("tokenizer")).names()]
        if others and not path.exists():
            remedy = "delete them or give another --out"
            raise ValueError(f"{job.folder} holds files without a manifest ({others[0]}, ...); {remedy}")
        write_json(path, settings)
    return manifest


def _is_complete(job: Job, done: Manifest, cache: Path) -> bool:
    """Whether a finished corpus still has its tokenizer and all shards, by their sizes."""
    if any(job.folder.size(shard.name) != shard.bytes for split in done.splits.values() for shard in split.shards):
        return False
    try:
        return load_tokenizer(open_tokenizer_folder(job.folder, cache)).fingerprint() == done.tokenizer
    except (ValueError, OSError):
        return False


def _keep_finished_shards(job: Job, done: Manifest) -> None:
    """Describe the shards of a finished corpus as its workers did, so that only missing ones are made again."""
    tasks: dict[int, dict[str, Shard]] = {}
    for split, described in done.splits.items():
        for shard in described.shards:
            tasks.setdefault(int(shard.name.split("-")[1].split(".")[0]), {})[split] = shard
    for number, shards in tasks.items():
        keep_shards(job, number, shards)


def _scan(job: Job, workers: int, max_documents: int) -> list:
    """Scans of the source's parts, or of the first few that hold `max_documents`."""
    scans, parts = [], range(job.source.num_parts())
    group = 4 * workers if max_documents else len(parts)
    with progress_bar("Reading", len(parts), "part") as bar:
        for start in range(0, len(parts), group):
            chosen = parts[start : start + group]
            missing = [part for part in chosen if read_scan(job, part) is None]
            bar.update(len(chosen) - len(missing))
            for _ in run(scan_part, job, missing, workers, bar):
                bar.update()
            scans += [read_scan(job, part) for part in chosen]
            if max_documents and enough(scans, max_documents):
                break
    return scans


def _tasks(corpus: Corpus, part_sizes: list[int], characters: int) -> Iterator[Task]:
    """The source's items in ranges with so many characters of texts that are not dropped."""
    firsts = np.concatenate([[0], np.cumsum(part_sizes)])
    weights = np.where(corpus.roles == DROPPED, 0, corpus.items["characters"])
    before = np.concatenate([[0], np.cumsum(weights)])
    start, number = 0, 0
    while start < len(weights):
        end = int(np.searchsorted(before, before[start] + characters, side="right")) - 1
        end = len(weights) if end + 1 >= len(before) else max(end, start + 1)
        if before[end] > before[start]:
            part = int(np.searchsorted(firsts, start, side="right")) - 1
            yield Task(number, part, int(start - firsts[part]), corpus.items[start:end], corpus.roles[start:end])
            number += 1
        start = end


def _write(job: Job, tasks: list[Task], corpus: Corpus, workers: int) -> list[dict[str, Shard]]:
    finished = {task.number: read_shards(job, task.number) for task in tasks}
    missing = [task for task in tasks if finished[task.number] is None]
    total, left = (sum(int(np.count_nonzero(x.roles != DROPPED)) for x in some) for some in ([corpus], missing))
    with progress_bar("Tokenizing", total, "doc") as bar:
        bar.update(total - left)
        for task, shards in run(write_shards, job, missing, workers, bar):
            finished[task.number] = shards
    return [finished[task.number] for task in tasks]


def _check_unchanged(done: Manifest | None, shards: list[dict[str, Shard]], tokenizer: Tokenizer) -> None:
    """Raise ValueError if shards or tokenizer made again differ from those of the manifest."""
    if done is None:
        return
    made = {"the tokenizer": (done.tokenizer, tokenizer.fingerprint())}
    for split, described in done.splits.items():
        new = (task[split] for task in shards if split in task)
        made |= {shard.name: (old, shard) for old, shard in zip(described.shards, new, strict=False)}
    for name, (old, new) in made.items():
        if old != new:
            raise ValueError(f"{name} is not what it was ({MANIFEST} says otherwise); give another --out")


def _manifest(settings: dict, corpus: Corpus, tokenizer: Tokenizer, shards: list[dict[str, Shard]]) -> Manifest:
    splits = {}
    for split, name in enumerate(SPLIT_NAMES):
        own = tuple(task[name] for task in shards if name in task)
        splits[name] = Split(corpus.count(split), sum(s.tokens for s in own), corpus.fingerprint(split), own)
    return Manifest(
        settings=settings, dtype=token_dtype(tokenizer).name, tokenizer=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size, eos_id=int(tokenizer.eos_id), duplicate_documents=corpus.duplicates,
        blank_documents=corpus.blank, bad_rows=corpus.bad_rows, splits=splits,
    )  # fmt: skip


def _finish(job: Job, manifest: Manifest) -> None:
    """Store the tokenizer and, last, the manifest, which marks the corpus as finished."""
    saved = job.scratch / "tokenizer"
    job.tokenizer.save(saved)
    for path in sorted(saved.iterdir()):
        Folder(job.folder.path("tokenizer")).put(path, path.name)
    path = job.scratch / MANIFEST
    path.write_bytes(manifest.to_json())
    job.folder.put(path, MANIFEST)


def _summary(manifest: Manifest) -> str:
    parts = [
        f"{split.tokens:,} tokens of {split.documents:,} documents in {len(split.shards)} shards for {name}"
        for name, split in manifest.splits.items()
    ]
    dropped = (
        f"{manifest.duplicate_documents:,} repeated and {manifest.blank_documents:,} blank documents and "
        f"{manifest.bad_rows:,} bad rows left out"
    )
    return f"{'; '.join(parts)}; {dropped}."


@command(interrupted="Interrupted. The same command goes on where it was.")
def main(argv: list[str]) -> int:
    """Exit status: 0 prepared or undamaged, 1 failed or damaged, 2 wrong command line, 130 Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m softmask_jax.data.prepare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--out", required=True,
        help="the folder of the prepared corpus; goes on where it stopped, refuses other settings; gs:// needs "
        "softmask_jax[gcs]",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="read every shard again and compare checksums")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 is one a core")
    parser.add_argument("--shard_megabytes", type=int, default=256, help="million characters of text a shard")
    for field in dataclasses.fields(Texts):
        if field.name not in NOT_HERE:
            meaning = f"{field.metadata['help']} (default: {field.default!r})"
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, help=meaning)
    flags = vars(parser.parse_args(argv))
    names = ("out", "workers", "shard_megabytes", "verify")
    out, workers, shard_megabytes, only_verify = (flags.pop(name) for name in names)
    terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop like Ctrl-C
    try:
        if only_verify:
            problems = verify(Folder(out), workers or len(os.sched_getaffinity(0)))
            for problem in problems:
                print(problem, file=sys.stderr)
            return 1 if problems else 0
        prepare(Texts(**flags), out, workers=workers, shard_megabytes=shard_megabytes)
    finally:
        signal.signal(signal.SIGTERM, terminated)
    return 0


if __name__ == "__main__":
    sys.exit(main())
