"""Spatial over several grids, and over grids whose extents are known when the graph runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gap_export import prune
from gap_export.positions import MergedId
from gap_export.prune import Grid, VisionFeatures, reference
from gap_export.prune.reference.scores import grid_indices

WHOLE_AND_LINES = (Grid(4, 4), Grid(6, 9))
TILES = (Grid(4, 4, count=5),)


def tokens_of(grids: tuple[Grid, ...]) -> int:
    return sum(grid.rows * grid.columns * grid.count for grid in grids)


def in_tensors(grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
    """Of extents that are known when the graph runs."""
    return tuple(Grid(torch.tensor([each.rows]), torch.tensor([each.columns]), each.count) for each in grids)


def chosen(grids: tuple[Grid, ...], kept: int, *, as_tensors: bool = False) -> list[int]:
    """What the tensor code chooses, of extents that are numbers or tensors, in both images of a batch."""
    given_as = in_tensors(grids) if as_tensors else grids
    features = VisionFeatures(torch.empty(2, tokens_of(grids), 1), grid=None, grids=given_as)
    selected = prune.load("spatial").select(features, kept, seed=0, merged_id=MergedId.LAST_VISUAL)
    first, second = selected.indices_BK.tolist()
    assert first == second
    return list(map(int, first))


def told(grids: tuple[Grid, ...], kept: int) -> list[int]:
    """What its twin chooses."""
    features = VisionFeatures(np.empty((tokens_of(grids), 1)), grid=None, grids=grids)
    choice = reference.choose("spatial", features, kept, seed=0, merged_id=MergedId.LAST_VISUAL)
    return list(map(int, choice.indices_K))


extents = st.integers(1, 40)
GRIDS = st.one_of(
    st.tuples(st.builds(Grid, extents, extents)),
    st.tuples(st.builds(Grid, st.integers(1, 27), st.integers(1, 27)), st.builds(Grid, extents, extents)),
    st.tuples(st.builds(Grid, st.integers(1, 16), st.integers(1, 16), st.integers(1, 13))),
)


@given(grids=GRIDS, as_tensors=st.booleans(), data=st.data())
def test_both_choose_the_same(grids: tuple[Grid, ...], as_tensors: bool, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, tokens_of(grids)))
    indices = chosen(grids, kept, as_tensors=as_tensors)
    assert indices == told(grids, kept)
    assert len(set(indices)) == kept
    assert 0 <= min(indices) <= max(indices) < tokens_of(grids)


@pytest.mark.parametrize("grids", [WHOLE_AND_LINES, TILES], ids=["whole and lines", "tiles"])
def test_every_grid_has_its_share(grids: tuple[Grid, ...]) -> None:
    """Of every count: as many as its share of all tokens, to less than one."""
    sizes = [grid.rows * grid.columns for grid in grids for _ in range(grid.count)]
    ends = np.cumsum(sizes)
    for kept in range(1, ends[-1] + 1):
        counts = np.bincount(np.searchsorted(ends, chosen(grids, kept), side="right"), minlength=len(sizes))
        assert (abs(counts - kept * np.array(sizes) / ends[-1]) < 1).all(), (kept, counts)


def test_all_tokens_are_all_tokens() -> None:
    for grids in (WHOLE_AND_LINES, TILES):
        assert chosen(grids, tokens_of(grids)) == list(range(tokens_of(grids)))


def test_a_tile_is_a_grid_of_its_own() -> None:
    """Four of each: the middle of every quarter."""
    assert chosen(TILES, 20) == [16 * tile + index for tile in range(5) for index in grid_indices((4, 4), 4)]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 9), (64, 36), (128, 128)])
def test_a_root_that_is_a_whole_number_and_a_half_is_rounded_as_before(rows: int, columns: int) -> None:
    """The tables of earlier bundles were made by `round`: halves go to the even number."""
    for kept in range(1, rows * columns + 1, max(1, rows * columns // 400)):
        assert chosen((Grid(rows, columns),), kept) == grid_indices((rows, columns), kept)


def test_a_grid_is_not_made_up() -> None:
    loose = VisionFeatures(torch.empty(1, 12, 1), grid=None)
    with pytest.raises(ValueError, match="lie on grids"):
        prune.load("spatial").select(loose, 5, seed=0, merged_id=MergedId.LAST_VISUAL)
