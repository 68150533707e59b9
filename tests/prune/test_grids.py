"""The token nearest to a weighted centre, on one grid or several, against the float64 twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gap_export.positions import MergedId
from gap_export.prune import Grid, VisionFeatures
from gap_export.prune.grids import nearest_to_centre
from gap_export.prune.reference.choice import Margin
from gap_export.prune.reference.merging import merged_index
from tests.prune.test_spatial import in_tensors, tokens_of

WHOLE_AND_LINES = (Grid(2, 2), Grid(2, 3))
sides = st.integers(1, 24)
GRIDS = st.one_of(
    st.tuples(st.builds(Grid, sides, sides)),
    st.tuples(st.builds(Grid, st.integers(1, 16), st.integers(1, 16)), st.builds(Grid, sides, sides)),
    st.tuples(st.builds(Grid, st.integers(1, 12), st.integers(1, 12), st.integers(1, 9))),
)


def nearest(grids: tuple[Grid, ...], *weights: dict[int, float]) -> list[int]:
    weights_BN = torch.zeros(len(weights), tokens_of(grids))
    for row, own in enumerate(weights):
        weights_BN[row, list(own)] = torch.tensor(list(own.values()))
    return [int(index) for index in nearest_to_centre(grids, weights_BN)[:, 0]]


@given(grids=GRIDS, as_tensors=st.booleans(), seed=st.integers(0, 999))
def test_both_find_the_same(grids: tuple[Grid, ...], as_tensors: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights_BN = generator.random((2, tokens_of(grids))) ** generator.integers(1, 20)
    weights_BN[:, generator.random(tokens_of(grids)) < 0.5] = 0.0
    assume(weights_BN.any(axis=1).all())
    given_as = in_tensors(grids) if as_tensors else grids
    found = nearest_to_centre(given_as, torch.from_numpy(weights_BN)).tolist()
    told = VisionFeatures(np.empty((tokens_of(grids), 1)), grid=None, grids=grids)
    for (index,), weights_N in zip(found, weights_BN, strict=True):
        margin = Margin()
        weights = {int(token): float(weights_N[token]) for token in np.flatnonzero(weights_N)}
        expected = merged_index(MergedId.CENTROID, [], weights, told, margin)
        assert margin.smallest < 1e-4 or index == expected


@pytest.mark.parametrize(
    ("weights", "index"),
    [
        pytest.param({0: 1.0, 4: 0.4, 6: 0.5}, 0, id="the whole image is heavier"),
        pytest.param({0: 0.7, 4: 0.4, 6: 0.5}, 5, id="the tiles together are, though no token of theirs is"),
        pytest.param({6: 0.5, 9: 0.6}, 9, id="the last token"),
    ],
)
def test_tokens_of_other_grids_do_not_pull(weights: dict[int, float], index: int) -> None:
    assert nearest(WHOLE_AND_LINES, weights, {3: 1.0}) == [index, 3]


def test_weights_that_all_vanish_still_name_a_token() -> None:
    """In float32 they may; an index beyond the image would be a position of the text."""
    assert nearest(WHOLE_AND_LINES, {}) == [0]
