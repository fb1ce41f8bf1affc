"""This process among the hosts of a run, from flags or the environment, and the start of JAX on all of them.

The first that applies:
- --processes=1 or JAX_NUM_PROCESSES=1: a single process;
- addresses: --coordinator, --processes, --process; or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID (or
  JOB_COMPLETION_INDEX of an indexed Job);
- SLURM: a step of several tasks (`srun`, not a bare `salloc`);
- TPU pod: several hosts in TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES, or MEGASCALE_*, as set by GKE (xpk) or a VM;
  or a TPU whose metadata server lists several workers;
- Kubernetes: an indexed Job, with the package `kubernetes`;
- a single process."""
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

ADVICE = ("Give --coordinator=HOST:PORT, --processes and --process on every host; or --processes=1 to run as a single "
          "process.")
# Code that must be equal on all hosts.
CODE = Path(__file__).parents[1]
# Config keys that may differ: folders local to a host.
LOCAL_KEYS = ("data.cache_dir", "train.compilation_cache")


@dataclasses.dataclass(frozen=True)
class Member:
    """One process among those of a run."""

    how: str = "alone"  # or addresses | SLURM | TPU pod | Kubernetes
    coordinator: str = ""  # host:port of the first process
    processes: int = 1
    process: int = 0
    local_device_ids: tuple[int, ...] | None = None  # if processes share a machine; None: all devices
    join_seconds: float = 300.0  # timeout for the others to join
    heartbeat_seconds: float = 100.0  # silence of a process before JAX ends the others


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several hosts", "TPU pods, GKE and SLURM are recognised without any of these.")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first process, reached by all")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are; 1: a single process")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument("--join_seconds", type=float, default=300.0, help="how long others may take to come (300)")
    group.add_argument("--heartbeat_seconds", type=float, default=100.0, help="JAX's limit for a silent host (100)")


def from_flags(flags: argparse.Namespace) -> Member:
    """`detect` with the flags of `add_flags`."""
    names = ("coordinator", "processes", "process", "join_seconds", "heartbeat_seconds")
    return detect(**{name: getattr(flags, name) for name in names})


def detect(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, **limits: float
) -> Member:
    """This process, from the arguments or else the environment (see the module).

    limits: `join_seconds` and `heartbeat_seconds`. ValueError: numbers incomplete, out of range or unlike the
    cluster's. RuntimeError: a cluster was recognised, but not its other hosts."""
    alone = Member(**limits)
    count = processes if processes is not None else clusters.whole("JAX_NUM_PROCESSES")
    if count is not None and count < 1:
        raise ValueError(f"--processes (or JAX_NUM_PROCESSES) is {count}; it must be 1 or more.")
    if count == 1:
        return alone
    if address := coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", ""):
        index = process if process is not None else clusters.whole("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")
        return _addressed(alone, "addresses", address, count, index)
    if how := clusters.kind():
        member = _ask_cluster(alone, how)
        if processes is not None and processes != member.processes:
            raise ValueError(f"--processes={processes}, but the {how} has {member.processes} processes.")
        return member
    if process is not None or processes is not None:
        raise ValueError(f"--processes and --process need the address of the first host. {ADVICE}")
    return alone


def start(member: Member, config: Mapping, workdir: str | os.PathLike) -> None:
    """Meet the other hosts, if any, and start JAX on all; no-op if already started.

    All need an equal nested `config` and a shared `workdir`. RuntimeError of one line: a host is missing or differs."""
    import jax

    if member.processes == 1 or jax.distributed.is_initialized():
        return
    meet(member, config, workdir)
    try:
        jax.distributed.initialize(
            member.coordinator, member.processes, member.process, member.local_device_ids,
            initialization_timeout=max(1, round(member.join_seconds)),
            heartbeat_timeout_seconds=max(1, round(member.heartbeat_seconds)),
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(f"JAX could not start on several hosts ({reason}). {ADVICE}") from error
    if (jax.process_index(), jax.process_count()) != (member.process, member.processes):
        raise RuntimeError(f"JAX takes this process for {jax.process_index()} of {jax.process_count()}, not for "
                           f"{member.process} of {member.processes} ({member.how}): are its devices part of the same "
                           "machine or pod as the others'?")


def meet(member: Member, config: Mapping, workdir: str | os.PathLike) -> None:
    """Return once all hosts are there with an equal nested `config` and a shared `workdir`; raises as `start`."""
    me = rendezvous.Host(member.process, member.processes, socket.gethostname(), prints(config))
    rendezvous.answer(member.coordinator, me, seconds=member.join_seconds, folder=workdir)


def leave_soon(code: int, seconds: float = 10.0) -> None:
    """After a reported error: exit with `code` unless the process ends by itself in time.
    At exit JAX waits minutes for the other hosts, which wait in a step for this one."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        timer = threading.Timer(seconds, os._exit, (code,))
        timer.daemon = True
        timer.start()


def check_same(what: str, value: str) -> None:
    """RuntimeError, equal on all hosts, naming those whose `value` differs from the first host's."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8))
    if others := [str(process) for process, digest in enumerate(digests) if (digest != digests[0]).any()]:
        raise RuntimeError(f"The hosts do not see the same: {what} of host {', '.join(others)} differs from host 0's.")


def prints(config: Mapping) -> dict[str, str]:
    """Fingerprints that must agree on all hosts: package code, libraries, every config key."""
    # Imported late: supervisors import this module and need no JAX.
    from softmask_jax.config import flatten, jax_settings
    from softmask_jax.io.run_folder import PACKAGES

    common = {
        "Python": ".".join(platform.python_version_tuple()[:2]), "the code of softmask_jax": _code(CODE),
        "the settings of JAX and XLA": jax_settings.chosen(),
    }  # fmt: skip
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    keys = flatten(plain(config))
    return common | versions | {f"config.{key}": json.dumps(keys[key]) for key in keys if key not in LOCAL_KEYS}


@functools.cache
def _code(package: Path) -> str:
    """Digest of all modules in a folder."""
    paths = sorted(package.rglob("*.py"))
    content = b"".join(f"{path.relative_to(package)}\0".encode() + path.read_bytes() for path in paths)
    return hashlib.sha256(content).hexdigest()[:12]


def _addressed(alone: Member, how: str, address: str, processes: int | None, process: int | None) -> Member:
    numbers = {"--processes (or JAX_NUM_PROCESSES)": processes, "--process (or JAX_PROCESS_ID)": process}
    if missing := [name for name, value in numbers.items() if value is None]:
        raise ValueError(f"The coordinator's address is given ({address}), so {' and '.join(missing)} must be too.")
    if not 0 <= process < processes:
        last = processes - 1
        raise ValueError(f"--process={process} is out of range: of {processes} processes they are 0 to {last}.")
    rendezvous.split_address(address)
    return dataclasses.replace(alone, how=how, coordinator=address, processes=processes, process=process)


def _ask_cluster(alone: Member, how: str) -> Member:
    try:
        host, port, processes, process, local = clusters.READERS[how]()
        address = f"{host}:{os.environ.get('JAX_COORDINATOR_PORT') or port}"
    except (KeyError, ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        reason = f"{error} is not set" if isinstance(error, KeyError) else " ".join(str(error).split())
        message = f"This looks like a part of a {how}, but the other hosts are unknown ({reason}). {ADVICE}"
        raise RuntimeError(message) from error
    if processes == 1:
        return alone
    # JAX reads JAX_LOCAL_DEVICE_IDS itself.
    local = None if os.environ.get("JAX_LOCAL_DEVICE_IDS") else local
    return dataclasses.replace(_addressed(alone, how, address, processes, process), local_device_ids=local)
