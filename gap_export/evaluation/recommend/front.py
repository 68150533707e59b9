"""The Pareto front: points that no other is better than in accuracy and in time at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points lie on the front: no other is at least as accurate and at least as fast, and better in one of both.

    Points that are equal lie there together, or not at all.

    Args:
        points: accuracy, and time in any unit.
    """
    on_front = [False] * len(points)
    best = float("-inf")  # accuracy of all that is faster
    by_time = sorted(range(len(points)), key=lambda place: points[place][1])
    for _, group in groupby(by_time, key=lambda place: points[place][1]):
        places = list(group)
        highest = max(points[place][0] for place in places)
        for place in places:
            on_front[place] = points[place][0] == highest > best
        best = max(best, highest)
    return on_front
