"""The table of strategies: what each needs, what it does to the tokens, and where it works."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from gap_export.bundle.manifest import VisionFeature
from gap_export.errors import RecipeError

Where = Literal["before the decoder", "inside the decoder"]


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
        sequential: whether it chooses one token (or round) after the other, which is a loop in the graph.
        min_tokens: smallest K that it can give.
        where: the point in the model at which tokens are dropped.
    """

    name: str
    implementation: str
    summary: str
    needs: tuple[VisionFeature, ...] = ()
    needs_text: bool = False
    needs_seed: bool = False
    adaptive: bool = False
    reads_projected: bool = False
    merges: bool = False
    merged: int = 0
    sequential: bool = False
    min_tokens: int = 1
    where: Where = "before the decoder"


STRATEGIES: tuple[Strategy, ...] = (
    Strategy(
        "cls_attention",
        "cls_attention:ClsAttention",
        "what the class token attends to most",
        needs=("class_token",),
    ),
    Strategy(
        "tile_attention",
        "tile_attention:TileAttention",
        "the same, by an equal share of every tile",
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
        min_tokens=2,
    ),
    Strategy(
        "prumerge_plus",
        "prumerge_plus:PruMergePlus",
        "a quarter as prumerge, three quarters evenly spread",
        needs=("class_token", "following_layer"),
        adaptive=True,
        merges=True,
        merged=1,
        min_tokens=2,
    ),
    Strategy(
        "trim",
        "trim:Trim",
        "what matches the expression best; the rest becomes one token",
        needs_text=True,
        adaptive=True,
        merges=True,
        merged=1,
        min_tokens=2,
    ),
    Strategy(
        "visionzip",
        "visionzip:VisionZip",
        "class token, what it attends to most, and tokens that sum up the rest",
        needs=("class_token", "projected_class_token"),
        merges=True,
        merged=1,
        min_tokens=2,
    ),
    Strategy(
        "divprune",
        "divprune:DivPrune",
        "greedily the token farthest from all chosen ones",
        reads_projected=True,
        sequential=True,
    ),
    Strategy(
        "vispruner",
        "vispruner:VisPruner",
        "half by class-token attention, half by weeding out what is alike",
        needs=("class_token",),
        sequential=True,
    ),
    Strategy(
        "cdpruner",
        "cdpruner:CDPruner",
        "greedily what the chosen ones do not span, weighted by how it matches the expression",
        needs_text=True,
        reads_projected=True,
        sequential=True,
    ),
    Strategy(
        "dart",
        "dart:Dart",
        "a few tokens of high norm, and what is least alike to them",
        reads_projected=True,
    ),
    Strategy("random", "random:Random", "a seeded draw", needs_seed=True),
    Strategy("spatial", "spatial:Spatial", "a uniform grid", needs=("grid",)),
    Strategy("none", "none:KeepAll", "nothing is pruned"),
    Strategy(
        "fastv",
        "in_decoder.fastv:FastV",
        "what the last token of the prompt attends to most in an early layer",
        where="inside the decoder",
    ),
    Strategy(
        "pyramiddrop",
        "in_decoder.pyramiddrop:PyramidDrop",
        "the same in three steps, each by the next layer's attention",
        where="inside the decoder",
    ),
    Strategy(
        "sparsevlm",
        "in_decoder.sparsevlm:SparseVlm",
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
