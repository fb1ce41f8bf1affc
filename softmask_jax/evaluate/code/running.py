"""One program run through `enter` and `runner`: its input, output and deadline."""
import contextlib
import dataclasses
import functools
import importlib.util
import marshal
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from softmask_jax.evaluate.code import system_calls

# MiB of files, open files, threads (a limit on processes; starting one is refused).
DISK, FILES, THREADS = 32, 64, 64
# Seconds until a program must have begun; a longer wait is the machine's fault.
START = 60.0
# Bytes of output: kept from the end, and in total before the program is killed.
KEPT, FLOOD = 4_096, 16 << 20
ENTER, RUNNER = (Path(__file__).with_name(name) for name in ("enter.py", "runner.py"))
STARTED = b"started\n"
FLAGS = ["-s", "-S", "-B", "-P"]
# NumPy, for tests that need it.
PACKAGES = "/packages"
NUMPY = Path(importlib.util.find_spec("numpy").origin).parent
# The interpreter itself, not a virtual environment's.
PYTHON = os.path.realpath(sys._base_executable)
ENVIRONMENT = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
PASSED, FAILED, TIMED_OUT, KILLED, FLOODED = "passed", "failed", "timed out", "killed", "too much output"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one program."""

    timeout: float = 10.0  # seconds
    memory: int = 1_024  # MiB


@dataclasses.dataclass(frozen=True)
class Program:
    """A program with its tests."""

    source: str
    tests: str = ""  # run after it, in the same module


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a program ended."""

    kind: str
    detail: str = ""  # the signal that killed it, or a failed program's last line, which may be anything
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.kind == PASSED


class Running:
    """A started program. Its files are registered in `selector` under `number`; pass their events to `read`, and call
    `verdict` after each, and by `deadline` (time.monotonic) at the latest."""

    def __init__(self, number: int, program: Program, limits: Limits, isolated: bool, selector: selectors.BaseSelector):
        self.limits, self.isolated, self._selector = limits, isolated, selector
        self._word = secrets.token_hex(32).encode()
        self._work = "/scratch" if isolated else tempfile.mkdtemp(prefix="program-")
        self._begun, self._written, self._cause = 0.0, 0, ""
        self.deadline = time.monotonic() + START
        content = {
            "word": self._word.decode(), "program": program.source, "tests": program.tests,
            "site": PACKAGES if isolated else str(NUMPY.parent),
        }  # fmt: skip
        self._report, report_end = os.pipe()
        self._output, output_end = os.pipe()
        try:
            with os.fdopen(os.memfd_create("program"), "wb") as source:
                source.write(marshal.dumps(content))
                source.seek(0)
                spec = _spec(limits, isolated, report_end, self._work)
                self._process = subprocess.Popen(
                    [PYTHON, *FLAGS, str(ENTER), marshal.dumps(spec).hex()], stdin=source, stdout=output_end,
                    stderr=output_end, pass_fds=(report_end,), env=ENVIRONMENT, cwd="/", start_new_session=True,
                )  # fmt: skip
        finally:
            os.close(report_end)
            os.close(output_end)
        self._ended = os.pidfd_open(self._process.pid)
        self._text = {self._report: b"", self._output: b""}
        for file in self._text:
            os.set_blocking(file, False)
        self._open = {*self._text, self._ended}
        for file in self._open:
            selector.register(file, selectors.EVENT_READ, number)

    def read(self, file: int) -> None:
        if file == self._ended:
            return
        try:
            chunk = os.read(file, 1 << 16)
        except BlockingIOError:
            return
        if not chunk:
            self._close(file)
            return
        self._written += len(chunk)
        text = self._text[file] + chunk
        self._text[file] = text[-KEPT:]
        # Before the text is cut: a program may have flooded its report by the time that it is first read.
        if not self._begun and file == self._report and text.startswith(STARTED):
            self._begun = time.monotonic()
            self.deadline = self._begun + self.limits.timeout

    def verdict(self) -> Verdict | None:
        """None while it runs within its limits; else its end. RuntimeError if it could not be started."""
        code, now = self._process.poll(), time.monotonic()
        if code is None:
            if now < self.deadline and self._written <= FLOOD:
                return None
            self._cause = TIMED_OUT if now >= self.deadline else FLOODED
        # Drain the pipes, at most 1 MiB and an end of file.
        for file in [*self._text] * 17:
            if file in self._open:
                self.read(file)
        self.end()
        if not self._begun:
            raise RuntimeError(f"a program could not be started in it ({self._reason()})")
        return Verdict(*self._outcome(code), round(now - self._begun, 3))

    def _outcome(self, code: int | None) -> tuple[str, str]:
        if self._text[self._report].endswith(self._word):
            return PASSED, ""
        if self._cause:
            return self._cause, ""
        number = -code if code < 0 else code - 128
        if number == signal.SIGXCPU:
            return TIMED_OUT, ""
        if number in signal.valid_signals():
            return KILLED, signal.Signals(number).name
        return FAILED, self._last_line() if code else "ended before its tests did"

    def end(self) -> None:
        """Kill it and all that it started, and close its files."""
        if self._process.poll() is None:
            # Everything in its namespaces dies with this process.
            self._process.kill()
        if not self.isolated:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for file in list(self._open):
            self._close(file)
        if not self.isolated:
            shutil.rmtree(self._work, ignore_errors=True)

    def _close(self, file: int) -> None:
        self._open.remove(file)
        self._selector.unregister(file)
        os.close(file)

    def _last_line(self) -> str:
        lines = self._text[self._output].decode("utf-8", "replace").split("\n")
        printed = (line.strip() for line in reversed(lines) if line.strip())
        last = next(printed, f"exit status {self._process.returncode}")
        return "".join(letter if letter.isprintable() else "\ufffd" for letter in last[:200])

    def _reason(self) -> str:
        report = self._text[self._report].decode("utf-8", "replace")
        if report.startswith("error: "):
            return report.removeprefix("error: ")
        return f"nothing happened in {START:.0f} s" if self._cause else self._last_line()


def _spec(limits: Limits, isolated: bool, report: int, work: str) -> dict:
    """Argument of `enter`."""
    bounds = {
        "AS": limits.memory << 20, "CPU": math.ceil(limits.timeout) + 1, "FSIZE": DISK << 20, "NOFILE": FILES, "CORE": 0,
        "STACK": 8 << 20, "MEMLOCK": 0, "MSGQUEUE": 0, "SIGPENDING": FILES,
    }  # fmt: skip
    return {
        "parent": os.getpid(), "report": report, "work": work, "isolated": isolated, "disk": DISK,
        # Outside of a user namespace this user's other processes would count, too.
        "limits": bounds | ({"NPROC": THREADS} if isolated else {}),
        "binds": _binds() if isolated else [], "filter": _filter(isolated), "python": PYTHON,
        "arguments": [*FLAGS, "-c", RUNNER.read_text("utf-8")],
        "environment": ENVIRONMENT | {"HOME": work, "TMPDIR": work},
    }  # fmt: skip


def _filter(isolated: bool) -> str:
    try:
        return system_calls.assembled().hex()
    except ValueError:
        if isolated:
            raise
        return ""


@functools.cache
def _binds() -> list[tuple[str, str]]:
    """Source, no link, and target of the files that an interpreter needs."""
    libraries = [os.path.join(sys.base_prefix, name) for name in ("lib", sys.platlibdir)]
    sources: dict[str, str] = {}
    for path in (PYTHON, *libraries, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"):
        if os.path.exists(path) and not any(path == other or path.startswith(other + "/") for other in sources):
            sources[path] = os.path.realpath(path)
    for folder in (NUMPY, NUMPY.with_name("numpy.libs")):
        if folder.is_dir():
            sources[f"{PACKAGES}/{folder.name}"] = os.path.realpath(folder)
    return [(source, target) for target, source in sources.items()]
