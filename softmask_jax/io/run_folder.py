"""A run's folder: `.lock`, `config.json`, `versions.json`, `metrics.jsonl`, `checkpoints/`. One process writes.
In a bucket `metrics/` has the rows in pieces."""
import contextlib
import dataclasses
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
from softmask_jax.io import goodput, metrics
from softmask_jax.io.files import differences, explained, locked, plain, remove_leftovers, write_json
from softmask_jax.io.paths import to_path

log = logging.getLogger(__name__)

# A difference in one of these makes checkpoints unusable.
BREAKING = (
    "model.kind", "model.hidden_size", "model.num_blocks", "model.num_heads", "model.cond_dim", "model.mlp_ratio",
    "model.rope_base", "model.adapter", "soft_mask.variant", "data.tokenizer", "data.bpe_vocab_size",
)
# Files and folders that training replaces.
NAMES = (
    "checkpoints", goodput.FILE, metrics.FILE, metrics.FOLDER, "report.html", "summary.json", "tokenizer",
    "trajectory.html", "versions.json",
)  # fmt: skip
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class RunFolder(contextlib.AbstractContextManager):
    """The folder of one run, created if missing and locked until `close` or the process's death. Raises as `locked`.
    lock: False for readers; None is True in the first process only. names: see `locked`."""

    def __init__(self, path: str | os.PathLike, *, lock: bool | None = None, names: Iterable[str] = ()):
        self.path = to_path(path).absolute()
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file; give a folder for the run.")
        self.is_writer = jax.process_index() == 0 if lock is None else lock
        self._metrics, self._lock = metrics.open_metrics(self.path), contextlib.ExitStack()
        if self.is_writer:
            with explained(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                # A run may have been copied without its lock; its config shows that the folder is a run.
                names = () if (self.path / "config.json").exists() else names
                self._check_lock = self._lock.enter_context(locked(self.path, "give another --workdir", names))
            for part in (self.path, self.path / "tokenizer"):
                remove_leftovers(part)

    def __exit__(self, kind, error, traceback):
        try:
            self.close()
        except OSError:
            if error is None:  # the error that ended the block matters more
                raise

    def close(self) -> None:
        """End the metrics file and give the lock back."""
        try:
            self._metrics.close()
        finally:
            self._lock.close()
            self.is_writer = False

    def read_config(self) -> dict | None:
        """The nested config of the run; None in a new folder. Raises ValueError for another file."""
        path = self.path / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is not readable as JSON ({error}); restore or remove it.") from None
        if not (isinstance(config, dict) and isinstance(config.get("model"), dict)):
            raise ValueError(f"{path} is not the config of a run; give another folder.")
        return config

    def read_summary(self) -> dict | None:
        """summary.json, which a run writes at its end; None where it is absent or damaged."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
            return summary if isinstance(summary, dict) and isinstance(summary.get("step"), int) else None

    def write_config(self, config: Mapping) -> None:
        if self.is_writer:
            write_json(self.path / "config.json", config)

    def check_config(self, config: Mapping) -> list[str]:
        """Differences from the stored config, as "key: old -> new". ValueError if checkpoints cannot be used."""
        stored = self.read_config()
        if stored is None:
            return []
        old, new = flatten(stored), flatten(plain(config))
        differing = differences(old, new, sorted(old.keys() | new.keys()))
        if unusable := [text for key, text in differing.items() if key in BREAKING]:
            remedy = "Use the stored values to continue it, or another --workdir to start a new run."
            raise ValueError(f"The config does not fit the run in {self.path} ({'; '.join(unusable)}). {remedy}")
        for difference in differing.values():
            log.info("config differs from the stored one: %s", difference)
        return list(differing.values())

    def write_versions(self) -> list[str]:
        """Store versions.json; returns what changed since it was last written, each as "name: old -> new"."""
        path, now, old = self.path / "versions.json", versions(), {}
        with contextlib.suppress(OSError, ValueError):
            old = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name}: {old[name]} -> {now[name]}" for name in now if name in old and old[name] != now[name]]
        if changed:
            log.info("versions differ from the run's last start: %s", "; ".join(changed))
        if self.is_writer:
            write_json(path, now)
        return changed

    def write_goodput(self, account: goodput.Account) -> None:
        """Replace the account of the run's wall time. Raises as `append`."""
        if self.is_writer:
            self._check_lock()
            write_json(self.path / goodput.FILE, dataclasses.asdict(account))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one row of metrics; it is in the file when this returns, in a bucket after `flush`. Raises OSError as
        `explained`; RuntimeError if another process took the folder over."""
        if self.is_writer:
            self._check_lock()
            self._metrics.append((json.dumps(plain(record), allow_nan=False) + "\n").encode())

    def flush(self) -> None:
        """Return when all rows are stored."""
        if self.is_writer:
            self._metrics.flush()

    def truncate_metrics(self, step: int, again: Iterable[str] = ()) -> int:
        """Drop damaged lines, those after `step`, and at `step` those of kinds in `again`; return their number."""
        return self._metrics.truncate(lambda line: _belongs(line, step, again)) if self.is_writer else 0


def versions() -> dict[str, str | None]:
    """Versions of interpreter, libraries, package and git commit (None outside a checkout); JAX's settings, devices."""
    values: dict = {"python": platform.python_version(), "platform": platform.platform()}
    for name in (*PACKAGES, "softmask_jax"):
        try:
            values[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            values[name] = None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=True)
        values["git_commit"] = git.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        values["git_commit"] = None
    devices = jax.devices()
    device = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    return values | {"settings": jax_settings.chosen(), "device": device}


def _belongs(line: str, step: int, again: Iterable[str]) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    if not isinstance(record, dict) or record.get("step", step) > step:
        return False
    return not (record.get("step") == step and record.get("kind") in again)
