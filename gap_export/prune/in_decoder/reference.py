"""The pruners inside the decoder again, in float64 NumPy, one prompt at a time, from full attention maps.

Written from their descriptions and not from the tensor code; see `prune/reference/`. The module that a row of the table names as its
reference has these two functions, `scoring_queries` and `choose`. Rows of the prompt are counted from its end,
because they keep that distance when tokens of the image go.

Shape letters: S tokens of the stage that ends, N its visual tokens, T text tokens after the image, H decoder width, A heads,
R recycled tokens, C clusters.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from gap_export.prune.reference import Choice, Floats, Ids


def scoring_queries(pruner: str, image_NH: Floats, text_TH: Floats) -> tuple[list[int], float]:
    """The rows that decide, counted from the end (-1 is the last).

    Args:
        pruner: its name.
        image_NH: embeddings of all visual tokens, before layer 0.
        text_TH: of the text after them.

    Returns:
        (rows, by how little, relative, a text token became a scoring query or not).
    """
    if pruner != "sparsevlm" or len(text_TH) <= 1:
        return [-1], np.inf
    alike = image_NH @ text_TH.T
    shares = np.exp(alike - alike.max(axis=1, keepdims=True))
    relevance_T = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    mean = relevance_T.mean()
    decides = (relevance_T > mean) | (relevance_T == relevance_T.max())
    return [int(row) - len(text_TH) for row in np.flatnonzero(decides)], float(
        np.abs(relevance_T / mean - 1).min()
    )


def choose(
    pruner: str,
    attention_ASS: Floats,
    visual_NH: Floats,
    *,
    image_start: int,
    rows: list[int],
    kept: int,
    merged: int,
    carried_NX: Floats | None = None,
) -> Choice:
    """What a cut keeps of an image.

    Args:
        pruner: its name.
        attention_ASS: the whole map of the layer that the pruner goes by.
        visual_NH: hidden states of the visual tokens.
        image_start: tokens before the image.
        rows: of the prompt, whose attention scores the visual tokens.
        kept: K, merged tokens included.
        merged: how many of them.
        carried_NX: all that belongs to the visual tokens, of which merged ones have the mean; the hidden states alone when left out.

    Returns:
        Choice with places in 0..N-1.
    """
    visual = len(visual_NH)
    paid = attention_ASS.mean(axis=0)[rows, image_start : image_start + visual].mean(axis=0)
    ranked = np.argsort(-paid, kind="stable").astype(np.int64)
    chosen = kept - merged
    margin = _cut(paid[ranked], chosen) / paid[ranked[chosen - 1]]
    if not merged:
        return Choice(ranked[:kept], margin=margin)
    recycled = ranked[chosen : chosen + int(0.3 * (visual - chosen)) + 1]
    if len(recycled) < visual - chosen:
        last = chosen + len(recycled)
        margin = min(margin, _cut(paid[ranked], last) / paid[ranked[last - 1]])
    centres, cluster_R, centre_margin, merge_margin = _clusters(visual_NH[recycled], merged)
    carried_NX = visual_NH if carried_NX is None else carried_NX
    means = [carried_NX[recycled[cluster_R == number]].mean(axis=0) for number in range(merged)]
    return Choice(
        np.concatenate([ranked[:chosen], recycled[centres]]),
        np.concatenate([carried_NX[ranked[:chosen]], means]),
        min(margin, centre_margin),
        merge_margin,
    )


def _clusters(tokens_RH: Floats, count: int) -> tuple[list[int], Ids, float, float]:
    """(centres, cluster of every token, by how little the centres were chosen, by how little the clusters)."""
    tokens = len(tokens_RH)
    if count == 1:
        return [0], np.zeros(tokens, np.int64), np.inf, np.inf
    apart = np.array([[np.linalg.norm(one - other) for other in tokens_RH] for one in tokens_RH])
    apart /= np.sqrt(tokens_RH.shape[1])
    sparsity = (np.sort(apart, axis=1)[:, :count] ** 2).mean(axis=1)
    prominence = np.empty(tokens)
    for token in range(tokens):
        denser = [
            other
            for other in range(tokens)
            if sparsity[other] < sparsity[token] or (sparsity[other] == sparsity[token] and other < token)
        ]
        prominence[token] = np.log(apart[token, denser].min() if denser else apart.max()) - sparsity[token]
    ranked = np.argsort(-prominence, kind="stable")
    centres = [int(token) for token in ranked[:count]]
    to_centres = apart[:, centres]
    cluster_R = to_centres.argmin(axis=1).astype(np.int64)
    cluster_R[centres] = np.arange(count)
    nearest = np.sort(np.delete(to_centres, centres, axis=0), axis=1)
    merge_margin = float((nearest[:, 1] - nearest[:, 0]).min()) if len(nearest) else np.inf
    gaps = [
        *(abs(one - other) for one, other in pairwise(prominence[ranked[: count + 1]])),
        *(other - one for one, other in pairwise(np.sort(sparsity)) if other != one),
    ]
    return centres, cluster_R, float(min(gaps)), merge_margin


def _cut(descending: Floats, count: int) -> float:
    return float(descending[count - 1] - descending[count]) if count < len(descending) else np.inf
