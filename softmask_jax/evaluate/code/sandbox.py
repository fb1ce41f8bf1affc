"""A sandbox for programs that a model wrote: a process each, in namespaces of its own, within limits.

A program has an interpreter with its standard library and NumPy, read-only; 32 MiB of files in /scratch, in memory;
/dev/null, zero and random. It does not have any other file, /proc, the environment, a network, another process to see
or signal, a way to start one, privileges or a way to gain them (Linux user, mount, process, network, IPC, host name and
control group namespaces; a filter of system calls; `setrlimit`; a time limit kept from outside by killing the
namespaces' first process, with which the kernel kills all in them). It dies with its parent. The sandbox is as safe as
Linux's kernel; whether a solution is honest is another matter: see `runner`.
"""
import functools
import selectors
import sys
import time
from collections.abc import Iterable, Iterator

from softmask_jax.evaluate.code.running import Limits, Program, Running, Verdict

_PROBE = """
import os, socket
def refused(call, *arguments):
    try:
        call(*arguments)
    except OSError:
        return
    raise AssertionError(f"{call.__name__} was not refused")
refused(os.fork)
refused(socket.socket, socket.AF_INET)
refused(open, "/file", "w")
refused(os.listdir, "/proc")
open("/scratch/file", "w").close()
assert os.getuid() != 0 and os.getpid() == 2, "no namespaces"
"""


@functools.cache
def available() -> str:
    """Why a sandbox cannot be made here, in a few words; "" if one was made for a try."""
    if not sys.platform.startswith("linux"):
        return "its namespaces are Linux's"
    try:
        verdict = next(run([Program(_PROBE)], Limits()))[1]
    except (OSError, RuntimeError, ValueError) as error:
        return str(error)
    return "" if verdict.passed else f"it does not hold what it should: {verdict.detail or verdict.kind}"


def run(
    programs: Iterable[Program], limits: Limits, *, isolated: bool = True, workers: int = 1
) -> Iterator[tuple[int, Verdict]]:
    """Number and verdict of each program, as they end. Closing the iterator kills the running ones.

    isolated: False only sets limits, in a folder of its own: a program can then read and write whatever this user can,
    though neither start processes nor reach a network where the kernel has filters.

    Raises RuntimeError if a sandbox cannot be made, ValueError on a machine whose system calls are not known.
    """
    waiting, running = enumerate(programs), {}
    with selectors.DefaultSelector() as selector:
        try:
            while True:
                while len(running) < workers and (following := next(waiting, None)):
                    running[following[0]] = Running(*following, limits, isolated, selector)
                if not running:
                    return
                soonest = min(one.deadline for one in running.values()) - time.monotonic()
                for key, _ in selector.select(max(soonest, 0.0)):
                    running[key.data].read(key.fd)
                for number, one in list(running.items()):
                    if verdict := one.verdict():
                        del running[number]
                        yield number, verdict
        finally:
            for one in running.values():
                one.end()
