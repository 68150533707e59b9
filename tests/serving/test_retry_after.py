"""Those who are refused come again when it is their turn: no more at a time than are begun."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from gap_export.serving.retry_after import LEAST_SECONDS, MOST_SECONDS, RetryAfter


class Clock:
    """Seconds, set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_queue_that_begins_nothing_yet_has_them_come_after_a_second() -> None:
    retry = RetryAfter(Clock())
    assert {retry.seconds() for _ in range(200)} == {LEAST_SECONDS}


@pytest.mark.parametrize("per_second", [1, 10, 100])
def test_as_many_come_again_in_a_second_as_are_begun(per_second: int) -> None:
    clock = Clock()
    retry = RetryAfter(clock)
    for _ in range(100):
        clock.now += 1 / per_second
        retry.note_begun(1)
    told = [retry.seconds() for _ in range(5 * per_second)]
    assert told == sorted(told)
    in_a_second = Counter(map(math.floor, told[2 * per_second :]))
    assert max(in_a_second.values()) <= per_second + 1
    assert told[-1] == pytest.approx(5, rel=0.25, abs=1)


def test_who_should_have_come_by_now_is_expected_no_more() -> None:
    clock = Clock()
    retry = RetryAfter(clock)
    for _ in range(10):
        clock.now += 0.1
        retry.note_begun(1)
    for _ in range(100):
        retry.seconds()
    assert retry.seconds() > 5
    clock.now += MOST_SECONDS + 1
    for _ in range(64):
        clock.now += 0.1
        retry.note_begun(1)
    assert retry.seconds() == LEAST_SECONDS


def test_a_server_that_had_nothing_to_do_is_not_slow() -> None:
    clock = Clock()
    retry = RetryAfter(clock)
    for _ in range(20):
        retry.note_begun(1)
        clock.now += 0.1
        retry.note_begun(0)
        clock.now += 1000
    told = [retry.seconds() for _ in range(33)]
    assert told[-1] == pytest.approx(3.2)


def test_times_are_bounded() -> None:
    clock = Clock()
    retry = RetryAfter(clock)
    for _ in range(3):
        clock.now += 60
        retry.note_begun(1)
    told = [retry.seconds() for _ in range(1000)]
    assert (told[0], told[-1]) == (LEAST_SECONDS, MOST_SECONDS)
    assert told == sorted(told)
