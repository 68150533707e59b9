"""Visual-token pruners: the table of strategies and their one contract.

A pruner chooses which K of N visual tokens enter the decoder. It is tensor code, traced into the vision graph, and gives
raster indices best first; putting them into order (or not) is the position policy's business, done in one place for all
(`order.py`). Every choice is made per picture, never over the batch.

Shape letters: B batch, A attention heads, N visual tokens, K kept, T = 1 + N, D head width, E tower width, H decoder width,
P width of the space that a CLIP tower shares with its text tower.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gap_export.bundle import TowerPart
from gap_export.errors import RecipeError
from gap_export.positions import MergedId

if TYPE_CHECKING:
    from torch import Tensor

Where = Literal["before the decoder", "inside the decoder"]

NO_TOKEN = -1
"""Index of the padding after the tokens of a picture that needs fewer than others."""


@dataclass(frozen=True)
class VisionFeatures:
    """What a vision tower shows a pruner. A family fills in what it has; what no pruner reads vanishes from the graph.

    The feature layer is the one whose output the decoder gets; the following layer is the next one up, which the decoder
    never sees.

    Attributes:
        patches_BNE: features of the patches, before the projector, class token dropped.
        grid: (rows, columns) with rows * columns = N; None where pictures differ in how many patches they have.
        class_query_BAD: the class token's query in the feature layer; None without a class token.
        keys_BATD: keys of the same layer, class token first; None without a class token.
        class_token_BE: output of the feature layer at the class token.
        following_query_BE: the class token's query in the following layer, full width, heads not split.
        following_keys_BTE: keys of the following layer, the same way, class token first.
        projected_BNH: the patches after the projector.
        aligned_BNP: the patches in the space shared with text: CLIP's `visual_projection(post_layernorm(patches))`, not
            normalised; None without a text tower.
        text_BP: the expression in that space: CLIP's `text_embeds` before normalisation; None without a text tower.
        aligned_inversely: whether a patch is *less* similar to the text that describes it than other patches are. So it is
            in OpenAI's CLIP, which was trained on whole pictures (CLIP Surgery, arXiv 2304.05653).
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
    aligned_inversely: bool = True

    @property
    def visual_tokens(self) -> int:
        """N. A plain number, or symbolic while a graph is traced in which pictures differ."""
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
            own (`Strategy.merged`) may share that of another.
        patches_BKE: features of the chosen tokens in the same order, before the projector, where they are not simply the
            patches at the indices.
        counts_B: int64, how many tokens each picture needs, where the strategy adapts to the picture. Up to that many (at most
            K) stand first in a row; the indices after them are `NO_TOKEN`, their features arbitrary but finite. A count
            above K says that the bound was too low for that picture.
    """

    indices_BK: Tensor
    patches_BKE: Tensor | None = None
    counts_B: Tensor | None = None


class Pruner(Protocol):
    """One strategy."""

    def select(self, features: VisionFeatures, kept: int, *, seed: int, merged_id: MergedId) -> Selected:
        """Choose.

        Args:
            features: of the batch.
            kept: K, all tokens that enter the decoder, merged ones included. A plain number, or symbolic while a graph is
                traced in which K is an input.
            seed: for strategies that draw at random.
            merged_id: which index tokens get that were merged from many.

        Raises:
            ValueError: the features lack something that the strategy reads.
        """
        ...


class AdaptivePruner(Protocol):
    """A strategy that can also find the count by itself, picture by picture."""

    def select_adaptive(self, features: VisionFeatures, bound: int, *, merged_id: MergedId) -> Selected:
        """Choose as many tokens as the rule of the original asks for.

        Args:
            features: of the batch; every picture is judged by itself.
            bound: K, the most tokens that a picture may keep.
            merged_id: see `Pruner.select`.

        Returns:
            Selected with `counts_B`.
        """
        ...


@dataclass(frozen=True)
class Strategy:
    """One row of the table: what a strategy needs, and what it does to the tokens.

    Attributes:
        name: what `--pruner` takes.
        implementation: `module:class` within this package.
        summary: one line for people.
        needs: what the tower must have.
        needs_text: whether the choice depends on the prompt.
        needs_seed: whether it draws at random.
        adaptive: whether it can find K by itself (`AdaptivePruner`).
        reads_projected: whether it looks at tokens after the projector, all N of which are then projected.
        merges: whether features of dropped tokens go into those of kept ones.
        merged: how many of the K tokens have no raster index of their own.
        fewest: smallest K that it can give.
        where: the point in the model at which tokens are dropped.
    """

    name: str
    implementation: str
    summary: str
    needs: tuple[TowerPart, ...] = ()
    needs_text: bool = False
    needs_seed: bool = False
    adaptive: bool = False
    reads_projected: bool = False
    merges: bool = False
    merged: int = 0
    fewest: int = 1
    where: Where = "before the decoder"

    def count_of(self, keep: float, tokens: int) -> int:
        """K of a picture with so many tokens: the nearest count, but never fewer than the strategy can give.

        For pictures that differ in size: one with few tokens must not fail where others do not.
        """
        require_fraction(keep)
        return min(tokens, max(self.fewest, int(keep * tokens + 0.5)))


STRATEGIES: tuple[Strategy, ...] = (
    Strategy(
        "cls_attention",
        "cls_attention:ClsAttention",
        "what the class token attends to most",
        needs=("class_token",),
    ),
    Strategy(
        "text_similarity",
        "text_similarity:TextSimilarity",
        "what matches the expression best",
        needs_text=True,
    ),
    Strategy(
        "prumerge",
        "prumerge:PruMerge",
        "class-token attention; neighbours are added in, the rest becomes one token",
        needs=("class_token", "following_layer"),
        adaptive=True,
        merges=True,
        merged=1,
        fewest=2,
    ),
    Strategy(
        "prumerge_plus",
        "prumerge_plus:PruMergePlus",
        "a quarter as prumerge, three quarters evenly spread",
        needs=("class_token", "following_layer"),
        adaptive=True,
        merges=True,
        merged=1,
        fewest=2,
    ),
    Strategy(
        "trim",
        "trim:Trim",
        "what matches the expression best; the rest becomes one token",
        needs_text=True,
        adaptive=True,
        merges=True,
        merged=1,
        fewest=2,
    ),
    Strategy(
        "visionzip",
        "visionzip:VisionZip",
        "class token, what it attends to most, and tokens that sum up the rest",
        needs=("class_token",),
        merges=True,
        merged=1,
        fewest=2,
    ),
    Strategy(
        "divprune",
        "divprune:DivPrune",
        "greedily the token farthest from all chosen ones",
        reads_projected=True,
    ),
    Strategy(
        "vispruner",
        "vispruner:VisPruner",
        "half by class-token attention, half by weeding out what is alike",
        needs=("class_token",),
    ),
    Strategy(
        "cdpruner",
        "cdpruner:CDPruner",
        "greedily what the chosen ones do not span, weighted by how it matches the expression",
        needs_text=True,
        reads_projected=True,
    ),
    Strategy(
        "dart",
        "dart:Dart",
        "a few tokens of high norm, and what is least alike to them",
        reads_projected=True,
    ),
    Strategy("random", "random:Random", "a seeded draw", needs_seed=True),
    Strategy("spatial", "spatial:Spatial", "a uniform grid"),
    Strategy("none", "none:KeepAll", "nothing is pruned"),
    Strategy(
        "fastv",
        "fastv:FastV",
        "what the last token of the prompt attends to most in an early layer",
        where="inside the decoder",
    ),
    Strategy(
        "pyramiddrop",
        "pyramiddrop:PyramidDrop",
        "the same in three steps, each by the next layer's attention",
        where="inside the decoder",
    ),
    Strategy(
        "sparsevlm",
        "sparsevlm:SparseVlm",
        "what the telling words attend to most, in three steps; the best of the rest as cluster means",
        merges=True,
        where="inside the decoder",
    ),
)
"""Every strategy there is, in the order in which they are listed."""


def names(where: Where | None = None) -> tuple[str, ...]:
    """Names of all strategies, or of those that prune at one point."""
    return tuple(row.name for row in STRATEGIES if where in (None, row.where))


def strategy(name: str) -> Strategy:
    """The row of that name.

    Raises:
        RecipeError: unknown name, with the nearest known one.
    """
    for row in STRATEGIES:
        if row.name == name:
            return row
    near = difflib.get_close_matches(name, names(), n=1)
    raise RecipeError(
        "is not a pruner" + (f"; did you mean {near[0]!r}?" if near else ""),
        subject=repr(name),
        hint=f"choose one of {', '.join(names())}",
    )


def load(name: str) -> Pruner:
    """The strategy of that name, which prunes before the decoder, ready to select.

    Raises:
        RecipeError: unknown name, with the nearest known one.
    """
    pruner: Pruner = implementation(strategy(name))
    return pruner


def load_adaptive(name: str) -> AdaptivePruner:
    """The strategy of that name, to find the count by itself.

    Raises:
        RecipeError: unknown name, or a strategy that takes a count.
    """
    require_adaptive(strategy(name))
    pruner: AdaptivePruner = implementation(strategy(name))
    return pruner


def implementation(row: Strategy) -> Any:
    """The object behind a row: a `Pruner`, or for those inside the decoder a `stages.DecoderPruner`."""
    module, _, kind = row.implementation.partition(":")
    return getattr(importlib.import_module(f"gap_export.prune.{module}"), kind)()


def needs(row: Strategy) -> str:
    """What a strategy needs, in words."""
    parts = [part.replace("_", " ") for part in row.needs]
    parts += ["text"] if row.needs_text else []
    parts += ["seed"] if row.needs_seed else []
    parts += ["prompt"] if row.where == "inside the decoder" else []
    return ", ".join(parts) or "-"


def merging(row: Strategy) -> str:
    """What a strategy does with the features of dropped tokens, in words."""
    if not row.merges:
        return "no"
    return f"yes, {row.merged} of K without a place of its own" if row.merged else "yes"


def require_tower(wanted: Strategy, lacking: tuple[TowerPart, ...]) -> None:
    """Refuse a strategy that cannot work on a tower.

    Args:
        wanted: the strategy.
        lacking: what the tower does not have.

    Raises:
        RecipeError: with the list of those that can.
    """
    missing = [part.replace("_", " ") for part in wanted.needs if part in lacking]
    if missing:
        able = [row.name for row in STRATEGIES if not row.needs_text and not set(row.needs) & set(lacking)]
        raise RecipeError(
            f"needs a {' and a '.join(missing)}, which this vision tower does not have",
            subject=f"pruner {wanted.name}",
            hint=f"these work on it: {', '.join(able)}",
        )


def require_adaptive(wanted: Strategy) -> None:
    """Refuse `keep: adaptive` for a strategy that has no rule for it.

    Raises:
        RecipeError: with the list of those that have.
    """
    if not wanted.adaptive:
        able = ", ".join(row.name for row in STRATEGIES if row.adaptive)
        raise RecipeError(
            "has no rule of its own for how many tokens a picture needs",
            subject=f"pruner {wanted.name}, keep adaptive",
            hint=f"give a fraction or a range, or use one of {able}",
        )


def require_text(wanted: Strategy, *, has_text_tower: bool, published: str | None) -> None:
    """Refuse a strategy that looks at the expression where nothing can read it.

    Args:
        wanted: the strategy.
        has_text_tower: whether the recipe names a CLIP checkpoint with one.
        published: hub id of the checkpoint to add, where it is known.

    Raises:
        RecipeError: with the checkpoint to add, and the strategies that do without.
    """
    if wanted.needs_text and not has_text_tower:
        able = ", ".join(row.name for row in STRATEGIES if not row.needs_text)
        raise RecipeError(
            "looks at the expression, and the checkpoint has no text tower to read it with",
            subject=f"pruner {wanted.name}",
            hint=f"add --text-tower {published or 'with the CLIP checkpoint that the vision tower comes from'}, or use one of {able}",
        )


def require_count(wanted: Strategy, kept: int, visual_tokens: int) -> None:
    """Refuse a count that a strategy cannot give.

    Raises:
        RecipeError: with the reason.
    """
    if wanted.name == "none" and kept != visual_tokens:
        raise RecipeError(
            f"keeps all {visual_tokens} tokens, and keep asks for {kept}",
            subject="pruner none",
            hint="use --keep 1.0, or another pruner",
        )
    if kept < wanted.fewest:
        raise RecipeError(
            f"keeps at least {wanted.fewest} tokens: {wanted.merged} without a place of their own, and at least one patch "
            "from which the order of the picture can be told",
            subject=f"pruner {wanted.name}, keep {kept} of {visual_tokens}",
            hint=f"use --keep {wanted.fewest / visual_tokens:.3g} or more, or another pruner",
        )


def require_fraction(keep: float) -> None:
    """Refuse what is no share of the visual tokens.

    Raises:
        RecipeError: outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise RecipeError(
            "is the fraction of visual tokens kept and must be above 0 and at most 1",
            subject=f"keep {keep:g}",
            hint="0.25 keeps a quarter of them",
        )


def kept_count(keep: float, visual_tokens: int) -> int:
    """How many tokens a fraction keeps: the nearest count, halves up.

    Raises:
        RecipeError: a fraction outside (0, 1], or one that keeps none.
    """
    require_fraction(keep)
    kept = int(keep * visual_tokens + 0.5)
    if kept == 0:
        raise RecipeError(
            f"keeps none of {visual_tokens} tokens",
            subject=f"keep {keep:g}",
            hint=f"{1 / visual_tokens:.2g} keeps one of them",
        )
    return kept
