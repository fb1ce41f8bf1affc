"""Seconds of a training process by kind, added to the account of its run."""
import contextlib
import threading
import time
from collections.abc import Iterator

import jax

from softmask_jax.io import goodput
from softmask_jax.io.goodput import Account
from softmask_jax.io.run_folder import RunFolder

# What a killed process did after its last record counts as lost. A record is a small file, in a bucket one request.
RECORD_SECONDS = 15.0
# Of all programs in the process; the training step, which is also traced at length, is timed as a whole.
COMPILED = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


class WallTime(contextlib.AbstractContextManager):
    """A clock that is always on one kind of `goodput.KINDS`, at first "start". Costs no wait for the device.

    begun: Unix time of the process's start. OSError as `explained` if the account cannot be written."""

    def __init__(self, folder: RunFolder, begun: float):
        self._folder, self._kind, self._thread = folder, "start", threading.get_ident()
        self.account = (goodput.read(folder.path) if folder.is_writer else None) or Account(begun, begun, starts=0)
        self.account.start_again(begun)
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        self.record()

    def __exit__(self, kind, error, traceback):
        jax.monitoring.unregister_event_duration_listener(self._compiled)
        with contextlib.suppress(OSError, RuntimeError):  # errors of the run itself are reported by their own exception
            self.record()

    def enter(self, kind: str) -> None:
        """End one kind of time; `kind` begins."""
        self.account.add(self._kind, time.time())
        self._kind = kind

    @contextlib.contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """Time of a block; afterwards the kind before it goes on."""
        before = self._kind
        self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)

    @contextlib.contextmanager
    def waiting(self, pending: list) -> Iterator[None]:
        """Time of getting a batch: a wait for data if the device has finished the `pending` steps meanwhile.
        A record, if it is time for one, comes next, behind a device that is usually still busy."""
        self.enter("steps")
        yield
        if not pending or pending[-1].loss.is_ready():
            self._kind = "data"
        self.enter("steps")
        self.record(every=RECORD_SECONDS)

    def continue_from(self, step: int) -> None:
        """Record the checkpoint that was restored; 0 for none."""
        self.account.continue_from(step)
        self.record()

    def checkpoint(self, step: int) -> None:
        """Record what a checkpoint keeps; to be called before it is saved."""
        self.enter(self._kind)
        self.account.mark(step)
        self.record()

    def record(self, every: float = 0.0) -> None:
        """Write the account, unless it was written less than `every` seconds ago."""
        self.enter(self._kind)
        if not every or self.account.seen - self._recorded >= every:
            self._recorded = self.account.seen
            self._folder.write_goodput(self.account)

    def _compiled(self, event: str, seconds: float, **_) -> None:
        if event in COMPILED and threading.get_ident() == self._thread:
            self.enter(self._kind)
            self.account.move(self._kind, "compiling", seconds)
