"""Traces of training steps for XProf: of a range of steps in the run's folder, or taken through a port."""
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import jax

from softmask_jax.io import uploads

# Of each process, where no range is named: from the third step on everything is compiled.
FIRST, LAST = 3, 7


class Profiler:
    """A trace of some steps in `folder`, of each process its own.

    steps: a range, which must lie within 1 to `last`, the run's last step (ValueError); True: a few; False: none."""

    def __init__(self, folder: Path, steps: range | bool, last: int):
        if isinstance(steps, range) and not 1 <= steps.start < steps.stop <= last + 1:
            flag, most = f"--profile={steps.start}:{steps.stop}", f"1 <= A < B <= {last + 1}"
            raise ValueError(f"{flag} is not within the run's {last} steps; A:B is steps A to B - 1, {most}.")
        self.folder, self.steps, self.running = folder, steps, None

    def begin(self, start: int) -> str:
        """Settle which steps are traced of a run that goes on after step `start`. Returns a line if none is left."""
        if not isinstance(self.steps, range):
            self.steps = range(start + FIRST, start + LAST + 1) if self.steps else range(0)
        elif self.steps.stop <= start + 1:
            wanted = f"--profile={self.steps.start}:{self.steps.stop}"
            return f"No trace: the run continues after step {start}, past those of {wanted}."
        return ""

    def is_due(self, step: int) -> bool:
        """Whether the trace starts or ends before this step."""
        return (step in self.steps) != bool(self.running)

    def turn(self, busy) -> None:
        """Start or end the trace when `busy`, arrays of the steps before, are there: steps run on after their call."""
        jax.block_until_ready(busy)
        if self.running:
            self.stop()
        else:
            self.running = uploads.mirror(self.folder)
            jax.profiler.start_trace(str(self.running.folder))

    def stop(self) -> None:
        if self.running:
            mirror, self.running = self.running, None
            jax.profiler.stop_trace()
            mirror.close()


def annotated(step: int) -> jax.profiler.StepTraceAnnotation:
    """Marks a block as a training step in traces."""
    return jax.profiler.StepTraceAnnotation("train", step_num=step)


@contextlib.contextmanager
def server(port: int | None) -> Iterator[None]:
    """JAX's profiler server on all addresses of this host; None: none. ValueError if the port cannot be used."""
    if port is None:
        yield
        return
    # JAX would only log it.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            reason = f"{error.strerror} on {socket.gethostname()}"
            raise ValueError(f"--profiler_port={port} cannot be used ({reason}); give another port.") from error
    jax.profiler.start_server(port)
    try:
        yield
    finally:
        jax.profiler.stop_server()
