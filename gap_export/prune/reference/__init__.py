"""Every strategy again, in float64 NumPy, one image at a time, written from its description and not from the tensor code.

The exported graphs are held against this: by the tests, by `validate`, by the benchmark of the pruners. Beside the choice it
says by how little it was made, because a choice that float64 makes by a hair another precision may make otherwise.

Shape letters: N visual tokens, K kept, T = 1 + N, A heads, D head width, E tower width, H decoder width, P width of the space
shared with text, M kept patches.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from gap_export.positions import MergedId
from gap_export.prune.random import drawn_indices
from gap_export.prune.reference import diverse, merging
from gap_export.prune.reference.features import (
    Choice,
    Floats,
    Gap,
    Ids,
    Seen,
    class_attention,
    descending,
    text_cosine,
)
from gap_export.prune.spatial import used_rows

__all__ = ["Choice", "Floats", "Ids", "Seen", "choose", "choose_adaptive", "class_attention", "grid_indices"]


def choose(pruner: str, seen: Seen, kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """What a strategy keeps of one image.

    Args:
        pruner: name of the strategy.
        seen: of the image.
        kept: K.
        seed: for strategies that draw at random.
        merged_id: which index merged tokens get.
    """
    if pruner in _CHOOSE:
        return _CHOOSE[pruner](seen, kept, merged_id)
    visual = len(seen.patches_NE)
    fixed = {
        "random": lambda: drawn_indices(visual, seed)[:kept],
        "spatial": lambda: grid_indices(_grid_of(seen), kept),
        "none": lambda: list(range(visual)),
    }
    return Choice(np.array(fixed[pruner](), np.int64))


def choose_adaptive(pruner: str, seen: Seen, bound: int, *, merged_id: MergedId) -> Choice:
    """What an adaptive strategy keeps of one image.

    Args:
        pruner: name of the strategy.
        seen: of the image.
        bound: the most tokens that it may keep.
        merged_id: which index merged tokens get.

    Returns:
        At most `bound` tokens, without padding, and how many the image needs.
    """
    return _ADAPT[pruner](seen, bound, merged_id)


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


def _grid_of(seen: Seen) -> tuple[int, int]:
    assert seen.grid is not None
    return seen.grid


def _best_of_tiles(seen: Seen, kept: int) -> Choice:
    """Each tile's tokens in their own order; all by how far they stand from the front of their tile."""
    scores = seen.attention_N
    tiles = seen.tile_N if len(seen.tile_N) else np.zeros(len(scores))
    gap, queue, lines = Gap(), [], {}
    for tile in np.unique(tiles):
        own = np.flatnonzero(tiles == tile)
        lines[tile] = own[descending(scores[own])]
        queue += [(Fraction(2 * rank + 1, len(own)), tile, token) for rank, token in enumerate(lines[tile])]
    chosen = [token for *_, token in sorted(queue)[:kept]]
    for line in lines.values():
        gap.cut(scores[line], int(np.isin(line, chosen).sum()), relative=True)
    return Choice(np.array(chosen, np.int64), margin=gap.smallest)


def _best(scores_N: Floats, kept: int, *, relative: bool) -> Choice:
    gap, ranked = Gap(), descending(scores_N)
    gap.cut(scores_N[ranked], kept, relative=relative)
    return Choice(ranked[:kept], margin=gap.smallest)


_CHOOSE: dict[str, Callable[[Seen, int, MergedId], Choice]] = {
    "cls_attention": lambda seen, kept, _: _best(seen.attention_N, kept, relative=True),
    "tile_attention": lambda seen, kept, _: _best_of_tiles(seen, kept),
    "text_similarity": lambda seen, kept, _: _best(text_cosine(seen), kept, relative=False),
    "prumerge": merging.prumerge,
    "prumerge_plus": merging.prumerge_plus,
    "trim": merging.trim,
    "visionzip": merging.visionzip,
    "divprune": diverse.divprune,
    "vispruner": diverse.vispruner,
    "cdpruner": diverse.cdpruner,
    "dart": diverse.dart,
}
_ADAPT: dict[str, Callable[[Seen, int, MergedId], Choice]] = {
    "prumerge": merging.prumerge_adaptive,
    "prumerge_plus": merging.prumerge_plus_adaptive,
    "trim": merging.trim_adaptive,
}
