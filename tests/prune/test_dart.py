"""DART: pivots, and what is least alike to them."""

from __future__ import annotations

import pytest

from gap_export.prune.dart import shares


@pytest.mark.parametrize(
    ("kept", "dealt"),
    [(1, (0, 0, 0, 0)), (4, (0, 0, 0, 0)), (6, (1, 1, 0, 0)), (7, (1, 1, 1, 0)), (144, (35, 35, 35, 35))],
)
def test_shares(kept: int, dealt: tuple[int, ...]) -> None:
    assert shares(kept) == dealt
    assert sum(dealt) == max(kept - 4, 0)
