"""Waiting for other processes."""
import time
from collections.abc import Callable


def until(true: Callable[[], object], seconds: float = 30) -> None:
    """Return once true() holds; AssertionError if it does not in time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
