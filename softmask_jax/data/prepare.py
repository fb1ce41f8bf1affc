"""Tokenize any text into shards, with all cores, once; then train from them:

    python -m softmask_jax.data.prepare --source=jsonl --paths='texts/*.jsonl' --tokenizer=gpt2/ --out=data/texts
    python -m softmask_jax.data.prepare --verify --out=data/texts
    python -m softmask_jax.main ... --config.data.{source,tokenizer}=shards --config.data.paths=data/texts

After a kill the same command continues and ends with the same bytes. --out may be a `gs://` folder. Memory: about 150
bytes a document.
"""
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
from softmask_jax.config.command_line import command, command_parser
from softmask_jax.config.progress import Progress
from softmask_jax.data import make_tokenizer, rule_of, source_of
from softmask_jax.data.shards import (
    MANIFEST, RECORD_TOKENS, Manifest, Shard, Split, open_tokenizer_folder, read_manifest,
)
from softmask_jax.data.shards.cache import cache_folder, content_key
from softmask_jax.data.shards.pool import run
from softmask_jax.data.shards.verifier import verify
from softmask_jax.data.shards.writer import Job, Task, keep_shards, read_scan, read_shards, scan_part, write_shards
from softmask_jax.data.sources.corpus import Corpus, DROPPED, SPLIT_NAMES, enough, sort_documents, token_dtype
from softmask_jax.data.sources.storage import ELSEWHERE, Folder
from softmask_jax.data.tokenizers import Tokenizer, load_tokenizer
from softmask_jax.io.files import explained, locked, write_json

MILLION = 1_000_000
# Settings of reading windows, not of a preparation.
NOT_HERE = ("seq_len", "prefetch")


def prepare(config: Texts, out: str, *, workers: int = 0, shard_megabytes: int = 256) -> Manifest:
    """Make or finish the corpus in `out`. workers: 0 is one a core. shard_megabytes: million characters a shard.
    Raises ValueError, OSError, or RuntimeError for a folder in use or a killed worker."""
    if config.source in ("mixture", "shards"):
        raise ValueError(f"data.source={config.source} cannot be prepared; prepare each text by itself, then mix them")
    if shard_megabytes < 1 or workers < 0:
        raise ValueError("--shard_megabytes must be positive, --workers 0 (one a core) or more")
    rule, folder, cache = rule_of(config), Folder(out), cache_folder(config.cache_dir)
    scratch = cache / f"prepare-{content_key(out=folder.url)}" if folder.is_remote else Path(folder.url) / ".prepare"
    with explained(scratch, ELSEWHERE):
        scratch.mkdir(parents=True, exist_ok=True)
    with locked(scratch, ELSEWHERE):
        job = Job(source_of(config), scratch, folder)
        _check_apart(job)
        workers = workers or len(os.sched_getaffinity(0))
        tokenizer = None if config.tokenizer == "bpe" else make_tokenizer(config, [], cache)
        settings = _settings(config, job, tokenizer, shard_megabytes)
        done = _check_settings(job, settings)
        for leftover in scratch.glob(".*.tmp"):  # of a killed worker
            leftover.unlink()
        if done and _is_complete(job, done, cache):
            print(f"{out} is prepared already: {_summary(done)}")
            shutil.rmtree(scratch)
            return done
        if done:
            _keep_finished_shards(job, done)
        scans = _scan(job, workers, config.max_documents)
        corpus = sort_documents(job.source, scans, rule, config.max_documents)
        tokenizer = tokenizer or make_tokenizer(config, [corpus], cache)
        job = dataclasses.replace(job, tokenizer=tokenizer)
        tasks = list(_tasks(corpus, [len(scan.items) for scan in scans], shard_megabytes * MILLION))
        manifest = _manifest(settings, corpus, tokenizer, _write(job, tasks, corpus, workers))
        if done:
            _check_unchanged(done, manifest)
        _finish(job, manifest)
        shutil.rmtree(scratch)
    for line in corpus.bad:
        print(f"Bad row: {line}")
    print(f"Prepared {out}: {_summary(manifest)}")
    return manifest


def _check_apart(job: Job) -> None:
    """Raise ValueError if texts are in the folder of the shards: patterns would match both."""
    sources = [getattr(job.source, split, job.source) for split in SPLIT_NAMES]
    for source in sources if not job.folder.is_remote else ():
        for file in getattr(getattr(source, "source", source), "listing", ()):
            if os.path.dirname(os.path.abspath(file.path)) == os.path.abspath(job.folder.url):
                remedy = "give another --out"
                raise ValueError(f"--out={job.folder} holds files that data.paths names ({file.name}); {remedy}")


def _settings(config: Texts, job: Job, tokenizer: Tokenizer | None, shard_megabytes: int) -> dict:
    """Everything that decides the bytes."""
    others = (*NOT_HERE, "cache_dir", "bpe_vocab_size")
    names = [field.name for field in dataclasses.fields(Texts) if field.name not in others]
    return {name: getattr(config, name) for name in names} | {
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
    old = manifest.settings if manifest else json.loads(path.read_text("utf-8")) if path.exists() else settings
    shards = [name for name in job.folder.names() if name.endswith(".arrayrecord")]
    differing = sorted(key for key in settings if old.get(key) != settings[key])
    if differing and (manifest or shards):
        names = "the files of the source" if differing == ["texts"] else ", ".join(differing)
        state = "holds a corpus that was prepared" if manifest else "holds a preparation that began"
        remedy = "" if manifest else f"repeat it as it was, delete {job.folder.path('*.arrayrecord')}, or "
        raise ValueError(f"{job.folder} {state} with other settings ({names}); {remedy}give another --out")
    if differing:  # nothing is made yet, as after a mistake in the command
        for leftover in (*job.scratch.glob("scan-*.npz"), *job.scratch.glob("shards-*.json")):
            leftover.unlink()
    if manifest:
        return manifest
    others = shards + [f"tokenizer/{name}" for name in Folder(job.folder.path("tokenizer")).names()]
    if others and not path.exists():
        state = f"holds files without a manifest ({others[0]}, ...)"
        raise ValueError(f"{job.folder} {state}; delete them or give another --out")
    write_json(path, settings)
    return None


def _is_complete(job: Job, done: Manifest, cache: Path) -> bool:
    """Whether a finished corpus still has its tokenizer and all shards, by their sizes."""
    if any(job.folder.wrong_size(shard.name, shard.bytes) for shard in done.shards):
        return False
    try:
        return load_tokenizer(open_tokenizer_folder(job.folder, cache)).fingerprint() == done.tokenizer
    except (ValueError, OSError):
        return False


def _keep_finished_shards(job: Job, done: Manifest) -> None:
    """Describe the shards of a finished corpus as its workers did, so that only missing ones are made again."""
    tasks: dict[str, dict[str, Shard]] = {}
    for shard in done.shards:
        split, number = shard.name.split(".")[0].split("-")
        tasks.setdefault(number, {})[split] = shard
    for number, shards in tasks.items():
        keep_shards(job, int(number), shards)


def _scan(job: Job, workers: int, max_documents: int) -> list:
    """Scans of the source's parts, or of the first few that hold `max_documents`."""
    scans, parts = [], range(job.source.num_parts())
    group = 4 * workers if max_documents else len(parts)
    with Progress(len(parts), "Reading", "parts") as shown:
        for start in range(0, len(parts), group):
            chosen = parts[start : start + group]
            missing = [part for part in chosen if read_scan(job, part) is None]
            shown.update(len(chosen) - len(missing))
            for _ in run(scan_part, job, missing, workers, shown):
                shown.update()
            scans += [read_scan(job, part) for part in chosen]
            if enough(job.source, scans, max_documents):
                break
    return scans


def _tasks(corpus: Corpus, part_sizes: list[int], characters: int) -> Iterator[Task]:
    """Ranges of the source's items, each with at most so many characters of texts to keep, or one item."""
    firsts = np.cumsum([0, *part_sizes])
    weights = np.where(corpus.roles == DROPPED, 0, corpus.items["characters"])
    before = np.concatenate([[0], np.cumsum(weights)])
    start = number = 0
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
    total, left = (sum(int(np.sum(part.roles != DROPPED)) for part in parts) for parts in ([corpus], missing))
    with Progress(total, "Tokenizing", "documents", initial=total - left) as shown:
        for task, shards in run(write_shards, job, missing, workers, shown):
            finished[task.number] = shards
    return [finished[task.number] for task in tasks]


def _check_unchanged(old: Manifest, new: Manifest) -> None:
    """Raise ValueError if shards or tokenizer made again differ from those of the manifest."""
    before, now = ({"the tokenizer": m.tokenizer} | {shard.name: shard for shard in m.shards} for m in (old, new))
    for name, value in before.items():
        if now.get(name) != value:
            raise ValueError(f"{name} is not what it was ({MANIFEST} says otherwise); give another --out")


def _manifest(settings: dict, corpus: Corpus, tokenizer: Tokenizer, shards: list[dict[str, Shard]]) -> Manifest:
    splits = {}
    for split, name in enumerate(SPLIT_NAMES):
        own = tuple(task[name] for task in shards if name in task)
        splits[name] = Split(corpus.count(split), sum(s.tokens for s in own), corpus.fingerprint(split), own)
    ids = token_dtype(tokenizer).name, tokenizer.fingerprint(), tokenizer.vocab_size, int(tokenizer.eos_id)
    return Manifest(settings, *ids, corpus.duplicates, corpus.blank, corpus.bad_rows, splits)


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
    form = "{:,} tokens of {:,} documents in {} shards for {}"
    parts = [form.format(s.tokens, s.documents, len(s.shards), name) for name, s in manifest.splits.items()]
    dropped = f"{manifest.duplicate_documents:,} repeated and {manifest.blank_documents:,} blank documents"
    return f"{'; '.join(parts)}; {dropped} and {manifest.bad_rows:,} bad rows left out."


@command(interrupted="Interrupted. The same command goes on where it was.")
def main(argv: list[str]) -> int:
    """Exit status: 0 prepared or undamaged, 1 failed or damaged, 2 wrong command line, 130 Ctrl-C or SIGTERM."""
    parser = command_parser("data.prepare", __doc__)
    meaning = "the folder of the prepared corpus; goes on where it stopped, refuses other settings"
    parser.add_argument("--out", required=True, help=f"{meaning}; gs:// needs softmask_jax[gcs]")
    parser.add_argument("--verify", action="store_true", help="read every shard again and compare checksums")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 is one a core")
    parser.add_argument("--shard_megabytes", type=int, default=256, help="million characters of text a shard")
    for field in dataclasses.fields(Texts):
        if field.name not in NOT_HERE:
            meaning = f"{field.metadata['help']} (default: {field.default!r})"
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, help=meaning)
    options = vars(parser.parse_args(argv))
    out, workers, only_verify, shard_megabytes = map(options.pop, ("out", "workers", "verify", "shard_megabytes"))
    terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop like Ctrl-C
    try:
        if not only_verify:
            prepare(Texts(**options), out, workers=workers, shard_megabytes=shard_megabytes)
            return 0
        problems = verify(Folder(out), workers or len(os.sched_getaffinity(0)))
        for problem in problems:
            print(problem, file=sys.stderr)
        return 1 if problems else 0
    finally:
        signal.signal(signal.SIGTERM, terminated)


if __name__ == "__main__":
    sys.exit(main())
