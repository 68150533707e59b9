"""SparseVLM: three cuts by the attention of the relevant text tokens; the best of what is dropped lives on as cluster means.

Source: SparseVLM (arXiv 2410.04417), version 1.5 of its published code.

- Scoring queries: of the text after the image, the tokens whose relevance is above the mean. Relevance: softmax over that text of the
  dot products of image and text embeddings, mean over the image, before layer 0.
- Score of a visual token: attention of these to it in the layer that just ran, mean over heads and queries.
- Of r dropped tokens the best int(0.3 r) + 1 are recycled: clustered into a tenth as many (rounded down, plus one) by DPC-kNN
  (density peaks; Du et al. 2016) on their hidden states, each cluster becoming its mean. A merged token stands where the
  centre of its cluster stood, and is a visual token like any other at the next cut.
- Of 32 layers, cuts after 2, 6 and 15, that is before 3, 7 and 16.

`keep` is what the last stage has, merged tokens counted. The two stages before it follow by interpolation, linear in the
logarithms, between keeping all and the four schedules published for 576 tokens (`score.py`: `sparse_token_dict`), named after their
mean over the layers:

| mean | chosen | with merged ones |
|---|---|---|
| 192 | 300, 200, 110 | 309, 204, 113 |
| 128 | 303, 110, 36 | 312, 117, 39 |
| 96 | 238, 48, 26 | 249, 55, 27 |
| 64 | 66, 30, 17 | 82, 32, 18 |

Below the last of these the stages keep its proportions.

Known differences to the published code. It adds noise to the densities so that no two are equal; here the token with the higher
score counts as the denser of two, and a lone cluster has its best token for a centre. Densities are compared as logarithms,
because their exponentials vanish where hidden states are large. It appends merged tokens behind the chosen ones and renumbers
all (policy `shifted`); here they stand in raster order, by the place of their centres. A text token whose relevance equals the
mean is a scoring query, so that there always is one.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from gap_export import prune
from gap_export.errors import RecipeError
from gap_export.prune import Selected
from gap_export.prune.in_decoder.stages import Cut, Prompt, QueryRows, best, spread
from gap_export.prune.order import take

_PUBLISHED = ((576, 576, 576), (309, 204, 113), (312, 117, 39), (249, 55, 27), (82, 32, 18))
"""What stages 1 to 3 have of 576 visual tokens, merged ones counted, in falling order of the last stage."""
_SCHEDULES = tuple((first / 576, second / 576, last / 576) for first, second, last in _PUBLISHED)
_NEVER = -1e30


def recycled_count(dropped: int) -> int:
    """How many of the dropped tokens are recycled: the better 30 %."""
    return 3 * dropped // 10 + 1


def cluster_count(dropped: int) -> int:
    """How many tokens the recycled ones become."""
    return recycled_count(dropped) // 10 + 1 if dropped else 0


STAGES = 3
USES_NEXT_LAYER_ATTENTION = False


def first_layers(layers: int) -> tuple[int, ...]:
    """Layers before which tokens are dropped, scaled to a decoder of `layers` layers."""
    return spread((layers * 3 / 32, layers * 7 / 32, layers / 2), layers)


def cuts(keep: float, visual_tokens: int, first_layers: tuple[int, ...]) -> tuple[Cut, ...]:
    """What each stage keeps."""
    found: list[Cut] = []
    before = visual_tokens
    for layer, share in zip(first_layers, _shares(keep), strict=True):
        kept = prune.kept_count(share, visual_tokens)
        # One chosen token more is one cluster less or none, so the sum passes through every count from the smallest on.
        chosen = next((n for n in range(kept, 0, -1) if n + cluster_count(before - n) == kept), None)
        if chosen is None:
            raise RecipeError(
                f"leaves {kept} of {before} tokens at layer {layer}: cluster means alone, and no token of the image",
                subject=f"pruner sparsevlm, keep {keep:g}",
                hint="use a larger --keep",
            )
        found.append(Cut(layer, kept, merged=kept - chosen))
        before = kept
    return tuple(found)


def scoring_queries(prompt: Prompt) -> QueryRows:
    """Rows of the prompt whose attention scores the visual tokens: the text after the image that is most like the image."""
    embeds_BSH, visual = prompt.embeds_BSH, prompt.visual_tokens
    length = embeds_BSH.shape[1]
    image_BN = prompt.image_start_B[:, None] + torch.arange(visual)
    # From the last visual token on, so that there are two rows or more: torch specialises graphs to a single one. There are
    # as many too many as there is text before the image, and where a short row is filled up.
    rows_BR = image_BN[:, -1:] + torch.arange(length - visual + 1)
    own_BR = (rows_BR > image_BN[:, -1:]) & (rows_BR <= prompt.last_index_B[:, None])
    rows_BR = rows_BR.clamp(max=length - 1)
    image_BNH, text_BRH = take(embeds_BSH, image_BN).float(), take(embeds_BSH, rows_BR).float()
    alike_BNR = torch.matmul(image_BNH, text_BRH.transpose(1, 2))
    relevance_BR = torch.where(own_BR[:, None], alike_BNR, _NEVER).softmax(dim=-1).mean(dim=1) * own_BR
    mean_B1 = relevance_BR.sum(dim=1, keepdim=True) / own_BR.float().sum(dim=1, keepdim=True).clamp(min=1.0)
    # Equal relevances may lie below their rounded mean.
    threshold_B1 = torch.minimum(mean_B1, relevance_BR.amax(dim=1, keepdim=True))
    decides_BR = (own_BR & (relevance_BR >= threshold_B1)).float()
    return QueryRows(rows_BR, decides_BR / decides_BR.sum(dim=1, keepdim=True).clamp(min=1.0))


def select(scores_BN: Tensor, tokens_BNH: Tensor, *, kept: int, merged: int) -> Selected:
    """Choose K visual tokens by their scores: chosen ones by score, then clusters, the most prominent centre first."""
    if not merged:
        return best(scores_BN, kept)
    chosen = kept - merged
    recycled = recycled_count(tokens_BNH.shape[1] - chosen)
    ranked_BM = scores_BN.topk(chosen + recycled, dim=-1).indices
    chosen_BK, recycled_BR = ranked_BM[:, :chosen], ranked_BM[:, chosen:]
    recycled_BRH = take(tokens_BNH, recycled_BR).float()
    centres_BC, nearest_BR = clusters(recycled_BRH, merged)
    goes_BCR = (nearest_BR[:, None] == torch.arange(merged)[:, None]).float()
    merged_BCH = torch.matmul(goes_BCR / goes_BCR.sum(dim=-1, keepdim=True), recycled_BRH)
    return Selected(
        torch.cat([chosen_BK, recycled_BR.gather(1, centres_BC)], dim=1),
        torch.cat([take(tokens_BNH, chosen_BK), merged_BCH.to(tokens_BNH.dtype)], dim=1),
    )


def clusters(tokens_BRH: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """DPC-kNN with as many neighbours as clusters.

    Centres are the tokens with the highest product of density and distance to the nearest denser token; every other token
    goes to the centre nearest to it.

    Args:
        tokens_BRH: float32, better ones first.
        count: C, of clusters.

    Returns:
        centres_BC int64 places, the most prominent first; nearest_BR int64, the cluster that each token goes to.
    """
    batch, tokens, width = tokens_BRH.shape
    if count == 1:
        return torch.zeros(batch, 1, dtype=torch.int64), torch.zeros(batch, tokens, dtype=torch.int64)
    squared_BRR = _squared_distances(tokens_BRH) / width
    # The density is the exponential of minus this; a token is its own nearest neighbour.
    sparsity_BR = squared_BRR.topk(count, dim=-1, largest=False).values.mean(dim=-1)
    places_R = torch.arange(tokens)
    mine_BR1, others_B1R = sparsity_BR[:, :, None], sparsity_BR[:, None, :]
    denser_BRR = (others_B1R < mine_BR1) | (
        (others_B1R == mine_BR1) & (places_R[None, :] < places_R[:, None])
    )
    farthest_B11 = squared_BRR.amax(dim=(1, 2), keepdim=True)
    to_denser_BR = torch.where(denser_BRR, squared_BRR, farthest_B11).amin(dim=-1)
    prominence_BR = 0.5 * to_denser_BR.clamp(min=1e-30).log() - sparsity_BR
    centres_BC = prominence_BR.topk(count, dim=-1).indices
    to_centres_BRC = squared_BRR.gather(2, centres_BC[:, None].expand(-1, tokens, -1))
    is_centre_BRC = (
        places_R[:, None] == centres_BC[:, None]
    )  # of two equal tokens that are both centres, each is its own
    return centres_BC, torch.where(is_centre_BRC, -1.0, to_centres_BRC).argmin(dim=-1)


def _squared_distances(tokens_BRH: Tensor) -> Tensor:
    """[B, R, R], exactly symmetric and zero on the diagonal, so that mutual neighbours are equally dense on every runtime."""
    centred_BRH = tokens_BRH - tokens_BRH.mean(dim=1, keepdim=True)  # large common parts would cancel badly
    products_BRR = torch.matmul(centred_BRH, centred_BRH.transpose(1, 2))
    norms_BR = (centred_BRH * centred_BRH).sum(dim=-1)
    squared_BRR = (norms_BR[:, :, None] + norms_BR[:, None] - 2.0 * products_BRR).clamp(min=0.0)
    apart_RR = 1.0 - torch.eye(tokens_BRH.shape[1])
    return 0.5 * (squared_BRR + squared_BRR.transpose(1, 2)) * apart_RR


def _shares(keep: float) -> tuple[float, float, float]:
    """Shares of the three stages."""
    for above, below in pairwise(_SCHEDULES):
        if keep >= below[-1]:
            along = math.log(keep / above[-1]) / math.log(below[-1] / above[-1])
            first, second = (
                math.exp((1 - along) * math.log(above[stage]) + along * math.log(below[stage]))
                for stage in (0, 1)
            )
            return first, second, keep
    first, second, last = _SCHEDULES[-1]
    return keep * first / last, keep * second / last, keep
