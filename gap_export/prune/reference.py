"""Every strategy again, in float64 NumPy, one picture at a time, written from its description and not from the tensor code.

The exported graphs are held against this: by the tests, by `validate`, by the benchmark of the pruners. Beside the choice it
says by how little it was made, because a choice that float64 makes by a hair another precision may make otherwise.

Shape letters: N visual tokens, K kept, T = 1 + N, A heads, D head width, E tower width, H decoder width, M kept patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gap_export.positions import MergedId
from gap_export.prune.random import drawn_indices
from gap_export.prune.spatial import used_rows

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Seen:
    """What one picture's tower shows; the parts that a strategy does not read may be empty.

    Attributes:
        patches_NE: output of the feature layer, class token dropped.
        grid: (rows, columns).
        attention_N: attention of the class token to each patch in the feature layer, mean over heads.
        class_token_E: output of the feature layer at the class token.
        keys_ND: keys of the feature layer, mean over heads, class token dropped.
        following_query_E: class token's query in the following layer, full width.
        following_keys_TE: keys there, class token first.
        projected_NH: patches after the projector.
    """

    patches_NE: Floats
    grid: tuple[int, int]
    attention_N: Floats
    class_token_E: Floats
    keys_ND: Floats
    following_query_E: Floats
    following_keys_TE: Floats
    projected_NH: Floats
    aligned_NP: Floats = field(default_factory=lambda: np.empty(0))
    text_P: Floats = field(default_factory=lambda: np.empty(0))
    aligned_inversely: bool = True


@dataclass(frozen=True)
class Choice:
    """What the reference chose.

    Attributes:
        indices_K: best first.
        patches_KE: features where they are not the patches at the indices.
        margin: the smallest gap that any choice of a token was made by: relative for attention, absolute for cosines.
        merge_margin: the same for what goes into merged tokens, which changes features and not indices.
    """

    indices_K: Ids
    patches_KE: Floats | None = None
    margin: float = np.inf
    merge_margin: float = np.inf


@dataclass
class _Gap:
    """The smallest gap seen so far."""

    smallest: float = field(default=np.inf)

    def cut(self, values: Floats, count: int, *, relative: bool) -> None:
        """`values` in the order of choice, the first `count` of them chosen."""
        if 0 < count < len(values):
            self._see(abs(values[count - 1] - values[count]), values[count - 1], relative)

    def order(self, values: Floats, *, relative: bool) -> None:
        """The whole order matters."""
        for first, second in pairwise(values):
            self._see(abs(first - second), first, relative)

    def _see(self, gap: float, size: float, relative: bool) -> None:
        self.smallest = min(self.smallest, gap / max(abs(size), 1e-300) if relative else gap)


def choose(pruner: str, seen: Seen, kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """What a strategy keeps of one picture.

    Args:
        pruner: name of the strategy.
        seen: of the picture.
        kept: K.
        seed: for strategies that draw at random.
        merged_id: which index merged tokens get.
    """
    if pruner in _CHOOSE:
        return _CHOOSE[pruner](seen, kept, merged_id)
    visual = len(seen.patches_NE)
    fixed = {
        "random": lambda: drawn_indices(visual, seed)[:kept],
        "spatial": lambda: grid_indices(seen.grid, kept),
        "none": lambda: list(range(visual)),
    }
    return Choice(np.array(fixed[pruner](), np.int64))


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


def class_attention(query_AD: Floats, keys_ATD: Floats) -> Floats:
    """[N]: softmax of the class token's query over all keys, per head, mean over heads, class column dropped."""
    rows = [
        _softmax(keys @ query / np.sqrt(len(query))) for query, keys in zip(query_AD, keys_ATD, strict=True)
    ]
    return np.asarray(np.mean(rows, axis=0)[1:], np.float64)


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum(), np.float64)


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), np.float64)


def _descending(values: Floats) -> Ids:
    return np.argsort(-values, kind="stable").astype(np.int64)


def _cls_attention(seen: Seen, kept: int, merged_id: MergedId) -> Choice:
    gap, ranked = _Gap(), _descending(seen.attention_N)
    gap.cut(seen.attention_N[ranked], kept, relative=True)
    return Choice(ranked[:kept], margin=gap.smallest)


def _prumerge(seen: Seen, kept: int, merged_id: MergedId) -> Choice:
    scores = _full_width_attention(seen)
    gap, ranked = _Gap(), _descending(scores)
    gap.cut(scores[ranked], kept - 1, relative=True)
    return _merge_neighbours(seen, scores, list(ranked[: kept - 1]), merged_id, gap)


def _prumerge_plus(seen: Seen, kept: int, merged_id: MergedId) -> Choice:
    scores, others = _full_width_attention(seen), kept - 1
    visual = len(scores)
    best = max(1, int(np.floor(others / 4 + 0.5)))
    spread = [int(np.floor(visual / (others - best) * place + 1e-9)) for place in range(others - best)]
    ranked = np.array([token for token in _descending(scores) if token not in set(spread)], np.int64)
    gap = _Gap()
    gap.cut(scores[ranked], best, relative=True)
    return _merge_neighbours(seen, scores, [*ranked[:best], *spread], merged_id, gap)


def _full_width_attention(seen: Seen) -> Floats:
    query = seen.following_query_E
    return _softmax(seen.following_keys_TE @ query / np.sqrt(len(query)))[1:]


def _merge_neighbours(seen: Seen, scores_N: Floats, own: list[int], merged_id: MergedId, gap: _Gap) -> Choice:
    directions_NE = _unit(seen.following_keys_TE[1:])
    merge_gap, rows = _Gap(), []
    for token in own:
        others = np.delete(np.arange(len(scores_N)), token)
        alike = directions_NE[others] @ directions_NE[token]
        nearest = _descending(alike)
        merge_gap.cut(alike[nearest], 32, relative=False)
        row = seen.patches_NE[token].copy()
        for neighbour in others[nearest[:32]]:
            row += scores_N[neighbour] * seen.patches_NE[neighbour]
        rows.append(row)
    rest = sorted(set(range(len(scores_N))) - set(own))
    rows.append(scores_N[rest] @ seen.patches_NE[rest])
    index = _merged_index(merged_id, own, dict(zip(rest, scores_N[rest], strict=True)), seen.grid, gap)
    return Choice(np.array([*own, index], np.int64), np.array(rows), gap.smallest, merge_gap.smallest)


def _merged_index(
    merged_id: MergedId, own: list[int], weights: dict[int, float], grid: tuple[int, int], gap: _Gap
) -> int:
    if merged_id is MergedId.LAST_VISUAL:
        return grid[0] * grid[1] - 1
    if merged_id is MergedId.MAX_KEPT:
        return max(own)
    total = sum(weights.values())
    centre = [
        sum(weight * divmod(token, grid[1])[axis] for token, weight in weights.items()) / total
        for axis in (0, 1)
    ]
    # Halfway between two patches is as much a tie as two equal scores.
    gap.smallest = min(gap.smallest, *(abs(value - np.floor(value) - 0.5) for value in centre))
    row, column = (int(np.floor(value + 0.5)) for value in centre)
    return row * grid[1] + column


def _visionzip(seen: Seen, kept: int, merged_id: MergedId) -> Choice:
    scores, visual = seen.attention_N, len(seen.attention_N)
    contextual = int(np.floor(kept * 10 / 64 + 0.5))
    gap, merge_gap, ranked = _Gap(), _Gap(), _descending(scores)
    dominant = [int(token) for token in ranked[: kept - contextual - 1]]
    gap.cut(scores[ranked], len(dominant), relative=True)
    rest = [token for token in range(visual) if token not in set(dominant)]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
    gathered: dict[int, list[Floats]] = {target: [] for target in targets}
    for token in rest if targets else []:
        if token not in gathered:
            alike = _unit(seen.keys_ND[targets]) @ _unit(seen.keys_ND[token])
            order = _descending(alike)
            merge_gap.cut(alike[order], 1, relative=False)
            gathered[targets[order[0]]].append(seen.patches_NE[token])
    rows = [seen.class_token_E, *(seen.patches_NE[token] for token in dominant)]
    rows += [seen.patches_NE[t] + (np.mean(gathered[t], axis=0) if gathered[t] else 0.0) for t in targets]
    chosen = [*dominant, *targets]
    index = _merged_index(merged_id, chosen, dict(enumerate(scores)), seen.grid, gap)
    return Choice(np.array([index, *chosen], np.int64), np.array(rows), gap.smallest, merge_gap.smallest)


def _divprune(seen: Seen, kept: int, merged_id: MergedId) -> Choice:
    unit = _unit(seen.projected_NH)
    distance = 1.0 - unit @ unit.T
    isolation = np.sort(distance + np.diag(np.full(len(distance), np.inf)), axis=1)[:, 0]
    gap = _Gap()
    chosen: list[int] = []
    candidates = list(range(len(distance)))
    worth = isolation
    for _ in range(kept):
        order = _descending(worth)
        gap.cut(worth[order], 1, relative=False)
        chosen.append(candidates.pop(int(order[0])))
        worth = distance[np.ix_(candidates, chosen)].min(axis=1) if candidates else np.empty(0)
    return Choice(np.array(chosen, np.int64), margin=gap.smallest)


def _vispruner(seen: Seen, kept: int, merged_id: MergedId) -> Choice:
    ranked, unit, gap = _descending(seen.attention_N), _unit(seen.patches_NE), _Gap()
    important = int(kept * 0.5)
    gap.order(seen.attention_N[ranked], relative=True)  # all of it matters: even and odd places part ways
    left = list(ranked[important:])
    while len(left) > kept - important:
        even, odd = left[0::2], left[1::2]
        closest = (unit[even] @ unit[odd].T).max(axis=1)
        order = _descending(closest)
        gap.order(closest[order], relative=False)
        drop = min(8, len(left) - (kept - important), len(even))
        left = [even[place] for place in order[drop:]] + odd
    return Choice(np.array([*ranked[:important], *left], np.int64), margin=gap.smallest)


def _dart(seen: Seen, kept: int, merged_id: MergedId) -> Choice:
    norms, unit, gap = np.abs(seen.projected_NH).sum(axis=1), _unit(seen.projected_NH), _Gap()
    ranked = _descending(norms)
    pivots = ranked[: min(4, kept)]
    gap.cut(norms[ranked], len(pivots), relative=True)
    gap.order(norms[pivots], relative=True)  # who chooses first matters
    chosen = [int(pivot) for pivot in pivots]
    for turn, pivot in enumerate(pivots):
        share = (kept - len(pivots) + len(pivots) - 1 - turn) // len(pivots)
        left = [token for token in range(len(norms)) if token not in set(chosen)]
        alike = unit[left] @ unit[pivot]
        order = np.argsort(alike, kind="stable")
        gap.cut(alike[order], share, relative=False)
        chosen += [left[place] for place in order[:share]]
    return Choice(np.array(chosen, np.int64), margin=gap.smallest)


_CHOOSE: dict[str, Callable[[Seen, int, MergedId], Choice]] = {
    "cls_attention": _cls_attention,
    "prumerge": _prumerge,
    "prumerge_plus": _prumerge_plus,
    "visionzip": _visionzip,
    "divprune": _divprune,
    "vispruner": _vispruner,
    "dart": _dart,
}
