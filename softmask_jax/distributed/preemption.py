"""SIGTERM and Ctrl-C end a run after its current step, with everything saved."""
import contextlib
import signal
import threading
import time

import jax
from jax.experimental import multihost_utils

SAME_SECONDS = 5.0


class StopSignal:
    """Context manager that, while `postponed`, notes the first signal for the loop to save and end.

    Any other signal raises KeyboardInterrupt, except SIGTERM again within SAME_SECONDS: both a scheduler and a
    supervisor may send it. With several processes JAX's own notice of SIGTERM is used, so that all stop at the same
    step, and `noted` is always False; together=False: they need not."""

    def __init__(self, together: bool = True):
        self._together = together

    def __enter__(self):
        self.noted, self._postponed, self._before, self._last = False, False, {}, (0, 0.0)
        alone = not self._together or jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def at(self, step: int) -> bool:
        """Whether to save and end at this step; call it at every step."""
        return self.noted if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)

    @contextlib.contextmanager
    def postponed(self):
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False

    def _note(self, number: int, _):
        before, self._last = self._last, (number, time.monotonic())
        if self.noted and number == before[0] == signal.SIGTERM and self._last[1] - before[1] < SAME_SECONDS:
            return
        if self.noted or not self._postponed:
            raise KeyboardInterrupt
        self.noted = True
