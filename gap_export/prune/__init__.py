"""Visual-token pruners: the table of strategies and their one contract.

A pruner chooses which K of N visual tokens survive. It is tensor code, traced into the vision graph, and gives raster
indices best first; sorting them (or not) is the position policy's business, done here in one place for all.

Shape letters: B batch, A attention heads, N visual tokens, K kept, D head width, E tower width.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gap_export.errors import RecipeError
from gap_export.positions import PositionPolicy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VisionFeatures:
    """What a vision tower shows a pruner.

    Attributes:
        patches_BNE: features of the patches, before the projector, class token dropped.
        grid: (rows, columns) with rows * columns = N.
        class_query_BAD: the class token's query in the layer whose output is `patches`; None without a class token.
        keys_BATD: keys of the same layer, class token first (T = 1 + N); None without a class token.
    """

    patches_BNE: Tensor
    grid: tuple[int, int]
    class_query_BAD: Tensor | None = None
    keys_BATD: Tensor | None = None

    @property
    def visual_tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]


class Pruner(Protocol):
    """One strategy."""

    name: str
    needs_class_token: bool
    needs_seed: bool

    def select(self, features: VisionFeatures, kept: int, seed: int) -> Tensor:
        """Raster indices of the survivors, best first.

        Args:
            features: of the batch.
            kept: K, 1..N.
            seed: for strategies that draw at random.

        Returns:
            [B, K] int64, distinct within a row.
        """
        ...


def names() -> tuple[str, ...]:
    """Names of all strategies."""
    return ("cls_attention", "random", "spatial", "none")


def load(name: str) -> Pruner:
    """The strategy of that name.

    Raises:
        RecipeError: unknown name, with the nearest known one.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        raise RecipeError(
            "is not a pruner" + (f"; did you mean {near[0]!r}?" if near else ""),
            subject=repr(name),
            hint=f"choose one of {', '.join(names())}",
        )
    from gap_export.prune import cls_attention, none, random, spatial

    table: dict[str, Pruner] = {
        pruner.name: pruner
        for pruner in (
            cls_attention.ClsAttention(),
            random.Random(),
            spatial.Spatial(),
            none.KeepAll(),
        )
    }
    return table[name]


def kept_count(keep: float, visual_tokens: int) -> int:
    """How many tokens a fraction keeps: the nearest count, halves up, never zero.

    Raises:
        RecipeError: a fraction outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise RecipeError(
            "is the fraction of visual tokens kept and must be above 0 and at most 1",
            subject=f"keep {keep:g}",
            hint="0.25 keeps a quarter of them",
        )
    return max(1, int(keep * visual_tokens + 0.5))


def in_decoder_order(selected_BK: Tensor, policy: PositionPolicy) -> Tensor:
    """Put selected indices into the order in which the tokens enter the decoder.

    TopK gives score order. Under every policy but `permuted` the indices are sorted, so that raster order, causal order
    and position order agree.
    """
    if not policy.keeps_raster_order:
        return selected_BK
    return selected_BK.sort(dim=-1).values
