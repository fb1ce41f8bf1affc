"""SIGTERM and Ctrl-C end a run after its current step, with everything saved."""
import contextlib
import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Within its `with` block: while `postponed` the first signal is noted, for the loop to save and end; any other one
    raises KeyboardInterrupt.

    A run of several processes relies on JAX's own notice of SIGTERM instead, which all of them take at the same step.
    """

    def __enter__(self):
        self._noted, self._postponed, self._before = False, False, {}
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

    def _note(self, *_):
        if self._noted or not self._postponed:
            raise KeyboardInterrupt
        self._noted = True
