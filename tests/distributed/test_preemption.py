"""The first signal is noted while it may be postponed; any other one interrupts at once."""
import os
import signal
import threading

import pytest

from softmask_jax.distributed import preemption
from softmask_jax.distributed.preemption import StopSignal


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_a_postponed_signal_is_noted_and_a_second_one_interrupts():
    with StopSignal() as stop:
        with stop.postponed():
            assert not stop.at(1)
            send()
            assert stop.at(1) and stop.at(2)
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send()


def test_sigterm_again_at_once_is_the_same_and_later_interrupts(monkeypatch):
    with StopSignal() as stop, stop.postponed():
        send()
        send()
        assert stop.at(1)
        monkeypatch.setattr(preemption, "SAME_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            send()


def test_a_signal_before_or_after_the_loop_interrupts():
    with StopSignal() as stop:
        with pytest.raises(KeyboardInterrupt):
            send()
        with stop.postponed():
            pass
        with pytest.raises(KeyboardInterrupt):
            send()


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_outside_the_main_thread_signals_are_left_alone():
    seen = []

    def use():
        with StopSignal() as stop:
            seen.append((stop.at(1), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGTERM))]
