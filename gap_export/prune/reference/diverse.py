"""Pruners that keep what is unlike the rest."""

from __future__ import annotations

import numpy as np

from gap_export.positions import MergedId
from gap_export.prune.features import VisionFeatures
from gap_export.prune.reference.choice import Choice, Floats, Margin, descending, given, text_cosine, unit


def divprune(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """The most isolated token, then always the one farthest from all chosen."""
    directions_NH = unit(given(features.projected))
    distance = 1.0 - directions_NH @ directions_NH.T
    isolation = np.sort(distance + np.diag(np.full(len(distance), np.inf)), axis=1)[:, 0]
    margin = Margin()
    chosen: list[int] = []
    candidates = list(range(len(distance)))
    worth = isolation
    for _ in range(kept):
        order = descending(worth)
        margin.cut(worth[order], 1, relative=False)
        chosen.append(candidates.pop(int(order[0])))
        worth = distance[np.ix_(candidates, chosen)].min(axis=1) if candidates else np.empty(0)
    return Choice(np.array(chosen, np.int64), margin=margin.smallest)


def vispruner(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """Half by attention; of the rest, rounds drop what is most alike."""
    ranked, directions_NE, margin = (
        descending(given(features.attention)),
        unit(features.patches),
        Margin(),
    )
    important = int(kept * 0.5)
    margin.order(
        given(features.attention)[ranked], relative=True
    )  # all of it matters: even and odd places part ways
    left = list(ranked[important:])
    while len(left) > kept - important:
        even, odd = left[0::2], left[1::2]
        closest = (directions_NE[even] @ directions_NE[odd].T).max(axis=1)
        order = descending(closest)
        margin.order(closest[order], relative=False)
        drop = min(8, len(left) - (kept - important), len(even))
        left = [even[place] for place in order[drop:]] + odd
    return Choice(np.array([*ranked[:important], *left], np.int64), margin=margin.smallest)


def dart(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """Tokens of high norm, and those least alike to them."""
    norms, directions_NH, margin = (
        np.abs(given(features.projected)).sum(axis=1),
        unit(given(features.projected)),
        Margin(),
    )
    ranked = descending(norms)
    pivots = ranked[: min(4, kept)]
    margin.cut(norms[ranked], len(pivots), relative=True)
    margin.order(norms[pivots], relative=True)  # who chooses first matters
    chosen = [int(pivot) for pivot in pivots]
    for turn, pivot in enumerate(pivots):
        share = (kept - len(pivots) + len(pivots) - 1 - turn) // len(pivots)
        left = [token for token in range(len(norms)) if token not in set(chosen)]
        alike = directions_NH[left] @ directions_NH[pivot]
        order = np.argsort(alike, kind="stable")
        margin.cut(alike[order], share, relative=False)
        chosen += [left[place] for place in order[:share]]
    return Choice(np.array(chosen, np.int64), margin=margin.smallest)


def cdpruner(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """By Gram-Schmidt: what the chosen ones do not span of a token is what is left of its vector."""
    match = text_cosine(features)
    relevance = (match - match.min() + 1e-6) / max(match.max() - match.min(), 1e-6)
    left_NH, margin = unit(given(features.projected)), Margin()
    candidates = list(range(len(left_NH)))
    chosen: list[int] = []
    for _ in range(kept):
        new = np.square(left_NH[candidates]).sum(axis=1)
        gain = relevance[candidates] ** 2 * np.maximum(new, 1e-5)
        order = descending(gain)
        margin.cut(gain[order], 1, relative=True)
        token = candidates.pop(int(order[0]))
        chosen.append(token)
        if new[order[0]] > 1e-5:
            direction_H = unit(left_NH[token])
            left_NH = left_NH - np.outer(left_NH @ direction_H, direction_H)
    return Choice(np.array(chosen, np.int64), margin=margin.smallest)
