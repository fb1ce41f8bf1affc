"""Linux sandbox for programs that a model wrote: each a process in its own namespaces, within limits.

A program has the interpreter, its standard library and NumPy, read-only; 32 MiB in memory at /scratch; /dev/null, zero
and random. It has no other file, /proc, environment, network, other process, child or privilege: user, mount, PID,
network, IPC, UTS and cgroup namespaces, seccomp, `setrlimit`, and a timeout from outside that kills PID 1 and so all in
them. As safe as the kernel; `runner` says what keeps a program from cheating its tests."""
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
    """Why a sandbox cannot be made here, in a few words; "" if a trial succeeded."""
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

    isolated: False only sets limits, in a temporary folder: a program can then read and write what this user can, but
    start no process and reach no network where the kernel has seccomp. RuntimeError if a sandbox cannot be made,
    ValueError for a machine with unknown system calls."""
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
