"""Where this process stands among the hosts of a run, and how they come together: from flags or the environment.

| what is there                                                                | then                                  |
|------------------------------------------------------------------------------|---------------------------------------|
| --coordinator, --processes, --process; or JAX_COORDINATOR_ADDRESS,           | plain addresses                       |
| JAX_NUM_PROCESSES, JAX_PROCESS_ID (or an indexed Job's JOB_COMPLETION_INDEX)  |                                       |
| a SLURM step of several tasks (`srun`, not a bare `salloc`)                  | SLURM's variables                     |
| TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES of several, MEGASCALE_*        | what GKE (xpk) or a VM sets           |
| a TPU, and a metadata server that lists several workers                      | the metadata server's list            |
| an indexed Job of Kubernetes, with the package `kubernetes`                  | what Kubernetes says of the Job       |
| nothing of these, or --processes=1 or JAX_NUM_PROCESSES=1                    | a single process                      |
"""
import argparse
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from softmask_jax.distributed import clusters, rendezvous
from softmask_jax.io.files import plain

ADVICE = (
    "Give --coordinator=HOST:PORT, --processes and --process on every host; or --processes=1 to run as a single process."
)
# What all hosts must have alike.
CODE = Path(__file__).parents[1]
# Folders of a host itself; all else in a config is the same everywhere.
LOCAL_KEYS = ("data.cache_dir", "train.compilation_cache")


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among those of a run.

    Attributes:
      how: what told: alone | addresses | SLURM | TPU pod | Kubernetes.
      coordinator: host:port of the first process.
      local_device_ids: of this process where several share a machine; None is all.
      join_seconds: how long the others may take to come.
      heartbeat_seconds: after so long without a sign of a process JAX ends the others.
    """

    how: str = "alone"
    coordinator: str = ""
    processes: int = 1
    process: int = 0
    local_device_ids: tuple[int, ...] | None = None
    join_seconds: float = 300.0
    heartbeat_seconds: float = 100.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `from_flags` reads."""
    group = parser.add_argument_group("several hosts", "TPU pods, GKE and SLURM are recognised without any of these.")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first process, reached by all")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are; 1: a single process")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument("--join_seconds", type=float, default=300.0, help="how long others may take to come (300)")
    group.add_argument("--heartbeat_seconds", type=float, default=100.0, help="JAX's limit for a silent host (100)")


def from_flags(flags: argparse.Namespace) -> Place:
    """`detect` with what `add_flags` added."""
    return detect(
        flags.coordinator, flags.processes, flags.process,
        join_seconds=flags.join_seconds, heartbeat_seconds=flags.heartbeat_seconds,
    )  # fmt: skip


def detect(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *,
    join_seconds: float = 300.0, heartbeat_seconds: float = 100.0,
) -> Place:  # fmt: skip
    """This process's place, from the arguments first and the environment next (see the module's table).

    Raises:
      ValueError: the numbers are incomplete, out of range, or not those of the cluster.
      RuntimeError: a cluster was recognised, but its other hosts were not.
    """
    alone = Place(join_seconds=join_seconds, heartbeat_seconds=heartbeat_seconds)
    wanted = processes if processes is not None else clusters.whole("JAX_NUM_PROCESSES")
    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if wanted is not None and wanted < 1:
        raise ValueError(f"--processes (or JAX_NUM_PROCESSES) is {wanted}; it must be 1 or more.")
    if wanted == 1:
        return alone
    if address:
        index = process if process is not None else clusters.whole("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")
        return dataclasses.replace(_addressed(alone, address, wanted, index), how="addresses")
    if how := clusters.kind():
        place = _ask_cluster(alone, how)
        if processes is not None and processes != place.processes:
            raise ValueError(f"--processes={processes}, but the {how} has {place.processes} processes.")
        return place
    if process is not None or processes is not None:
        raise ValueError(f"--processes and --process need the address of the first host. {ADVICE}")
    return alone


def start(place: Place, config: Mapping, workdir: str | os.PathLike) -> None:
    """Meet the other hosts, if there are any, and start JAX on all. Done already, it does nothing.

    Args:
      config: nested; it must be the same on all hosts, as the code and the libraries must.
      workdir: of the run, which the hosts share.

    Raises:
      RuntimeError: a host did not come, or runs something else; one line.
    """
    import jax

    if place.processes == 1 or jax.distributed.is_initialized():
        return
    me = rendezvous.Host(place.process, place.processes, socket.gethostname(), prints(config))
    rendezvous.answer(place.coordinator, me, seconds=place.join_seconds, folder=workdir)
    try:
        jax.distributed.initialize(
            place.coordinator, place.processes, place.process, place.local_device_ids,
            initialization_timeout=max(1, round(place.join_seconds)),
            heartbeat_timeout_seconds=max(1, round(place.heartbeat_seconds)),
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise RuntimeError(f"JAX could not start on several hosts ({' '.join(str(error).split())}). {ADVICE}") from error
    if (jax.process_index(), jax.process_count()) != (place.process, place.processes):
        raise RuntimeError(
            f"JAX takes this process for {jax.process_index()} of {jax.process_count()}, not for {place.process} of "
            f"{place.processes} ({place.how}): are its devices part of the same machine or pod as the others'?"
        )


def leave_soon(code: int, seconds: float = 10.0) -> None:
    """End this process soon, whether or not the others end too; to be called when an error has been told.

    Args:
      code: the exit status where it has to be ended; seconds: how long the others may take to come to the same end.

    At its exit JAX waits minutes for the other hosts, and they wait in a step for this one.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        timer = threading.Timer(seconds, os._exit, (code,))
        timer.daemon = True
        timer.start()


def check_same(what: str, value: str) -> None:
    """Raises RuntimeError, the same on all hosts, that names those on which `value` is not what it is on the first."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8))
    others = [process for process, digest in enumerate(digests) if (digest != digests[0]).any()]
    if others:
        where = ", ".join(map(str, others))
        raise RuntimeError(f"The hosts do not see the same: {what} of host {where} differs from that of host 0.")


def prints(config: Mapping) -> dict[str, str]:
    """What must be the same on all hosts: this package's code, the libraries, every key of the config."""
    # Not above: whoever only asks for its place, as a supervisor does, needs no JAX.
    from softmask_jax.config import jax_settings
    from softmask_jax.config import flatten
    from softmask_jax.io.run_folder import PACKAGES

    found = {"Python": ".".join(platform.python_version_tuple()[:2]), "the code of softmask_jax": _code(CODE)}
    found["the settings of JAX and XLA"] = jax_settings.chosen()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    keys = flatten(plain(config))
    return found | {f"config.{key}": json.dumps(value) for key, value in keys.items() if key not in LOCAL_KEYS}


@functools.cache
def _code(package: Path) -> str:
    """Digest of every module below a folder."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _addressed(alone: Place, address: str, processes: int | None, process: int | None) -> Place:
    given = {"--processes (or JAX_NUM_PROCESSES)": processes, "--process (or JAX_PROCESS_ID)": process}
    if missing := [name for name, value in given.items() if value is None]:
        raise ValueError(f"The coordinator's address is given ({address}), so {' and '.join(missing)} must be too.")
    if not 0 <= process < processes:
        raise ValueError(f"--process={process} is out of range: of {processes} processes they are 0 to {processes - 1}.")
    rendezvous.split_address(address)
    return dataclasses.replace(alone, coordinator=address, processes=processes, process=process)


def _ask_cluster(alone: Place, how: str) -> Place:
    try:
        host, port, processes, process, local = clusters.READERS[how]()
        address = f"{host}:{os.environ.get('JAX_COORDINATOR_PORT') or port}"
    except (KeyError, ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        reason = f"{error} is not set" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise RuntimeError(f"This looks like a part of a {how}, but the other hosts are unknown ({reason}). {ADVICE}") from error
    if processes == 1:
        return alone
    if os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        local = None  # JAX reads it
    place = _addressed(alone, address, processes, process)
    return dataclasses.replace(place, how=how, local_device_ids=local)
