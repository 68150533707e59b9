"""Batches of images: how many tokens every call keeps, and rows of several calls put together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gap_export.bundle.manifest import ModelSpec, Pruning, Stage
from gap_export.errors import BundleError, InputError
from gap_export.inputs.batch import ImageBatch, of_one_size
from gap_export.inputs.layouts import TokenRange
from gap_export.positions import PositionPolicy
from gap_export.runtime.keep import keep_counts
from gap_export.runtime.session import VisualTokens, padded_together, together

MODEL = ModelSpec(
    hidden_size=4,
    layers=1,
    attention_heads=1,
    kv_heads=1,
    head_dim=4,
    vocabulary=10,
    visual_tokens=60,
    grid=None,
    token_range=TokenRange(min_tokens=4, typical_tokens=20, max_tokens=60),
    max_positions=128,
)
IMAGES = ImageBatch(
    calls=({}, {}, {}),
    visual_tokens=np.array([8, 40, 5]),
    prunable=np.array([6, 40, 4]),
    grids=np.array([[2, 4], [5, 8], [1, 5]]),
)


def pruning(**changes: Any) -> Pruning:
    options = {
        "pruner": "random",
        "keep": 0.25,
        "kept": 5,
        "min_tokens": 1,
        "max_tokens": 15,
        "seed": 0,
        **changes,
    }
    return Pruning.model_validate({"keep_mode": "ratio", "positions": PositionPolicy.GAP, **options})


def test_every_image_keeps_its_share_of_what_may_be_pruned() -> None:
    assert keep_counts(pruning(), MODEL, IMAGES, None).calls == (2, 10, 1)
    assert keep_counts(pruning(pruner="prumerge", pruner_min_tokens=2), MODEL, IMAGES, None).calls == (
        2,
        10,
        2,
    )


def test_a_share_is_chosen_within_its_range() -> None:
    free = pruning(keep_mode="dynamic", keep_range=(0.1, 0.5))
    assert keep_counts(free, MODEL, IMAGES, 0.5).calls == (3, 20, 2)
    for keep in (0.05, 0.6):
        with pytest.raises(InputError, match=r"outside 0\.1 to 0\.5"):
            keep_counts(free, MODEL, IMAGES, keep)
    with pytest.raises(InputError, match="cannot be chosen"):
        keep_counts(pruning(), MODEL, IMAGES, 0.5)


def test_images_of_one_size_are_counted_in_one_call() -> None:
    square = MODEL.model_copy(update={"token_range": None, "grid": (6, 10)})
    batch = of_one_size(np.zeros((3, 3, 2, 2), np.float32), 60)
    assert keep_counts(pruning(keep_mode="fixed"), square, batch, None).calls == (None,)
    assert keep_counts(pruning(keep_mode="dynamic", max_tokens=30), square, batch, 0.5).calls == (30,)
    with pytest.raises(InputError, match="outside 1 to 15"):
        keep_counts(pruning(keep_mode="dynamic"), square, batch, 0.5)


def test_counts_of_stages_follow_every_image() -> None:
    """What is dropped inside the decoder enters it; line ends count there."""
    stages = [
        Stage(first_layer=0, layers=2, kept=40, capacity=64),
        Stage(first_layer=2, layers=2, kept=10, capacity=48),
    ]
    inside = pruning(pruner="fastv", kept=40, max_tokens=40, stages=stages)
    counts = keep_counts(inside, MODEL, IMAGES, None)
    assert counts.calls == (6, 40, 4)
    assert counts.stages is not None
    assert counts.stages.tolist() == [[[2]], [[10]], [[1]]]
    assert counts.gone(IMAGES) == [4], "of the prompt that loses fewest"
    pairs = replace(IMAGES, per_prompt=3)
    assert keep_counts(inside, MODEL, pairs, None).gone(pairs) == [6 + 30 + 4]
    assert keep_counts(pruning(), MODEL, IMAGES, None).gone(IMAGES) is None
    with pytest.raises(InputError, match="cannot be chosen"):
        keep_counts(inside, MODEL, IMAGES, 0.5)


@pytest.mark.parametrize(
    "changes", [{"pruner": "none"}, {"pruner": "sparsevlm"}, {"keep": 0.5}, {"stages": []}], ids=str
)
def test_stages_that_are_not_those_of_the_pruner_are_refused(changes: dict[str, Any]) -> None:
    """A manifest can say anything: one line, before anything is computed."""
    stages = [
        Stage(first_layer=0, layers=2, kept=40, capacity=64),
        Stage(first_layer=2, layers=2, kept=10, capacity=48),
    ]
    inside = pruning(**{"pruner": "fastv", "kept": 40, "max_tokens": 40, "stages": stages, **changes})
    with pytest.raises(BundleError, match="has stages of") as caught:
        keep_counts(inside, MODEL, IMAGES, None)
    assert caught.value.hint == "the bundle is damaged: build it again"


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
    visual = together(Padding(), parts, IMAGES)  # type: ignore[arg-type]
    assert visual.kept_indices.tolist() == [[0, 7, -1], [1, 2, 39], [4, -1, -1]]
    assert visual.kept_counts is not None
    assert visual.kept_counts.tolist() == [2, 3, 1]
    assert visual.visual_counts is IMAGES.visual_tokens
    assert visual.image_grid is IMAGES.grids
    assert visual.margins is not None
    assert visual.margins.tolist() == pytest.approx([0.2, 0.3, 0.1])
    for row, part in enumerate(parts):
        count = part.kept_indices.shape[1]
        assert np.array_equal(visual.embeds[row, :count], part.embeds[0])
        assert not visual.embeds[row, count:].any()


def test_one_image_stays_where_it_is() -> None:
    """Its embeddings may lie on a device, and need not leave it."""
    alone = ImageBatch(calls=({},), visual_tokens=np.array([8]), prunable=np.array([8]))
    visual = together(object(), [VisualTokens("on the device", np.array([[0, 7]]))], alone)  # type: ignore[arg-type]
    assert visual.embeds == "on the device"
    assert (visual.kept_counts, visual.visual_counts) == (2, 8)
