"""Pruners that put features of dropped tokens into those of kept ones, with a given count and with one of the image's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gap_export.positions import MergedId
from gap_export.prune.reference.features import Choice, Floats, Gap, Seen, descending, matching, softmax, unit


def prumerge(seen: Seen, kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """K - 1 by score, and one for the rest."""
    scores = _full_width_attention(seen)
    gap, ranked = Gap(), descending(scores)
    gap.cut(scores[ranked], kept - 1, relative=True)
    return _merge_neighbours(seen, scores, list(ranked[: kept - 1]), merged_id, gap)


def prumerge_adaptive(seen: Seen, bound: int, *, merged_id: MergedId) -> Choice:
    """As many by score as are outliers."""
    gap, scores = Gap(), _full_width_attention(seen)
    outliers = _outliers(scores, gap)
    choice = prumerge(seen, min(outliers + 1, bound), seed=0, merged_id=merged_id)
    return replace(choice, margin=min(choice.margin, gap.smallest), needed=outliers + 1)


def prumerge_plus(seen: Seen, kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """A quarter of K - 1 by score, the rest evenly spaced, and one for the rest."""
    scores, others = _full_width_attention(seen), kept - 1
    visual = len(scores)
    best = max(1, int(np.floor(others / 4 + 0.5)))
    spread = [int(np.floor(visual / (others - best) * place + 1e-9)) for place in range(others - best)]
    ranked = np.array([token for token in descending(scores) if token not in set(spread)], np.int64)
    gap = Gap()
    gap.cut(scores[ranked], best, relative=True)
    return _merge_neighbours(seen, scores, [*ranked[:best], *spread], merged_id, gap)


def prumerge_plus_adaptive(seen: Seen, bound: int, *, merged_id: MergedId) -> Choice:
    """As many by score as are outliers, and a sequence of three times as many."""
    gap, scores = Gap(), _full_width_attention(seen)
    outliers, ranked, visual = _outliers(scores, gap), descending(scores), len(scores)
    gap.cut(scores[ranked], outliers, relative=True)
    best = [int(token) for token in ranked[:outliers]]
    step = visual // outliers // 3
    own = (best + [token for token in range(0, visual - 1, step) if token not in best])[: visual - 1]
    choice = _merge_neighbours(seen, scores, own[: bound - 1], merged_id, gap)
    return replace(choice, needed=len(own) + 1)


def trim(seen: Seen, kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """K - 1 by raw product with the text, and the mean of the rest."""
    logits, gap = matching(seen, seen.aligned_NP @ seen.text_P), Gap()
    ranked = descending(logits)
    # Rounding is in proportion to the largest product, so gaps are measured by it.
    gap.cut(logits[ranked] / np.abs(logits).max(), kept - 1, relative=False)
    own, rest = [int(token) for token in ranked[: kept - 1]], np.sort(ranked[kept - 1 :])
    weights = {int(token): 1.0 for token in rest}
    index = _merged_index(merged_id, own, weights, seen, gap)
    features_KE = np.concatenate([seen.patches_NE[own], seen.patches_NE[rest].mean(axis=0)[None]])
    return Choice(np.array([*own, index], np.int64), features_KE, gap.smallest)


def trim_adaptive(seen: Seen, bound: int, *, merged_id: MergedId) -> Choice:
    """As many as are outliers."""
    gap, logits = Gap(), matching(seen, seen.aligned_NP @ seen.text_P)
    outliers = _outliers(softmax(logits), gap)
    choice = trim(seen, min(outliers + 1, bound), seed=0, merged_id=merged_id)
    fence_margin = gap.smallest / np.abs(logits).max()
    return replace(choice, margin=min(choice.margin, fence_margin), needed=outliers + 1)


def _outliers(scores_N: Floats, gap: Gap) -> int:
    lower, upper = np.percentile(scores_N, [25, 75])
    fence = upper + 1.5 * (upper - lower)
    gap.smallest = min(gap.smallest, np.abs(scores_N / fence - 1.0).min())
    return max(1, int((scores_N > fence).sum()))


def _full_width_attention(seen: Seen) -> Floats:
    if len(seen.following_attention_N):
        return seen.following_attention_N
    query = seen.following_query_E
    return softmax(seen.following_keys_TE @ query / np.sqrt(len(query)))[1:]


def _merge_neighbours(seen: Seen, scores_N: Floats, own: list[int], merged_id: MergedId, gap: Gap) -> Choice:
    directions_NE = unit(seen.following_keys_TE[1:])
    merge_gap, rows = Gap(), []
    for token in own:
        others = np.delete(np.arange(len(scores_N)), token)
        alike = directions_NE[others] @ directions_NE[token]
        nearest = descending(alike)
        merge_gap.cut(alike[nearest], 32, relative=False)
        row = seen.patches_NE[token].copy()
        for neighbour in others[nearest[:32]]:
            row += scores_N[neighbour] * seen.patches_NE[neighbour]
        rows.append(row)
    rest = sorted(set(range(len(scores_N))) - set(own))
    rows.append(scores_N[rest] @ seen.patches_NE[rest])
    index = _merged_index(merged_id, own, dict(zip(rest, scores_N[rest], strict=True)), seen, gap)
    return Choice(np.array([*own, index], np.int64), np.array(rows), gap.smallest, merge_gap.smallest)


def _merged_index(
    merged_id: MergedId, own: list[int], weights: dict[int, float], seen: Seen, gap: Gap
) -> int:
    if merged_id is MergedId.LAST_VISUAL:
        return len(seen.patches_NE) - 1
    if merged_id is MergedId.MAX_KEPT:
        return max(own)
    grid = seen.grid
    assert grid is not None
    total = sum(weights.values())
    centre = [
        sum(weight * divmod(token, grid[1])[axis] for token, weight in weights.items()) / total
        for axis in (0, 1)
    ]
    # Halfway between two patches is as much a tie as two equal scores.
    gap.smallest = min(gap.smallest, *(abs(value - np.floor(value) - 0.5) for value in centre))
    row, column = (int(np.floor(value + 0.5)) for value in centre)
    return row * grid[1] + column


def visionzip(seen: Seen, kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """The class token, what it attends to most, and targets with what is most alike to them."""
    scores, visual = seen.attention_N, len(seen.attention_N)
    contextual = int(np.floor(kept * 10 / 64 + 0.5))
    gap, merge_gap, ranked = Gap(), Gap(), descending(scores)
    dominant = [int(token) for token in ranked[: kept - contextual - 1]]
    gap.cut(scores[ranked], len(dominant), relative=True)
    rest = [token for token in range(visual) if token not in set(dominant)]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
    gathered: dict[int, list[Floats]] = {target: [] for target in targets}
    for token in rest if targets else []:
        if token not in gathered:
            alike = unit(seen.keys_ND[targets]) @ unit(seen.keys_ND[token])
            order = descending(alike)
            merge_gap.cut(alike[order], 1, relative=False)
            gathered[targets[order[0]]].append(seen.patches_NE[token])
    rows = [seen.class_token_E, *(seen.patches_NE[token] for token in dominant)]
    rows += [seen.patches_NE[t] + (np.mean(gathered[t], axis=0) if gathered[t] else 0.0) for t in targets]
    chosen = [*dominant, *targets]
    index = _merged_index(merged_id, chosen, dict(enumerate(scores)), seen, gap)
    return Choice(np.array([index, *chosen], np.int64), np.array(rows), gap.smallest, merge_gap.smallest)
