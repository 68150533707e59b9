"""DART: pivots, and what is least alike to them."""

from __future__ import annotations

import pytest

from gap_export.prune.dart import shares


@pytest.mark.parametrize(
    ("kept", "dealt"), [(1, [0]), (4, [0, 0, 0, 0]), (6, [1, 1, 0, 0]), (144, [35, 35, 35, 35])]
)
def test_shares(kept: int, dealt: list[int]) -> None:
    assert shares(kept) == dealt
    assert min(4, kept) + sum(dealt) == kept
