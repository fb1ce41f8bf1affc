"""SIGTERM and Ctrl-C end a run after its current step, with everything saved."""
import contextlib
import signal
import threading
import time

import jax
from jax.experimental import multihost_utils


SAME_SECONDS = 5.0


class StopSignal:
    """Within its `with` block: while `postponed` the first signal is noted, for the loop to save and end; any other one
    raises KeyboardInterrupt. SIGTERM again within SAME_SECONDS is the same one: a scheduler sends it to every process,
    and a supervisor among them passes it on.

    A run of several processes relies on JAX's own notice of SIGTERM instead, which all of them take at the same step.
    """

    def __enter__(self):
        self._noted, self._postponed, self._before, self._last = False, False, {}, (0, 0.0)
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def noted(self) -> bool:
        """Whether this process has a signal to obey; always False in a run of several, which must agree first."""
        return self._noted

    def at(self, step: int) -> bool:
        """Whether to save and end at this step; to be asked at every step."""
        return self._noted if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)

    @contextlib.contextmanager
    def postponed(self):
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False

    def _note(self, number: int, _):
        before, self._last = self._last, (number, time.monotonic())
        if self._noted and number == before[0] == signal.SIGTERM and self._last[1] - before[1] < SAME_SECONDS:
            return
        if self._noted or not self._postponed:
            raise KeyboardInterrupt
        self._noted = True
