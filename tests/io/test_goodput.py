"""The account of a run's wall time: its kinds add up, whatever was killed, done again or continued later."""
import json
import math

import pytest

from softmask_jax.io import goodput
from softmask_jax.io.goodput import Account, KINDS, WORK


def after(account: Account, now: float, **seconds: float) -> float:
    """Spend so many seconds on each kind; returns the new time."""
    for kind, length in seconds.items():
        now += length
        account.add(kind, now)
    return now


def nonzero(account: Account) -> dict[str, float]:
    return {kind: seconds for kind, seconds in account.seconds.items() if seconds}


def checkpoint(account: Account, now: float, step: int) -> float:
    account.mark(step)
    return after(account, now, saving=1)


@pytest.fixture
def killed():
    """A run that was killed at 200 s: 40 s of steps, 5 s of data and 2 s of validation after its checkpoint of step 8."""
    account = Account(since=100.0, seen=100.0)
    now = after(account, 100.0, start=10)
    account.continue_from(0)
    now = checkpoint(account, after(account, now, data=3, compiling=20, steps=10, validating=4), 4)
    now = checkpoint(account, after(account, now, steps=4), 8)
    assert after(account, now, steps=40, data=5, validating=2) == 200
    return account


def test_work_after_the_last_checkpoint_and_the_time_until_the_next_start_are_lost(killed):
    killed.start_again(260.0)
    after(killed, 260.0, start=7)
    killed.continue_from(8)
    assert nonzero(killed) == {
        "steps": 14, "data": 3, "compiling": 20, "saving": 2, "validating": 4, "start": 17, "repeated": 47, "down": 60,
    }  # fmt: skip
    assert killed.wall == 167 == killed.seen - killed.since and killed.starts == 2
    assert sum(killed.shares.values()) == pytest.approx(1) and killed.goodput == pytest.approx(14 / 167)


def test_kills_on_top_of_kills_lose_each_second_once(killed):
    """Killed in its start-up, then again before it was where it had been, then before the first checkpoint after that."""
    killed.start_again(210.0)
    killed.start_again(after(killed, 210.0, start=3))
    now = after(killed, killed.seen, start=4)
    killed.continue_from(8)
    now = after(killed, now, steps=30)
    killed.start_again(now)
    killed.continue_from(8)
    checkpoint(killed, after(killed, now, steps=50), 12)
    killed.start_again(400.0)
    killed.continue_from(12)
    assert killed.seconds["steps"] == 14 + 50 and killed.seconds["repeated"] == 47 + 30
    assert killed.seconds["start"] == 17 and killed.wall == 300 and killed.starts == 5


def test_an_older_checkpoint_loses_what_came_after_it(killed):
    """The newest ones were damaged. Between marks, or with none left, the time of a step is taken as constant."""
    killed.start_again(200.0)
    killed.continue_from(6)
    assert killed.seconds["steps"] == 12 and killed.seconds["repeated"] == 42 + 5 + 2 and killed.wall == 100
    killed.continue_from(0)
    assert not any(killed.seconds[kind] for kind in WORK) and killed.wall == 100


def test_the_pause_after_a_finished_run_is_not_lost_that_after_a_stop_is(killed):
    killed.finished = True
    killed.start_again(10_000.0)
    assert killed.seconds["down"] == 0 and killed.wall == 100 and not killed.finished
    killed.start_again(10_030.0)
    assert killed.seconds["down"] == 30


def test_a_clock_that_is_set_back_or_of_another_host_takes_no_time_away(killed):
    killed.start_again(150.0)
    after(killed, 150.0, start=5)
    killed.add("start", 120.0)
    after(killed, 120.0, start=5)
    assert killed.wall == 110 and min(killed.seconds.values()) >= 0


def test_an_account_stays_small_and_comes_back_from_its_file(killed, tmp_path):
    now = killed.seen
    for step in range(9, 500):
        now = checkpoint(killed, after(killed, now, steps=1), step)
    assert len(killed.marks) == goodput.KEPT_MARKS
    assert [mark[0] for mark in killed.marks] == [0, *range(485, 500)]
    (tmp_path / goodput.FILE).write_text(json.dumps(vars(killed)))
    assert goodput.read(tmp_path) == killed


@pytest.mark.parametrize("change", [
    {"seconds": {}}, {"seconds": dict.fromkeys(KINDS, -1.0)}, {"seconds": dict.fromkeys(KINDS, math.nan)}, {"marks": [[1]]},
    {"marks": [[1, [0.0]]]}, {"since": None}, {"starts": "2"}, {"unknown": 1}, {"seconds": 3}, {"marks": [["1", [0] * 4]]},
])  # fmt: skip
def test_a_damaged_account_is_none(killed, change, tmp_path):
    assert goodput.parse(vars(killed)) == killed and goodput.parse(vars(killed) | change) is None
    (tmp_path / goodput.FILE).write_text("[" * 9999)
    assert goodput.read(tmp_path) is None is goodput.read(tmp_path / "absent")


def test_the_line_names_what_took_time_the_largest_first(killed):
    assert killed.line() == (
        "54.0% training steps in 1 min 40 s, 1 start (Compiling 20.0%; Start-up 10.0%; Waiting for data 8.0%; "
        "Validating 6.0%; Saving 2.0%)"
    )
    assert Account(0.0, 0.0).line() == "0.0% training steps in 0.0 s, 1 start"
    assert [goodput.duration(seconds) for seconds in (4.21, 59.96, 3599, 3600 * 1234)] == [
        "4.2 s", "1 min 0 s", "59 min 59 s", "1,234 h 0 min"
    ]  # fmt: skip
