"""Visual-token pruners: their one contract. Which there are stands in `table.py`, what each cannot do in `compatibility.py`.

A pruner chooses which K of N visual tokens enter the decoder. It is a module with a function `select`, tensor code that is traced
into the vision graph, and gives raster indices best first; putting them into order (or not) is the position policy's business,
done in one place for all (`order.py`). Every choice is made per image, never over the batch.

Shape letters: B batch, N visual tokens, K kept, E tower width; others as in `features.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from gap_export.positions import MergedId
from gap_export.prune.compatibility import (
    NEEDED,
    check_adaptive,
    check_count,
    check_fraction,
    check_text,
    check_tower,
    kept_count,
    share_of,
    working,
)
from gap_export.prune.features import (
    Grid,
    VisionFeatures,
    changed,
    class_attention,
    mean_keys,
    received_attention,
)
from gap_export.prune.table import PRUNERS, Pruner, merging, names, needs, register, row, where

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "NEEDED",
    "PRUNERS",
    "AdaptiveModule",
    "Grid",
    "Pruner",
    "PrunerModule",
    "Selected",
    "VisionFeatures",
    "changed",
    "check_adaptive",
    "check_count",
    "check_fraction",
    "check_text",
    "check_tower",
    "class_attention",
    "kept_count",
    "load",
    "load_adaptive",
    "mean_keys",
    "merging",
    "names",
    "needs",
    "received_attention",
    "register",
    "row",
    "share_of",
    "where",
    "working",
]


@dataclass(frozen=True)
class Selected:
    """What a pruner chose.

    Attributes:
        indices_BK: raster indices, int64, best first. Distinct within a row, except that tokens without an index of their
            own (`Pruner.merged`) may share that of another.
        patches_BKE: features of the chosen tokens in the same order, where they are not simply the patches at the indices: before
            the projector, or, where features have `embeds`, as they enter the decoder.
        counts_B: int64, how many tokens each image needs, where the pruner adapts to the image. Up to that many (at most
            K) stand first in a row; the indices after them are `positions.PAD`, their features arbitrary but finite. A count
            above K says that the bound was too low for that image.
    """

    indices_BK: Tensor
    patches_BKE: Tensor | None = None
    counts_B: Tensor | None = None


class PrunerModule(Protocol):
    """A pruner that works before the decoder: what its module has."""

    def select(
        self, features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId
    ) -> Selected:
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

    def select_adaptive(
        self, features: VisionFeatures[Tensor], bound: int, *, merged_id: MergedId
    ) -> Selected:
        """Choose as many tokens as the rule of the original asks for.

        Args:
            features: of the batch; every image by itself.
            bound: K, the most tokens that an image may keep.
            merged_id: which index tokens get that were merged from many.

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
