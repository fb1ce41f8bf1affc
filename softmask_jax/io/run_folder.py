"""A run's folder: one writer at a time, its config, versions and metrics.

Layout: `.lock`, `config.json`, `versions.json`, `metrics.jsonl`, `checkpoints/` (see checkpoint.py). In a run of
several processes only the first locks and writes; the others read.
"""
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Iterable, Mapping

import jax

from softmask_jax.config import flatten, jax_settings
from softmask_jax.io.files import acquire_lock, explained, plain, remove_leftovers, write_atomically, write_json

log = logging.getLogger(__name__)

# A checkpoint means something else, or doesn't fit, when one of these differs; a prefix covers the keys below it.
BREAKING = (
    "model.kind",
    "model.hidden_size",
    "model.num_blocks",
    "model.num_heads",
    "model.cond_dim",
    "model.mlp_ratio",
    "model.rope_base",
    "model.adapter",
    "soft_mask.variant",
    "data.tokenizer",
    "data.bpe_vocab_size",
)
ABSENT = "(absent)"
# What training replaces in its folder.
NAMES = ("checkpoints", "metrics.jsonl", "report.html", "summary.json", "tokenizer", "versions.json")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class RunFolder:
    """The folder of one run, created if need be and locked until `close` (or the process's death).

    Args:
      path: the folder.
      lock: False for readers, which write nothing; None is True in the first process of the run, False in the others.
      names: what is going to be replaced in it.

    Raises:
      RuntimeError: another process holds the folder; it is named.
      FileExistsError: some of `names` are in it, and no run is.
      NotADirectoryError: `path` is a file.
    """

    def __init__(self, path: str | os.PathLike, *, lock: bool | None = None, names: Iterable[str] = ()):
        self.path = Path(path).absolute()
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file; give a folder for the run.")
        self.is_writer = jax.process_index() == 0 if lock is None else lock
        self._metrics = None
        self._lock = None
        if self.is_writer:
            with explained(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                # A run that was copied without its lock has its config.
                names = () if (self.path / "config.json").exists() else names
                self._lock = acquire_lock(self.path, "give another --workdir", names)
            for part in (self.path, self.path / "tokenizer"):
                remove_leftovers(part)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End the metrics file and give the lock back."""
        self._end_metrics()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self.is_writer = False

    def read_config(self) -> dict | None:
        """The nested config that the folder was started with; None in a new folder.

        A file that is not JSON, or not of a run, is a ValueError.
        """
        path = self.path / "config.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is not readable as JSON ({error}); restore or remove it.") from None
        if not (isinstance(found, dict) and isinstance(found.get("model"), dict)):
            raise ValueError(f"{path} is not the config of a run; give another folder.")
        return found

    def read_summary(self) -> dict | None:
        """summary.json, which a run writes at its end; None where it is absent or damaged, so that it is written again.
        """
        try:
            found = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None

    def write_config(self, config: Mapping) -> None:
        """Store the nested config."""
        if self.is_writer:
            write_json(self.path / "config.json", config)

    def check_config(self, config: Mapping, breaking: Iterable[str] = BREAKING) -> list[str]:
        """Compare a config with the stored one; report differences that a resumed run can bear.

        Args:
          config: nested; of a run that is about to continue in this folder.
          breaking: keys, or the dotted beginnings of keys, in which a difference makes the checkpoints unusable.

        Returns:
          The bearable differences, each as "key: old -> new"; empty in a new folder.

        Raises:
          ValueError: keys under `breaking` differ; each is named with both values.
        """
        stored = self.read_config()
        if stored is None:
            return []
        old, new = flatten(stored), flatten(plain(config))
        unusable, bearable = [], []
        for key in sorted(old.keys() | new.keys()):
            before, now = old.get(key, ABSENT), new.get(key, ABSENT)
            if before != now:
                covered = any(key == prefix or key.startswith(prefix.rstrip(".") + ".") for prefix in breaking)
                (unusable if covered else bearable).append(f"{key}: {_show(before)} -> {_show(now)}")
        if unusable:
            raise ValueError(
                f"The config does not fit the run in {self.path} ({'; '.join(unusable)}). "
                "Use the stored values to continue it, or another --workdir to start a new run."
            )
        for difference in bearable:
            log.info("config differs from the stored one: %s", difference)
        return bearable

    def write_versions(self) -> list[str]:
        """Store versions.json.

        Returns:
          What changed since the folder was last written, each as "name: old -> new".
        """
        path, now, old = self.path / "versions.json", versions(), {}
        with contextlib.suppress(OSError, ValueError):
            old = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name}: {old[name]} -> {now[name]}" for name in now if name in old and old[name] != now[name]]
        if changed:
            log.info("versions differ from the run's last start: %s", "; ".join(changed))
        if self.is_writer:
            write_json(path, now)
        return changed

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; it is in the file when this returns.

        Raises:
          OSError: the disk is full or the file cannot be written; one line that says what to do.
        """
        if not self.is_writer:
            return
        line = (json.dumps(plain(record), allow_nan=False) + "\n").encode()
        path = self.path / "metrics.jsonl"
        with explained(path):
            if self._metrics is None:
                line = b"\n" * (path.exists() and not _ends_line(path)) + line
                self._metrics = open(path, "ab", buffering=0)
            while line:
                line = line[self._metrics.write(line) :]

    def truncate_metrics(self, step: int, again: Iterable[str] = ()) -> int:
        """Drop what an interrupted run logged after the checkpoint that it resumes from.

        Keeps, in order, the lines without a step and those with step <= `step`; drops lines that are no JSON object,
        such as one half-written at a kill, and lines of `step` itself whose kind is in `again`.

        Returns:
          The number of lines dropped.
        """
        path = self.path / "metrics.jsonl"
        if not self.is_writer or not path.exists():
            return 0
        self._end_metrics()
        kept, dropped = [], 0
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if _belongs(line, step, again):
                    kept.append(line if line.endswith("\n") else line + "\n")
                else:
                    dropped += 1
        if dropped:
            write_atomically(path, "".join(kept))
        return dropped

    def _end_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def versions() -> dict[str, str | None]:
    """Versions of interpreter and libraries, this package and its git commit (None outside a checkout), settings, devices."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in (*PACKAGES, "softmask_jax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=True)
        found["git_commit"] = answer.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["git_commit"] = None
    found["settings"] = jax_settings.chosen()
    devices = jax.devices()
    found["device"] = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    return found


def _belongs(line: str, step: int, again: Iterable[str]) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    if not isinstance(record, dict) or record.get("step", step) > step:
        return False
    return not (record.get("step") == step and record.get("kind") in again)


def _ends_line(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _show(value) -> str:
    return value if value == ABSENT else json.dumps(value)
