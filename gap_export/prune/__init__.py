"""Visual-token pruners: their one contract. Which there are stands in `table.py`, what each cannot do in `compatibility.py`.

A pruner chooses which K of N visual tokens enter the decoder. It is a module with a function `select`, tensor code that is traced
into the vision graph, and gives raster indices best first; putting them into order (or not) is the position policy's business,
done in one place for all (`order.py`). Every choice is made per image, never over the batch.

Shape letters: B batch, A attention heads, N visual tokens, K kept, T = 1 + N, D head width, E tower width, H decoder width,
P width of the space that a CLIP tower shares with its text tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from gap_export.positions import MergedId
from gap_export.prune.compatibility import (
    check_adaptive,
    check_count,
    check_fraction,
    check_text,
    check_tower,
    kept_count,
    share_of,
)
from gap_export.prune.table import PRUNERS, Pruner, merging, names, needs, register, row, where

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "PRUNERS",
    "AdaptiveModule",
    "Pruner",
    "PrunerModule",
    "Selected",
    "VisionFeatures",
    "check_adaptive",
    "check_count",
    "check_fraction",
    "check_text",
    "check_tower",
    "class_attention",
    "kept_count",
    "load",
    "load_adaptive",
    "merging",
    "names",
    "needs",
    "register",
    "row",
    "share_of",
    "where",
]


@dataclass(frozen=True)
class VisionFeatures:
    """What a vision tower shows a pruner. A family fills in what it has; what no pruner reads vanishes from the graph.

    The feature layer is the one whose output the decoder gets; the following layer is the next one up, which the decoder
    never sees.

    Attributes:
        patches_BNE: features of the patches, before the projector, class token dropped.
        grid: (rows, columns) with rows * columns = N; None where images differ in how many patches they have.
        class_query_BAD: the class token's query in the feature layer; None without a class token.
        keys_BATD: keys of the same layer, class token first; None without a class token.
        class_token_BE: output of the feature layer at the class token.
        following_query_BE: the class token's query in the following layer, full width, heads not split.
        following_keys_BTE: keys of the following layer, the same way, class token first.
        projected_BNH: the patches after the projector.
        aligned_BNP: the patches in the space shared with text: CLIP's `visual_projection(post_layernorm(patches))`, not
            normalised; None without a text tower.
        text_BP: the expression in that space: CLIP's `text_embeds` before normalisation; None without a text tower.
        tile_N: int64, which tile saw each patch; None where one saw all.
        aligned_inversely: whether a patch is *less* similar to the text that describes it than other patches are. So it is
            in OpenAI's CLIP, which was trained on whole images (CLIP Surgery, arXiv 2304.05653).
    """

    patches_BNE: Tensor
    grid: tuple[int, int] | None
    class_query_BAD: Tensor | None = None
    keys_BATD: Tensor | None = None
    class_token_BE: Tensor | None = None
    following_query_BE: Tensor | None = None
    following_keys_BTE: Tensor | None = None
    projected_BNH: Tensor | None = None
    aligned_BNP: Tensor | None = None
    text_BP: Tensor | None = None
    tile_N: Tensor | None = None
    aligned_inversely: bool = True

    @property
    def visual_tokens(self) -> int:
        """N. A plain number, or symbolic while a graph is traced in which images differ."""
        return self.patches_BNE.shape[1] if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def class_attention_BN(self) -> Tensor | None:
        """float32 attention of the class token to every patch in the feature layer, mean over heads.

        Softmax over class token and patches, class column dropped without renormalising.
        """
        if self.class_query_BAD is None or self.keys_BATD is None:
            return None
        return class_attention(self.class_query_BAD, self.keys_BATD)

    @property
    def mean_keys_BND(self) -> Tensor | None:
        """float32 keys of the patches in the feature layer, mean over heads."""
        return None if self.keys_BATD is None else self.keys_BATD[:, :, 1:].float().mean(dim=1)

    @property
    def following_attention_BN(self) -> Tensor | None:
        """The same as `class_attention_BN` in the following layer, heads not split (PruMerge, arXiv 2403.15388)."""
        if self.following_query_BE is None or self.following_keys_BTE is None:
            return None
        return class_attention(self.following_query_BE[:, None], self.following_keys_BTE[:, None])

    @property
    def following_patch_keys_BNE(self) -> Tensor | None:
        """float32 keys of the patches in the following layer, full width."""
        return None if self.following_keys_BTE is None else self.following_keys_BTE[:, 1:].float()


def class_attention(query_BAD: Tensor, keys_BATD: Tensor) -> Tensor:
    """One row of an attention map, and no other: the class token's, without its own column, mean over heads.

    Args:
        query_BAD: of the class token.
        keys_BATD: class token first.

    Returns:
        [B, N] float32.
    """
    scale = query_BAD.shape[-1] ** -0.5
    logits_BAT = (keys_BATD.float() @ query_BAD.float()[..., None])[..., 0] * scale
    scores_BN: Tensor = logits_BAT.softmax(dim=-1).mean(dim=1)[:, 1:]
    return scores_BN


@dataclass(frozen=True)
class Selected:
    """What a pruner chose.

    Attributes:
        indices_BK: raster indices, int64, best first. Distinct within a row, except that tokens without an index of their
            own (`Pruner.merged`) may share that of another.
        patches_BKE: features of the chosen tokens in the same order, before the projector, where they are not simply the
            patches at the indices.
        counts_B: int64, how many tokens each image needs, where the pruner adapts to the image. Up to that many (at most
            K) stand first in a row; the indices after them are `positions.PAD`, their features arbitrary but finite. A count
            above K says that the bound was too low for that image.
    """

    indices_BK: Tensor
    patches_BKE: Tensor | None = None
    counts_B: Tensor | None = None


class PrunerModule(Protocol):
    """A pruner that works before the decoder: what its module has."""

    def select(self, features: VisionFeatures, kept: int, *, seed: int, merged_id: MergedId) -> Selected:
        """Choose.

        Args:
            features: of the batch.
            kept: K, all tokens that enter the decoder, merged ones included. A plain number, or symbolic while a graph is
                traced in which K is an input.
            seed: for pruners that draw at random.
            merged_id: which index tokens get that were merged from many.

        Raises:
            ValueError: the features lack something that the pruner reads.
        """
        ...


class AdaptiveModule(PrunerModule, Protocol):
    """A pruner that can also find the count by itself, image by image: what its module has."""

    def select_adaptive(self, features: VisionFeatures, bound: int, *, merged_id: MergedId) -> Selected:
        """Choose as many tokens as the rule of the original asks for.

        Args:
            features: of the batch; every image is judged by itself.
            bound: K, the most tokens that an image may keep.
            merged_id: see `PrunerModule.select`.

        Returns:
            Selected with `counts_B`.
        """
        ...


def load(name: str) -> PrunerModule:
    """The module of the pruner of that name, which works before the decoder.

    Raises:
        RecipeError: unknown name, with the nearest known one.
    """
    return cast(PrunerModule, row(name).load())


def load_adaptive(name: str) -> AdaptiveModule:
    """The module of the pruner of that name, to find the count by itself.

    Raises:
        RecipeError: unknown name, or a pruner that takes a count.
    """
    check_adaptive(row(name))
    return cast(AdaptiveModule, row(name).load())
