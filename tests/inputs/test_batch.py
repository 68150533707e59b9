"""Batches of pictures: how many tokens every call keeps, and rows of several calls put together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gap_export.bundle.manifest import ModelFacts, Pruning
from gap_export.errors import InputError
from gap_export.inputs.batch import Pictures, of_one_size
from gap_export.inputs.layouts import TokenRange
from gap_export.positions import PositionPolicy
from gap_export.runtime.model import keep_counts
from gap_export.runtime.session import VisualTokens, padded_together, together

MODEL = ModelFacts(
    hidden_size=4,
    layers=1,
    attention_heads=1,
    kv_heads=1,
    head_dim=4,
    vocabulary=10,
    visual_tokens=60,
    grid=None,
    token_range=TokenRange(fewest=4, usual=20, most=60),
    max_positions=128,
)
PICTURES = Pictures(
    calls=({}, {}, {}),
    visual_tokens=np.array([8, 40, 5]),
    prunable=np.array([6, 40, 4]),
    grids=np.array([[2, 4], [5, 8], [1, 5]]),
)


def pruning(**changes: Any) -> Pruning:
    options = {"pruner": "random", "keep": 0.25, "kept": 5, "fewest": 1, "most": 15, "seed": 0, **changes}
    return Pruning.model_validate({"counting": "share", "positions": PositionPolicy.GAP, **options})


def test_every_picture_keeps_its_share_of_what_may_be_pruned() -> None:
    assert keep_counts(pruning(), MODEL, PICTURES, None) == [2, 10, 1]
    assert keep_counts(pruning(pruner="prumerge"), MODEL, PICTURES, None) == [2, 10, 2]


def test_a_share_is_chosen_within_its_range() -> None:
    free = pruning(counting="chosen", shares=(0.1, 0.5))
    assert keep_counts(free, MODEL, PICTURES, 0.5) == [3, 20, 2]
    for keep in (0.05, 0.6):
        with pytest.raises(InputError, match=r"outside 0\.1 to 0\.5"):
            keep_counts(free, MODEL, PICTURES, keep)
    with pytest.raises(InputError, match="cannot be chosen"):
        keep_counts(pruning(), MODEL, PICTURES, 0.5)


def test_pictures_of_one_size_are_counted_in_one_call() -> None:
    square = MODEL.model_copy(update={"token_range": None, "grid": (6, 10)})
    batch = of_one_size(np.zeros((3, 3, 2, 2), np.float32), 60)
    assert keep_counts(pruning(counting="fixed"), square, batch, None) == [None]
    assert keep_counts(pruning(counting="chosen"), square, batch, 0.5) == [30]


class Padding:
    """A session that knows how to put rows together."""

    def embeds_together(self, parts: Any, longest: int) -> Any:
        return padded_together(parts, longest)


def test_rows_of_several_calls_are_padded() -> None:
    random = np.random.default_rng(0)
    parts = [
        VisualTokens(
            embeds=random.normal(size=(1, len(kept), 4)).astype(np.float32),
            kept_indices=np.array([kept]),
            margins=np.array([0.1 * len(kept)]),
        )
        for kept in ([0, 7], [1, 2, 39], [4])
    ]
    visual = together(Padding(), parts, PICTURES)  # type: ignore[arg-type]
    assert visual.kept_indices.tolist() == [[0, 7, -1], [1, 2, 39], [4, -1, -1]]
    assert visual.kept_counts is not None
    assert visual.kept_counts.tolist() == [2, 3, 1]
    assert visual.visual_counts is PICTURES.visual_tokens
    assert visual.image_grid is PICTURES.grids
    assert visual.margins is not None
    assert visual.margins.tolist() == pytest.approx([0.2, 0.3, 0.1])
    for row, part in enumerate(parts):
        count = part.kept_indices.shape[1]
        assert np.array_equal(visual.embeds[row, :count], part.embeds[0])
        assert not visual.embeds[row, count:].any()


def test_one_picture_stays_where_it_is() -> None:
    """Its embeddings may lie on a device, and need not leave it."""
    alone = Pictures(calls=({},), visual_tokens=np.array([8]), prunable=np.array([8]))
    visual = together(object(), [VisualTokens("on the device", np.array([[0, 7]]))], alone)  # type: ignore[arg-type]
    assert visual.embeds == "on the device"
    assert (visual.kept_counts, visual.visual_counts) == (2, 8)
