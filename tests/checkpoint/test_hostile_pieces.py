"""Weights that are joined from pieces whose shapes have too few axes, or none that fit."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.derived import plus_base, with_low_rank
from gap_export.checkpoint.safetensors import WeightLocation
from gap_export.errors import CheckpointError
from gap_export.modeling.eva import eva_sizes

SHAPES = ((), (0,), (3,), (3, 4), (2, 4), (3, 2), (2, 3, 4), (88, 3, 14, 14), (88, 3, 0, 0), (7, 3, 14, 14))


def _checkpoint(**shapes: tuple[int, ...]) -> Checkpoint:
    weights = {
        key.replace("__", "."): WeightLocation(Path("x"), "F32", shape, 0, 0) for key, shape in shapes.items()
    }
    return Checkpoint(Path("x"), "x", {}, dict(weights))


def test_deltas_and_low_rank_updates_fit_or_are_refused() -> None:
    joined = 0
    for first, second, third in product(SHAPES, repeat=3):
        checkpoint = _checkpoint(w=first, a=second, b=third)
        try:
            joined += plus_base(checkpoint, "w", "a").shape == first
        except CheckpointError:
            assert not first or not second or first[1:] != second[1:] or first[0] < second[0]
        try:
            with_low_rank(checkpoint, "w", "a", "b", rank=2, scale=1.0)
            assert (first, second, third) == ((3, 4), (2, 4), (3, 2))
        except CheckpointError:
            continue
    assert joined > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hidden", SHAPES)
def test_sizes_of_eva_clip(shape: tuple[int, ...], hidden: tuple[int, ...]) -> None:
    checkpoint = _checkpoint(patch_embed__proj__weight=shape, blocks__0__mlp__fc1__weight=hidden)
    if shape == (88, 3, 14, 14) and len(hidden) == 2:
        assert eva_sizes(checkpoint, "").heads == 1
        return
    with pytest.raises(CheckpointError, match="has "):
        eva_sizes(checkpoint, "")
