"""The Pareto front is what its definition says, for any points."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gap_export.evaluation.recommend.front import pareto_front

Pair = tuple[float, float]

# Few values, so that many points are as accurate, as fast, or the same.
points = st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.6, 0.9]), st.integers(1, 5)), max_size=12)


def dominates(one: Pair, other: Pair) -> bool:
    """At least as accurate and as fast, and better in one of both."""
    return one[0] >= other[0] and one[1] <= other[1] and one != other


@given(points)
def test_the_front_is_what_nothing_dominates(given_points: list[Pair]) -> None:
    expected = [not any(dominates(other, each) for other in given_points) for each in given_points]
    assert pareto_front(given_points) == expected


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1e6)), min_size=1, max_size=30))
def test_of_any_numbers_something_lies_on_it_and_the_rest_is_dominated_by_it(found: list[Pair]) -> None:
    front = [each for each, on_front in zip(found, pareto_front(found), strict=True) if on_front]
    assert front
    assert all(each in front or any(dominates(other, each) for other in front) for each in found)


@given(points, st.randoms(use_true_random=False))
def test_the_order_of_points_makes_no_difference(found: list[Pair], rng: object) -> None:
    shuffled = list(found)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    before, after = (
        sorted(
            each for each, on_front in zip(given_points, pareto_front(given_points), strict=True) if on_front
        )
        for given_points in (found, shuffled)
    )
    assert before == after


def test_of_nothing_nothing_lies_on_it() -> None:
    assert pareto_front([]) == []
