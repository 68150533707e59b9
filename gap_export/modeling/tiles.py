"""Images of many tiles in the vision graph: one image per call, whose tiles the tower takes as a batch.

A pruner looks at the image as a whole. Its visual tokens are gathered from the tiles that saw them, in the order of the
unpruned prompt; attention of a class token is that of the token's own tile. Which tokens of the tiles are tokens of the image,
and where they stand in the prompt, comes with the pixels (`inputs/tiles.py`).

Ends of lines are no features: they are never pruned and come between the kept tokens at the end.

Shape letters: as in `prune/__init__.py`; t tiles, C tokens of a tile, P visual tokens that may be pruned (the N of pruners), R ends of
lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gap_export import prune
from gap_export.modeling import selection
from gap_export.plan import Plan
from gap_export.positions import PAD, PositionPolicy
from gap_export.prune import order

Gather = Callable[[Tensor], Tensor]
"""[t, C, E] -> [1, P, E]."""


def token_gather(token_index_P: Tensor) -> Gather:
    """Tokens by their index in the flattened tiles."""
    return lambda tokens_tCE: tokens_tCE.flatten(0, 1).index_select(0, token_index_P)[None]


def corners_gather(corners_P4: Tensor, weights_P4: Tensor) -> Gather:
    """Tokens as weighted sums of four: a grid that was scaled down."""

    def gather(tokens_tCE: Tensor) -> Tensor:
        flat_E = tokens_tCE.flatten(0, 1)
        terms = [flat_E.index_select(0, corners_P4[:, n]).float() * weights_P4[:, n, None] for n in range(4)]
        return (terms[0] + terms[1] + terms[2] + terms[3]).to(tokens_tCE.dtype)[None]

    return gather


def heaviest_corner_gather(corners_P4: Tensor, weights_P4: Tensor) -> Gather:
    """Of the four tokens that a scaled-down one is the sum of, the one that counts most; of equal ones the first."""
    return token_gather(corners_P4.gather(1, weights_P4.argmax(dim=1, keepdim=True)).flatten())


def features_of_image(
    tiles: prune.VisionFeatures[Tensor],
    gather: Gather,
    whole: int,
    *,
    grids: tuple[prune.Grid, ...],
    pick: Gather | None = None,
) -> prune.VisionFeatures[Tensor]:
    """Features of one image from those of its tiles: scores and keys of a patch are those of its own tile.

    Args:
        tiles: as a batch.
        gather: picks the image's tokens, or adds them up.
        whole: index of the tile that shows the whole image; its class token is the image's.
        grids: those that the image's tokens lie on.
        pick: picks a tile for each of them, where `gather` adds up.
    """

    def gathered(tokens_tCE: Tensor | None) -> Tensor | None:
        return None if tokens_tCE is None else gather(tokens_tCE)

    def scores(scores_tC: Tensor | None) -> Tensor | None:
        return None if scores_tC is None else gather(scores_tC[..., None])[..., 0]

    class_token_tE, patches_tCE = tiles.class_token, tiles.patches
    numbers_tC1 = torch.arange(patches_tCE.shape[0])[:, None, None].expand(-1, patches_tCE.shape[1], -1)
    return prune.VisionFeatures(
        patches=gather(patches_tCE),
        grid=None,
        grids=grids,
        attention=lambda: scores(tiles.attention),
        class_token=None if class_token_tE is None else class_token_tE[whole][None],
        mean_keys=lambda: gathered(tiles.mean_keys),
        full_width_attention=lambda: scores(tiles.full_width_attention),
        full_width_keys=lambda: gathered(tiles.full_width_keys),
        projected=gathered(tiles.projected),
        embeds=lambda: gathered(tiles.embeds),
        aligned=gathered(tiles.aligned),
        text=tiles.text,
        tile=(pick or gather)(numbers_tC1).flatten(),
        aligned_inversely=tiles.aligned_inversely,
    )


def lined_grids(token_positions_P: Tensor, newlines_R: Tensor, tokens_of_tile: int) -> tuple[prune.Grid, ...]:
    """The grids of an image whose whole comes first, and whose tiles together are one grid with an end to every line.

    Args:
        token_positions_P: places of all P tokens in the unpruned prompt.
        newlines_R: places of the ends of lines.
        tokens_of_tile: C.
    """
    side, lines = math.isqrt(tokens_of_tile), newlines_R.shape[0]
    columns = (token_positions_P.shape[0] - side * side) // lines
    return prune.Grid(side, side), prune.Grid(lines, columns)


def with_newlines(
    plan: Plan,
    embeds_BKH: Tensor,
    selected: prune.Selected,
    places_P: Tensor,
    newline_H: Tensor,
    newlines_R: Tensor,
) -> tuple[Tensor, ...]:
    """Kept tokens and ends of lines in the order in which they enter the decoder.

    Sorted by place, or, under the policy that keeps the order of scores, ends of lines last.

    Args:
        plan: of the build.
        embeds_BKH: kept tokens of one image.
        selected: the kept tokens among the P.
        places_P: places of all P tokens in the unpruned prompt.
        newline_H: embedding of the end of a line.
        newlines_R: places of the ends of lines.

    Returns:
        visual_embeds [1, K + R, H], kept_indices [1, K + R] int64, and kept_counts [1] int64 where the pruner finds it.
    """
    ends_BRH = newline_H.to(embeds_BKH.dtype).expand(1, newlines_R.shape[0], -1)
    places_BK = places_P.index_select(0, selected.indices_BK.flatten().clamp(min=0))[None]
    if selected.counts_B is not None:
        places_BK = torch.where(selected.indices_BK < 0, PAD, places_BK)
    both = prune.Selected(
        torch.cat([places_BK, newlines_R[None]], dim=1),
        torch.cat([embeds_BKH, ends_BRH], dim=1),
        None if selected.counts_B is None else selected.counts_B + newlines_R.shape[0],
    )
    # What is pruned later enters in raster order, whatever the policy does with it then.
    policy = PositionPolicy.GAP if plan.pruning.stages else plan.pruning.positions
    ordered = order.in_decoder_order(both, policy)
    assert ordered.patches_BKE is not None
    return selection.outputs(ordered.patches_BKE, ordered)
