"""DART: pivots, and what is least alike to them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from gap_export.prune.dart import shares

NAME = "dart"


@pytest.mark.parametrize(("grid", "kept"), [((24, 24), 144), ((16, 16), 64)])
def test_exported_graph_equals_float64(check: SimpleNamespace, grid: tuple[int, int], kept: int) -> None:
    check.agrees_with_float64(NAME, grid, kept, cases=10)


def test_a_batch_equals_its_pictures_alone(check: SimpleNamespace) -> None:
    check.batch_equals_singles(NAME)


def test_every_count_from_fewest_to_all(check: SimpleNamespace) -> None:
    check.every_count(NAME)


def test_tensorrt_builds_it(builds_in_tensorrt: Callable[..., None]) -> None:
    builds_in_tensorrt(NAME)


@pytest.mark.parametrize(
    ("kept", "dealt"), [(1, [0]), (4, [0, 0, 0, 0]), (6, [1, 1, 0, 0]), (144, [35, 35, 35, 35])]
)
def test_shares(kept: int, dealt: list[int]) -> None:
    assert shares(kept) == dealt
    assert min(4, kept) + sum(dealt) == kept
