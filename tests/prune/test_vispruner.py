"""VisPruner: important tokens, and the rounds that weed out the rest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gap_export.prune.vispruner import rounds


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
