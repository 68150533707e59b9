"""Pruners that drop visual tokens inside the decoder, between the layers of the prefill: what the module of one has.

When they do, and how many tokens, stands in `schedules.py`. Before the first layer of each later stage some tokens are dropped, by the
attention that some rows of the prompt (its *scoring queries*) pay to the images, of each image as many as its count says. The text is
never touched. Counts differ between the images and rows of a batch: what is too much for one is masked.

Shape letters: B batch, S tokens of the stage that ends, K of the one that begins, I images of a prompt, M visual tokens that are looked
at, R scoring queries, H decoder width and query heads, G key heads, A query heads per key head, D head width, C slots of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from gap_export import prune
from gap_export.prune.order import take


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts as they enter the decoder.

    Attributes:
        embeds_BSH: embeddings of text and images, short rows padded at the end.
        is_image_BS: which slots hold visual tokens.
        images_end_B: int64, the slot behind the last image.
        last_index_B: int64, slot of the last real token.
        most_text: tokens that may follow the last image, the last visual token counted as one, or more than that; may be symbolic.
    """

    embeds_BSH: Tensor
    is_image_BS: Tensor
    images_end_B: Tensor
    last_index_B: Tensor
    most_text: int


@dataclass(frozen=True)
class QueryRows:
    """The rows of the prompt whose attention decides.

    Attributes:
        rows_BR: int64, their slots in stage 0. They come after the images, or are the last visual token.
        weights_BR: float32, their shares, which sum to one; zero for rows that only fill up.
    """

    rows_BR: Tensor
    weights_BR: Tensor


@dataclass(frozen=True)
class Image:
    """One image of every row, as a cut sees it.

    Attributes:
        is_mine_BS: which slots hold its tokens.
        before_B: int64, how many those are.
        kept_B: int64, how many of them the stage that begins has, merged ones included; at least one.
        most_kept: not exceeded by any of these; symbolic while a graph is traced.
        most_before: not exceeded by any of `before_B`; symbolic too.
    """

    is_mine_BS: Tensor
    before_B: Tensor
    kept_B: Tensor
    most_kept: int
    most_before: int


@dataclass(frozen=True)
class Merging:
    """Tokens that stand for several.

    Attributes:
        slots_BC: int64, where they stand; S for none.
        members_BM: int64, slots of the tokens that go into them.
        shares_BCM: float32, how much of every member goes into each, rows summing to one.
    """

    slots_BC: Tensor
    members_BM: Tensor
    shares_BCM: Tensor

    def of(self, features_BSH: Tensor) -> Tensor:
        """[B, S, H] in which these tokens are the means that they stand for; works for anything that belongs to a token."""
        means_BCH = torch.matmul(self.shares_BCM, take(features_BSH, self.members_BM).float())
        with_spare_BSH = torch.cat([features_BSH, features_BSH[:, :1]], dim=1)
        index_BCH = self.slots_BC[:, :, None].expand(-1, -1, features_BSH.shape[2])
        return with_spare_BSH.scatter(1, index_BCH, means_BCH.to(features_BSH.dtype))[:, :-1]


@dataclass(frozen=True)
class Kept:
    """What is kept of one image of every row.

    Attributes:
        ranks_BS: int64, the place of every kept token, best first and merged ones last; at least `kept_B` for what is dropped, and for what is
            no token of the image.
        merging: where some were merged.
    """

    ranks_BS: Tensor
    merging: Merging | None = None


class DecoderModule(Protocol):
    """A pruner that works inside the decoder: what its module has.

    Attributes:
        USES_NEXT_LAYER_ATTENTION: whether it goes by the attention of the layer that comes next, on what is about to enter it, and not by
            that of the layer that just ran.
    """

    USES_NEXT_LAYER_ATTENTION: bool

    def scoring_queries(self, prompt: Prompt) -> QueryRows:
        """Who decides; asked once, before layer 0."""
        ...

    def select(self, scores_BS: Tensor, hidden_BSH: Tensor, image: Image) -> Kept:
        """Choose among the tokens of one image.

        Args:
            scores_BS: float32, attention paid to every token by the scoring queries, mean over heads.
            hidden_BSH: hidden states.
            image: which tokens, and how many of them are kept.
        """
        ...


def load(name: str) -> DecoderModule:
    """The module of the pruner of that name, which drops tokens inside the decoder."""
    return cast(DecoderModule, prune.row(name).load())


def last_token(prompt: Prompt) -> QueryRows:
    """The last token of the prompt decides alone."""
    rows_B1 = prompt.last_index_B[:, None]
    return QueryRows(rows_B1, torch.ones_like(rows_B1, dtype=torch.float32))


def best_first(scores_BS: Tensor, image: Image, count: int) -> Tensor:
    """[B, count] int64: slots of an image's tokens, by falling scores, then slots of others."""
    return torch.where(image.is_mine_BS, scores_BS, -1.0).topk(count, dim=-1).indices


def ranked(slots_BM: Tensor, kept_B: Tensor, like_BS: Tensor) -> Tensor:
    """[B, S] int64 ranks as `Kept` has them.

    Args:
        slots_BM: int64 slots, best first; those from `kept_B` on do not count.
        kept_B: int64.
        like_BS: any tensor of that shape.
    """
    places_M = torch.arange(slots_BM.shape[1])
    never_BS = torch.zeros_like(like_BS, dtype=torch.int64) + kept_B[:, None]
    return never_BS.scatter(1, slots_BM, torch.minimum(places_M[None], kept_B[:, None]))


def best(scores_BS: Tensor, image: Image) -> Kept:
    """The tokens with the highest scores."""
    return Kept(ranked(best_first(scores_BS, image, image.most_kept), image.kept_B, scores_BS))


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
