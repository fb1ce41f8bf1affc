"""Processes that take turns: each answers requests while the others wait, so that memory and time are its own.

Standard library only: a process that serves PyTorch must not load JAX."""
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

_MODULE = "import sys; from {module} import serve; serve(sys.argv[1])"


class Worker:
    """A process that runs `serve(settings)` of a module; settings: JSON values."""

    def __init__(self, module: str, settings: Mapping):
        self.module = module
        command = [sys.executable, "-c", _MODULE.format(module=module), json.dumps(settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")

    def ask(self, request: str, *arguments):
        """The answer to one request, JSON values. RuntimeError if the process has ended."""
        try:
            print(json.dumps([request, *arguments]), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"The process of {self.module} ended with exit status {self._process.wait()} instead of "
                               f"answering '{request}'; what it wrote stands above. With too little memory for both "
                               "processes choose a smaller --shapes or --batch.")
        return json.loads(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        with self._process:  # closes the pipes, at which the process ends, and waits
            pass


def answer(answers: Mapping[str, Callable]) -> None:
    """Answer the requests of a `Worker` until its pipe is closed. answers: a function for each request."""
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        print(json.dumps(answers[request](*arguments)), flush=True)


def peak_resident_bytes() -> int:
    """High-water mark of this process's resident memory since its start (Linux)."""
    # Not resource.getrusage: its maximum is inherited from the parent.
    status = Path("/proc/self/status").read_text("utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
