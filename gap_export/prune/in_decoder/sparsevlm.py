"""SparseVLM: three cuts by the attention of the relevant text tokens; the best of what is dropped lives on as cluster means.

Source: SparseVLM (arXiv 2410.04417), version 1.5 of its published code.

- Scoring queries: of the text after the last image, the tokens whose relevance is above the mean. Relevance: softmax over that text of
  the dot products of image and text embeddings, mean over the images, before layer 0.
- Where no text follows, the last visual token decides.
- Score of a visual token: attention of these to it in the layer that just ran, mean over heads and queries.
- Of r dropped tokens the best int(0.3 r) + 1 are recycled: clustered into a tenth as many (rounded down, plus one) by DPC-kNN
  (density peaks; Du et al. 2016) on their hidden states, each cluster becoming its mean. A merged token stands where the
  centre of its cluster stood, and is a visual token like any other at the next cut.

Known differences to the published code. It adds noise to the densities so that no two are equal; here the token with the higher
score counts as the denser of two, and a lone cluster has its best token for a centre. Densities are compared as logarithms,
because their exponentials vanish where hidden states are large. It appends merged tokens behind the chosen ones and renumbers
all (policy `shifted`); here they stand in raster order, by the place of their centres. A text token whose relevance equals the
mean is a scoring query, so that there always is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gap_export.prune.in_decoder.stages import (
    Image,
    Kept,
    Merging,
    Prompt,
    QueryRows,
    best_first,
    ranked,
)
from gap_export.prune.order import take

USES_NEXT_LAYER_ATTENTION = False

_NEVER = -1e30
_FAR = 1e30


def scoring_queries(prompt: Prompt) -> QueryRows:
    """Rows of the prompt whose attention scores the visual tokens: the text after the images that is most like them."""
    embeds_BSH, end_B1 = prompt.embeds_BSH, prompt.images_end_B[:, None]
    # From the last visual token on, so that there are two rows or more: torch specialises graphs to a single one.
    rows_BR = end_B1 - 1 + torch.arange(prompt.most_text)
    last_B1 = prompt.last_index_B[:, None]
    own_BR = (rows_BR >= torch.minimum(end_B1, last_B1)) & (rows_BR <= last_B1)
    rows_BR = torch.minimum(rows_BR, last_B1)  # (a later stage has no row behind its last token)
    text_BRH = take(embeds_BSH, rows_BR).float()
    alike_BSR = torch.matmul(embeds_BSH.float(), text_BRH.transpose(1, 2))
    shares_BSR = torch.where(own_BR[:, None], alike_BSR, _NEVER).softmax(dim=-1)
    visual_BS1 = prompt.is_image_BS.float()[:, :, None]
    relevance_BR = (shares_BSR * visual_BS1).sum(dim=1) / visual_BS1.sum(dim=1) * own_BR
    mean_B1 = relevance_BR.sum(dim=1, keepdim=True) / own_BR.float().sum(dim=1, keepdim=True).clamp(min=1.0)
    # Equal relevances may lie below their rounded mean.
    threshold_B1 = torch.minimum(mean_B1, relevance_BR.amax(dim=1, keepdim=True))
    decides_BR = (own_BR & (relevance_BR >= threshold_B1)).float()
    return QueryRows(rows_BR, decides_BR / decides_BR.sum(dim=1, keepdim=True).clamp(min=1.0))


def select(scores_BS: Tensor, hidden_BSH: Tensor, image: Image) -> Kept:
    """Choose visual tokens by their scores: chosen ones by score, then clusters, the most prominent centre first."""
    merged_B = merged_counts(image.before_B, image.kept_B)
    chosen_B = image.kept_B - merged_B
    recycled_B = torch.where(merged_B > 0, _recycled(image.before_B - chosen_B), 0)
    most_recycled, most_merged = _at_most(image.most_before)
    slots_BM = best_first(scores_BS, image, image.most_before)
    places_BR = chosen_B[:, None] + torch.arange(most_recycled)
    members_BR = slots_BM.gather(1, places_BR.clamp(max=image.most_before - 1))
    centres_BC, nearest_BR = clusters(take(hidden_BSH, members_BR).float(), recycled_B, merged_B, most_merged)
    own_BR = torch.arange(most_recycled) < recycled_B[:, None]
    goes_BCR = ((nearest_BR[:, None] == torch.arange(centres_BC.shape[1])[:, None]) & own_BR[:, None]).float()
    is_cluster_BC = torch.arange(centres_BC.shape[1]) < merged_B[:, None]
    merging = Merging(
        torch.where(is_cluster_BC, members_BR.gather(1, centres_BC), scores_BS.shape[1]),
        members_BR,
        goes_BCR / goes_BCR.sum(dim=-1, keepdim=True).clamp(min=1.0),
    )
    chosen_BS = ranked(slots_BM, chosen_B, scores_BS)
    ranks_BS = torch.where(chosen_BS < chosen_B[:, None], chosen_BS, image.kept_B[:, None])
    with_spare_BS = torch.cat([ranks_BS, ranks_BS[:, :1]], dim=1)
    of_clusters_BC = chosen_B[:, None] + torch.arange(centres_BC.shape[1])
    return Kept(with_spare_BS.scatter(1, merging.slots_BC, of_clusters_BC)[:, :-1], merging)


def merged_counts(before_B: Tensor, kept_B: Tensor) -> Tensor:
    """[B] int64: how many of the kept tokens are merged (`Schedule.merged`): the smallest m that fits.

    Where the image has d tokens less afterwards, d + m were dropped, and those become (3 (d + m) + 10) // 100 + 1. A loop towards m would be
    the simpler arithmetic, but TensorRT-RTX 1.7 walks through such counts in time exponential in their rounds.
    """
    less_B = before_B - kept_B
    return torch.where(less_B > 0, torch.div(3 * less_B + 10, 97, rounding_mode="trunc") + 1, 0)


def _at_most(tokens: int) -> tuple[int, int]:
    """How many of so many tokens are recycled, and into how many clusters; two or more, as torch specialises graphs to a single one."""
    recycled = 3 * tokens // 10 + 2
    return recycled, recycled // 10 + 2


def _recycled(dropped_B: Tensor) -> Tensor:
    return torch.div(3 * dropped_B, 10, rounding_mode="trunc") + 1


def clusters(tokens_BRH: Tensor, tokens_B: Tensor, count_B: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """DPC-kNN with as many neighbours as clusters.

    Centres are the tokens with the highest product of density and distance to the nearest denser token; every other token
    goes to the centre nearest to it.

    Args:
        tokens_BRH: float32, better ones first.
        tokens_B: int64, how many of them count.
        count_B: int64, of clusters.
        most: C, not exceeded by these, and at most R.

    Returns:
        centres_BC int64 places, the most prominent first, those from `count_B` on arbitrary; nearest_BR int64, the cluster that each token goes
        to.
    """
    tokens, width = tokens_BRH.shape[1:]
    places_R = torch.arange(tokens)
    own_BR = places_R < tokens_B[:, None]
    squared_BRR = _squared_distances(tokens_BRH, own_BR) / width
    # The density is the exponential of minus this; a token is its own nearest neighbour.
    is_cluster_BC = torch.arange(most) < count_B[:, None]
    # (Whole sorts, of which the beginning is taken: the exporter does not follow that a quotient is no larger than its dividend.)
    first_C = torch.arange(most)
    sorted_BRR = squared_BRR.sort(dim=-1).values
    nearest_BRC = sorted_BRR.gather(2, first_C.expand(*sorted_BRR.shape[:2], -1))
    sparsity_BR = torch.where(is_cluster_BC[:, None], nearest_BRC, 0.0).sum(dim=-1)
    sparsity_BR = sparsity_BR / count_B.float().clamp(min=1.0)[:, None]
    mine_BR1, others_B1R = sparsity_BR[:, :, None], sparsity_BR[:, None, :]
    denser_BRR = (others_B1R < mine_BR1) | (
        (others_B1R == mine_BR1) & (places_R[None, :] < places_R[:, None])
    )
    pairs_BRR = own_BR[:, :, None] & own_BR[:, None, :]
    farthest_B11 = torch.where(pairs_BRR, squared_BRR, 0.0).amax(dim=(1, 2), keepdim=True)
    to_denser_BR = torch.where(denser_BRR & pairs_BRR, squared_BRR, farthest_B11).amin(dim=-1)
    prominence_BR = 0.5 * to_denser_BR.clamp(min=1e-30).log() - sparsity_BR
    ranked_BR = torch.where(own_BR, prominence_BR, _NEVER).sort(dim=-1, descending=True).indices
    centres_BC = ranked_BR.gather(1, first_C.expand(ranked_BR.shape[0], -1))
    # A lone cluster has the best token for a centre.
    centres_BC = torch.where(count_B[:, None] > 1, centres_BC, first_C)
    to_centres_BRC = squared_BRR.gather(2, centres_BC[:, None].expand(-1, tokens, -1))
    is_centre_BRC = (
        places_R[:, None] == centres_BC[:, None]
    )  # of two equal tokens that are both centres, each is its own
    to_centres_BRC = torch.where(is_centre_BRC, -1.0, to_centres_BRC)
    return centres_BC, torch.where(is_cluster_BC[:, None], to_centres_BRC, 2 * _FAR).argmin(dim=-1)


def _squared_distances(tokens_BRH: Tensor, own_BR: Tensor) -> Tensor:
    """[B, R, R], exactly symmetric and zero on the diagonal, so that mutual neighbours are equally dense on every runtime; far where one of two
    tokens does not count."""
    own_BR1 = own_BR.float()[:, :, None]
    mean_B1H = (tokens_BRH * own_BR1).sum(dim=1, keepdim=True) / own_BR1.sum(dim=1, keepdim=True).clamp(
        min=1.0
    )
    centred_BRH = tokens_BRH - mean_B1H  # large common parts would cancel badly
    products_BRR = torch.matmul(centred_BRH, centred_BRH.transpose(1, 2))
    norms_BR = (centred_BRH * centred_BRH).sum(dim=-1)
    squared_BRR = (norms_BR[:, :, None] + norms_BR[:, None] - 2.0 * products_BRR).clamp(min=0.0)
    apart_RR = 1.0 - torch.eye(tokens_BRH.shape[1])
    squared_BRR = 0.5 * (squared_BRR + squared_BRR.transpose(1, 2)) * apart_RR
    return torch.where(own_BR[:, :, None] & own_BR[:, None, :], squared_BRR, _FAR)
