"""Pruners that put features of dropped tokens into those of kept ones, with a given count and with one of the image's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gap_export.positions import MergedId
from gap_export.prune.features import VisionFeatures
from gap_export.prune.reference.choice import (
    Choice,
    Floats,
    Margin,
    descending,
    given,
    matching,
    softmax,
    unit,
)


def prumerge(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """K - 1 by score, and one for the rest."""
    scores = given(features.full_width_attention)
    margin, ranked = Margin(), descending(scores)
    margin.cut(scores[ranked], kept - 1, relative=True)
    return _merge_neighbours(features, scores, list(ranked[: kept - 1]), merged_id, margin)


def prumerge_adaptive(features: VisionFeatures[Floats], bound: int, *, merged_id: MergedId) -> Choice:
    """As many by score as are outliers."""
    margin, scores = Margin(), given(features.full_width_attention)
    outliers = _outliers(scores, margin)
    choice = prumerge(features, min(outliers + 1, bound), seed=0, merged_id=merged_id)
    return replace(choice, margin=min(choice.margin, margin.smallest), needed=outliers + 1)


def prumerge_plus(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """A quarter of K - 1 by score, the rest evenly spaced, and one for the rest."""
    scores, others = given(features.full_width_attention), kept - 1
    visual = len(scores)
    best = max(1, int(np.floor(others / 4 + 0.5)))
    spread = [int(np.floor(visual / (others - best) * place + 1e-9)) for place in range(others - best)]
    ranked = np.array([token for token in descending(scores) if token not in set(spread)], np.int64)
    margin = Margin()
    margin.cut(scores[ranked], best, relative=True)
    return _merge_neighbours(features, scores, [*ranked[:best], *spread], merged_id, margin)


def prumerge_plus_adaptive(features: VisionFeatures[Floats], bound: int, *, merged_id: MergedId) -> Choice:
    """As many by score as are outliers, and a sequence of three times as many."""
    margin, scores = Margin(), given(features.full_width_attention)
    outliers, ranked, visual = _outliers(scores, margin), descending(scores), len(scores)
    margin.cut(scores[ranked], outliers, relative=True)
    best = [int(token) for token in ranked[:outliers]]
    step = visual // outliers // 3
    own = (best + [token for token in range(0, visual - 1, step) if token not in best])[: visual - 1]
    choice = _merge_neighbours(features, scores, own[: bound - 1], merged_id, margin)
    return replace(choice, needed=len(own) + 1)


def trim(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """K - 1 by raw product with the text, and the mean of the rest."""
    logits, margin = matching(features, given(features.aligned) @ given(features.text)), Margin()
    ranked = descending(logits)
    # Rounding is in proportion to the largest product, so gaps are measured by it.
    margin.cut(logits[ranked] / np.abs(logits).max(), kept - 1, relative=False)
    own, rest = [int(token) for token in ranked[: kept - 1]], np.sort(ranked[kept - 1 :])
    weights = {int(token): 1.0 for token in rest}
    index = merged_index(merged_id, own, weights, features, margin)
    patches_NX = features.added_up
    features_KE = np.concatenate([patches_NX[own], patches_NX[rest].mean(axis=0)[None]])
    return Choice(np.array([*own, index], np.int64), features_KE, margin.smallest)


def trim_adaptive(features: VisionFeatures[Floats], bound: int, *, merged_id: MergedId) -> Choice:
    """As many as are outliers."""
    margin, logits = Margin(), matching(features, given(features.aligned) @ given(features.text))
    outliers = _outliers(softmax(logits), margin)
    choice = trim(features, min(outliers + 1, bound), seed=0, merged_id=merged_id)
    fence_margin = margin.smallest / np.abs(logits).max()
    return replace(choice, margin=min(choice.margin, fence_margin), needed=outliers + 1)


def _outliers(scores_N: Floats, margin: Margin) -> int:
    lower, upper = np.percentile(scores_N, [25, 75])
    fence = upper + 1.5 * (upper - lower)
    margin.smallest = min(margin.smallest, np.abs(scores_N / fence - 1.0).min())
    return max(1, int((scores_N > fence).sum()))


def _merge_neighbours(
    features: VisionFeatures[Floats], scores_N: Floats, own: list[int], merged_id: MergedId, margin: Margin
) -> Choice:
    directions_NE, patches_NX = unit(given(features.full_width_keys)), features.added_up
    merge_margin, rows = Margin(), []
    for token in own:
        others = np.delete(np.arange(len(scores_N)), token)
        alike = directions_NE[others] @ directions_NE[token]
        nearest = descending(alike)
        merge_margin.cut(alike[nearest], 32, relative=False)
        row = patches_NX[token].copy()
        for neighbour in others[nearest[:32]]:
            row += scores_N[neighbour] * patches_NX[neighbour]
        rows.append(row)
    rest = sorted(set(range(len(scores_N))) - set(own))
    rows.append(scores_N[rest] @ patches_NX[rest])
    index = merged_index(merged_id, own, dict(zip(rest, scores_N[rest], strict=True)), features, margin)
    return Choice(np.array([*own, index], np.int64), np.array(rows), margin.smallest, merge_margin.smallest)


def merged_index(
    merged_id: MergedId,
    own: list[int],
    weights: dict[int, float],
    features: VisionFeatures[Floats],
    margin: Margin,
) -> int:
    """The index of what was merged.

    Args:
        merged_id: the rule.
        own: indices of what was kept.
        weights: of every token that went into it.
        features: of the image.
        margin: of all choices.
    """
    if merged_id is MergedId.LAST_VISUAL:
        return len(features.patches) - 1
    if merged_id is MergedId.MAX_KEPT:
        return max(own)
    sizes = [(each.rows, each.columns) for each in features.laid_out for _ in range(each.count)]
    lies = [(number, row, column) for number, size in enumerate(sizes) for row, column in np.ndindex(*size)]
    on_grid = [0.0] * len(sizes)
    for token, weight in weights.items():
        on_grid[lies[token][0]] += weight
    heaviest = descending(np.array(on_grid))
    margin.cut(np.array(on_grid)[heaviest], 1, relative=True)
    total = on_grid[heaviest[0]]
    centre = [
        sum(weight * lies[token][axis] for token, weight in weights.items() if lies[token][0] == heaviest[0])
        / total
        for axis in (1, 2)
    ]
    # Halfway between two patches is as much a tie as two equal scores.
    margin.smallest = min(margin.smallest, *(abs(value - np.floor(value) - 0.5) for value in centre))
    row, column = (int(np.floor(value + 0.5)) for value in centre)
    return lies.index((int(heaviest[0]), row, column))


def visionzip(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """The class token, what it attends to most, and targets with what is most alike to them."""
    scores, patches_NX = given(features.attention), features.added_up
    visual, class_tokens = len(scores), [] if features.class_token is None else [features.class_token]
    contextual = int(np.floor(kept * 10 / 64 + 0.5))
    margin, merge_margin, ranked = Margin(), Margin(), descending(scores)
    dominant = [int(token) for token in ranked[: kept - contextual - len(class_tokens)]]
    margin.cut(scores[ranked], len(dominant), relative=True)
    rest = [token for token in range(visual) if token not in set(dominant)]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
    gathered: dict[int, list[Floats]] = {target: [] for target in targets}
    for token in rest if targets else []:
        if token not in gathered:
            alike = unit(given(features.mean_keys)[targets]) @ unit(given(features.mean_keys)[token])
            order = descending(alike)
            merge_margin.cut(alike[order], 1, relative=False)
            gathered[targets[order[0]]].append(patches_NX[token])
    rows = [*class_tokens, *(patches_NX[token] for token in dominant)]
    rows += [patches_NX[t] + (np.mean(gathered[t], axis=0) if gathered[t] else 0.0) for t in targets]
    chosen = [*dominant, *targets]
    if class_tokens:
        chosen = [merged_index(merged_id, chosen, dict(enumerate(scores)), features, margin), *chosen]
    return Choice(np.array(chosen, np.int64), np.array(rows), margin.smallest, merge_margin.smallest)
