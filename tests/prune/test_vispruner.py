"""VisPruner: important tokens, and the rounds that weed out the rest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.prune.vispruner import rounds


@given(visual=st.integers(1, 3000), data=st.data())
def test_rounds_are_enough(visual: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, visual) | st.integers(1, min(visual, 20)))
    left, wanted = visual - kept // 2, kept - kept // 2
    for _ in range(rounds(visual, kept)):
        left -= min(8, left - wanted, (left + 1) // 2)
    assert left == wanted


@pytest.mark.parametrize(("kept", "enough"), [(144, 56), (576, 2), (1, 74)])
def test_rounds_over_576_tokens(kept: int, enough: int) -> None:
    assert rounds(576, kept) == enough
