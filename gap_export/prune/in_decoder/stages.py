"""Pruners that drop visual tokens inside the decoder, between the layers of the prefill: their contract and their schedules.

Such a pruner cuts the decoder into stages. Stage 0 has all N visual tokens; before the first layer of each later stage some
are dropped, by the attention that some rows of the prompt (its *scoring queries*) pay to the image. The text is never touched.

`keep` is the share of visual tokens left after the last cut. Papers about these pruners compare by the mean over the
decoder's layers instead, which is larger: `Pruning.mean_kept` tells it.

Shape letters: B batch, S tokens of the stage that ends, N its visual tokens, K visual tokens of the stage that begins,
R scoring queries, H decoder width and query heads, G key heads, A query heads per key head, D head width, C slots of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor

from gap_export import prune
from gap_export.errors import RecipeError
from gap_export.prune import Selected


@dataclass(frozen=True)
class Cut:
    """Where a stage begins and what it has.

    Attributes:
        first_layer: its first layer.
        kept: K, merged tokens included.
        merged: how many of those are merged from several dropped ones.
    """

    first_layer: int
    kept: int
    merged: int = 0


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts as they enter the decoder.

    Attributes:
        embeds_BSH: embeddings of text and image, short rows padded at the end.
        image_start_B: int64, text tokens before the image.
        last_index_B: int64, row of the last real token.
        visual_tokens: how many the image has.
    """

    embeds_BSH: Tensor
    image_start_B: Tensor
    last_index_B: Tensor
    visual_tokens: int


@dataclass(frozen=True)
class QueryRows:
    """The rows of the prompt whose attention decides.

    Attributes:
        rows_BR: int64, their slots in stage 0. They come after the image, or are its last token.
        weights_BR: float32, their shares, which sum to one; zero for rows that only fill up.
    """

    rows_BR: Tensor
    weights_BR: Tensor


class DecoderModule(Protocol):
    """A pruner that works inside the decoder: what its module has.

    Attributes:
        STAGES: how many stages it begins, the first not counted.
        USES_NEXT_LAYER_ATTENTION: whether it goes by the attention of the layer that comes next, on what is about to enter it, and not by
            that of the layer that just ran.
    """

    STAGES: int
    USES_NEXT_LAYER_ATTENTION: bool

    def first_layers(self, layers: int) -> tuple[int, ...]:
        """The layers before which the original drops tokens, scaled to a decoder of `layers` layers."""
        ...

    def cuts(self, keep: float, visual_tokens: int, first_layers: tuple[int, ...]) -> tuple[Cut, ...]:
        """What each stage has.

        Raises:
            RecipeError: a share of which some stage has nothing left.
        """
        ...

    def scoring_queries(self, prompt: Prompt) -> QueryRows:
        """Who decides; asked once, before layer 0."""
        ...

    def select(self, scores_BN: Tensor, tokens_BNH: Tensor, *, kept: int, merged: int) -> Selected:
        """Choose.

        Args:
            scores_BN: float32, attention paid to every visual token by the scoring queries, mean over heads.
            tokens_BNH: hidden states of the visual tokens.
            kept: K.
            merged: how many of them to merge from several.

        Returns:
            Distinct places in 0..N-1, best first and merged ones last. With features only where some were merged.
        """
        ...


def load(name: str) -> DecoderModule:
    """The module of the pruner of that name, which drops tokens inside the decoder."""
    return cast(DecoderModule, prune.row(name).load())


def cuts_for(
    name: str, keep: float, *, visual_tokens: int, layers: int, prune_layers: tuple[int, ...] = ()
) -> tuple[Cut, ...]:
    """The schedule of a pruner; nothing for those that prune before the decoder.

    Args:
        name: of the pruner.
        keep: share of visual tokens left after the last cut.
        visual_tokens: N before the first one.
        layers: of the decoder.
        prune_layers: layers to cut before; empty for the pruner's own.

    Raises:
        RecipeError: layers that the decoder does not have or that are out of order, too few layers, or too little left.
    """
    if not prune.row(name).in_decoder:
        if prune_layers:
            raise RecipeError(
                "drops no tokens inside the decoder, so there is no layer to choose",
                subject=f"pruner {name}",
                hint=f"leave out --prune-layers, or use {', '.join(prune.names(in_decoder=True))}",
            )
        return ()
    pruner = load(name)
    if layers <= pruner.STAGES:
        raise RecipeError(
            f"needs a decoder of more than {pruner.STAGES} layers, this one has {layers}",
            subject=f"pruner {name}",
            hint="use another pruner",
        )
    first_layers = prune_layers or pruner.first_layers(layers)
    ascending = all(one < other for one, other in pairwise((0, *first_layers, layers)))
    if not ascending or len(first_layers) != pruner.STAGES:
        count = "one layer" if pruner.STAGES == 1 else f"{pruner.STAGES} layers in ascending order"
        raise RecipeError(
            f"takes {count} from 1 to {layers - 1}",
            subject=f"pruner {name}, prune_layers {', '.join(map(str, first_layers))}",
            hint="leave prune_layers out for the pruner's own: "
            + ", ".join(map(str, pruner.first_layers(layers))),
        )
    return pruner.cuts(keep, visual_tokens, first_layers)


def spread(wanted: tuple[float, ...], layers: int) -> tuple[int, ...]:
    """Layers nearest to the wanted ones (halves up) that are distinct, ascending, and from 1 to `layers` - 1."""
    chosen: list[int] = []
    for place, layer in enumerate(wanted):
        lowest = chosen[-1] + 1 if chosen else 1
        highest = layers - (len(wanted) - place)
        chosen.append(min(max(int(layer + 0.5), lowest), highest))
    return tuple(chosen)


def last_token(prompt: Prompt) -> QueryRows:
    """The last token of the prompt decides alone."""
    rows_B1 = prompt.last_index_B[:, None]
    return QueryRows(rows_B1, torch.ones_like(rows_B1, dtype=torch.float32))


def best(scores_BN: Tensor, kept: int) -> Selected:
    """The tokens with the highest scores."""
    return Selected(scores_BN.topk(kept, dim=-1).indices)


def attention_paid(query_BHRD: Tensor, key_BGCD: Tensor, rows_BR: Tensor, scale: float) -> Tensor:
    """How some rows distribute their attention.

    Args:
        query_BHRD: rotated queries of the rows; H is a multiple of G.
        key_BGCD: rotated keys, by slot.
        rows_BR: int64, the slots of the rows; each sees the slots up to its own.
        scale: of the products.

    Returns:
        [B, R, C] float32, mean over heads, each row summing to one.
    """
    heads, key_heads, slots = query_BHRD.shape[1], key_BGCD.shape[1], key_BGCD.shape[2]
    query_BGARD = query_BHRD.float().unflatten(1, (key_heads, heads // key_heads))
    logits_BGARC = torch.matmul(query_BGARD, key_BGCD.float().transpose(2, 3)[:, :, None]) * scale
    seen_BRC = torch.arange(slots) <= rows_BR[:, :, None]
    paid_BGARC = torch.where(seen_BRC[:, None, None], logits_BGARC, -torch.inf).softmax(dim=-1)
    return paid_BGARC.mean(dim=(1, 2))
