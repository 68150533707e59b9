"""Pruners that keep what scores highest, and those that do not look at the image."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from gap_export.positions import MergedId
from gap_export.prune.features import VisionFeatures
from gap_export.prune.random import drawn_indices
from gap_export.prune.reference.choice import Choice, Floats, Margin, descending, given, text_cosine
from gap_export.prune.spatial import used_rows


def cls_attention(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """What the class token attends to most."""
    return _best(given(features.attention), kept, relative=True)


def text_similarity(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """What is most like the expression."""
    return _best(text_cosine(features), kept, relative=False)


def tile_attention(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """Each tile's tokens in their own order; all by how far they stand from the front of their tile."""
    scores = given(features.attention)
    tiles = np.zeros(len(scores)) if features.tile is None else features.tile
    margin, queue, lines = Margin(), [], {}
    for tile in np.unique(tiles):
        own = np.flatnonzero(tiles == tile)
        lines[tile] = own[descending(scores[own])]
        queue += [(Fraction(2 * rank + 1, len(own)), tile, token) for rank, token in enumerate(lines[tile])]
    chosen = [token for *_, token in sorted(queue)[:kept]]
    for line in lines.values():
        margin.cut(scores[line], int(np.isin(line, chosen).sum()), relative=True)
    return Choice(np.array(chosen, np.int64), margin=margin.smallest)


def random(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """A draw."""
    return Choice(np.array(drawn_indices(len(features.patches), seed)[:kept], np.int64))


def spatial(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """A uniform grid; of several, each its part of the points."""
    extents = [(each.rows, each.columns) for each in features.laid_out for _ in range(each.count)]
    total, first, chosen = sum(rows * columns for rows, columns in extents), 0, list[int]()
    for rows, columns in extents:
        end = first + rows * columns
        own = kept * end // total - kept * first // total
        chosen += [first + index for index in grid_indices((rows, columns), own)] if own else []
        first = end
    return Choice(np.array(chosen, np.int64))


def none(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """Everything."""
    return Choice(np.arange(len(features.patches), dtype=np.int64))


def grid_indices(grid: tuple[int, int], kept: int) -> list[int]:
    """Raster indices of K points spread evenly over the grid.

    Args:
        grid: (rows, columns).
        kept: K, 1..rows * columns.
    """
    rows, columns = grid
    stripes = used_rows(grid, kept)
    indices: list[int] = []
    for stripe in range(stripes):
        row = (2 * stripe + 1) * rows // (2 * stripes)
        points = (stripe + 1) * kept // stripes - stripe * kept // stripes
        indices += [row * columns + (2 * point + 1) * columns // (2 * points) for point in range(points)]
    return indices


def _best(scores_N: Floats, kept: int, *, relative: bool) -> Choice:
    margin, ranked = Margin(), descending(scores_N)
    margin.cut(scores_N[ranked], kept, relative=relative)
    return Choice(ranked[:kept], margin=margin.smallest)
