"""VisPruner: important tokens, and the rounds that weed out the rest."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.prune.vispruner import rounds

NAME = "vispruner"


@pytest.mark.parametrize(("grid", "kept"), [((16, 16), 64)])
def test_exported_graph_equals_float64(check: SimpleNamespace, grid: tuple[int, int], kept: int) -> None:
    check.agrees_with_float64(NAME, grid, kept, cases=10)


def test_a_batch_equals_its_pictures_alone(check: SimpleNamespace) -> None:
    check.batch_equals_singles(NAME)


def test_every_count_from_fewest_to_all(check: SimpleNamespace) -> None:
    check.every_count(NAME)


def test_tensorrt_builds_it(builds_in_tensorrt: Callable[..., None]) -> None:
    builds_in_tensorrt(NAME)


@given(remaining=st.integers(1, 576), data=st.data())
def test_rounds_end_where_they_should(remaining: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, remaining))
    drops, left = rounds(remaining, wanted), remaining
    for drop in drops:
        assert 1 <= drop <= min(8, (left + 1) // 2)
        left -= drop
    assert left == wanted


def test_576_tokens_take_54_rounds_of_eight() -> None:
    assert rounds(576 - 72, 72) == [8] * 54
