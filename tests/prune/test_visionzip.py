"""VisionZip: class token, dominant and contextual tokens."""

from __future__ import annotations

from gap_export.prune.visionzip import contextual_count


def test_the_split_is_that_of_the_paper() -> None:
    assert (contextual_count(64), contextual_count(128), contextual_count(192)) == (10, 20, 30)
