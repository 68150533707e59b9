"""The table of pruners: what each needs, what it does to the tokens, and where it works.

A pruner is a row here, a module with its tensor code (see `prune/__init__.py`) and a function with the same choice in float64
NumPy. All three may come from outside the package: see `register`.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

from gap_export.bundle.manifest import VisionFeature
from gap_export.errors import RecipeError

if TYPE_CHECKING:
    from gap_export.prune.in_decoder.schedules import Schedule


@dataclass(frozen=True)
class Pruner:
    """One pruner: what it needs, and what it does to the tokens.

    Attributes:
        name: what `--pruner` takes.
        summary: one line for people.
        reference: module with the same choice in float64 NumPy; see `prune/reference/__init__.py`.
        module: with the tensor code; by default the one of the pruner's name in this package.
        needs: what the tower must have.
        needs_text: whether the choice depends on the prompt.
        without_instruction: whether, of a free question of several lines, the last is no part of the text that the choice depends on.
        needs_seed: whether it draws at random.
        adaptive: whether it can find K by itself (`select_adaptive`).
        reads_projected: whether it looks at tokens after the projector, all N of which are then projected.
        merges: whether features of dropped tokens go into those of kept ones.
        merged: how many of the K tokens have no raster index of their own.
        keeps_class_token: whether one of those is the class token; see `on_tower`.
        sequential: whether it chooses one token (or round) after the other, which is a loop in the graph.
        min_tokens: smallest K that it can give.
        in_decoder: whether tokens are dropped inside the decoder, and not before it.
        schedule: `module:name` of the `Schedule` of one that does; by default the one of the pruner's name in `in_decoder/schedules.py`.
    """

    name: str
    summary: str
    reference: str
    module: str = ""
    needs: tuple[VisionFeature, ...] = ()
    needs_text: bool = False
    without_instruction: bool = False
    needs_seed: bool = False
    adaptive: bool = False
    reads_projected: bool = False
    merges: bool = False
    merged: int = 0
    keeps_class_token: bool = False
    sequential: bool = False
    min_tokens: int = 1
    in_decoder: bool = False
    schedule: str = ""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"a pruner's name is an identifier, and {self.name!r} is not")
        if not 0 <= self.merged < self.min_tokens:
            raise ValueError(
                f"{self.name} keeps at least {self.min_tokens} tokens, and {self.merged} of them are merged: one must be a patch"
            )
        if self.merged and not self.merges:
            raise ValueError(f"{self.name} has merged tokens and does not merge")
        if self.keeps_class_token and not self.merged:
            raise ValueError(
                f"{self.name} keeps the class token, which has no index, and has no merged token"
            )
        if self.in_decoder and self.adaptive:
            raise ValueError(
                f"{self.name} drops tokens inside the decoder, where no rule finds the count of an image"
            )

    def on_tower(self, lacking: tuple[VisionFeature, ...]) -> Pruner:
        """This row as it is on a tower: without a class token that the decoder could take, none of the K tokens is it.

        Args:
            lacking: what the tower does not have.
        """
        if not self.keeps_class_token or "projected_class_token" not in lacking:
            return self
        return replace(self, merged=self.merged - 1, min_tokens=self.min_tokens - 1, keeps_class_token=False)

    def text_of(self, question: str) -> str:
        """What the choice depends on, of a free question.

        TRIM reads all of it (arXiv 2409.10994, section 3). CDPruner reads it without the instruction on how to answer (`Answer the question using a
        single word or phrase.`), which its authors' evaluation puts on the last line of every question.

        Args:
            question: as asked.
        """
        lines = [line for line in question.splitlines() if line.strip()]
        if not self.without_instruction or len(lines) < 2:
            return question
        return "\n".join(lines[:-1])

    def load_reference(self) -> ModuleType:
        """The module with the same in float64."""
        return importlib.import_module(self.reference)

    def load_schedule(self) -> Schedule:
        """When a pruner inside the decoder drops tokens, and how many; imports no torch."""
        default = f"{__package__}.in_decoder.schedules:{self.name.upper()}"
        module, _, name = (self.schedule or default).partition(":")
        schedule: Schedule = getattr(importlib.import_module(module), name)
        return schedule

    def load(self) -> ModuleType:
        """The module with the tensor code; imports torch.

        Raises:
            ValueError: it has no function to select with.
        """
        package = f"{__package__}.in_decoder" if self.in_decoder else __package__
        module = importlib.import_module(self.module or f"{package}.{self.name}")
        for function in ("select", "select_adaptive") if self.adaptive else ("select",):
            if not callable(getattr(module, function, None)):
                raise ValueError(
                    f"{module.__name__}, the module of pruner {self.name}, has no function {function!r}"
                )
        return module


PRUNERS: dict[str, Pruner] = {}
"""Name -> row, in the order in which they are listed. `register` adds to it."""


def register(new: Pruner) -> None:
    """Add a pruner to the table.

    Raises:
        ValueError: there is one of that name.
    """
    if new.name in PRUNERS:
        raise ValueError(f"a pruner named {new.name!r} is in the table already")
    PRUNERS[new.name] = new


def names(*, in_decoder: bool | None = None) -> tuple[str, ...]:
    """Names of all pruners, or of those that drop tokens inside the decoder (True) or before it (False)."""
    return tuple(row.name for row in PRUNERS.values() if in_decoder in (None, row.in_decoder))


def row(name: str) -> Pruner:
    """The row of that name.

    Raises:
        RecipeError: unknown name, with the nearest known one.
    """
    if name in PRUNERS:
        return PRUNERS[name]
    near = difflib.get_close_matches(name, names(), n=1)
    raise RecipeError(
        "is not a pruner" + (f"; did you mean {near[0]!r}?" if near else ""),
        subject=repr(name),
        hint=f"choose one of {', '.join(names())}",
    )


def needs(pruner: Pruner) -> str:
    """What a pruner needs, as text."""
    parts = [part.replace("_", " ") for part in pruner.needs]
    parts += ["text"] if pruner.needs_text else []
    parts += ["seed"] if pruner.needs_seed else []
    parts += ["prompt"] if pruner.in_decoder else []
    return ", ".join(parts) or "-"


def where(pruner: Pruner) -> str:
    """The point in the model at which a pruner drops tokens, as text."""
    return "inside the decoder" if pruner.in_decoder else "before the decoder"


def merging(pruner: Pruner) -> str:
    """What a pruner does with the features of dropped tokens, as text."""
    if not pruner.merges:
        return "no"
    if not pruner.merged:
        return "yes"
    which = " (the class token, where there is one)" if pruner.keeps_class_token else ""
    return f"yes, {pruner.merged} of K without a place of its own{which}"


_SCORES, _MERGING, _DIVERSE = (f"{__package__}.reference.{name}" for name in ("scores", "merging", "diverse"))

for _row in (
    Pruner(
        "cls_attention",
        "what the class token attends to most",
        reference=_SCORES,
        needs=("attention",),
    ),
    Pruner(
        "tile_attention",
        "the same, by an equal share of every tile",
        reference=_SCORES,
        needs=("attention",),
    ),
    Pruner(
        "text_similarity",
        "what matches the expression best",
        reference=_SCORES,
        needs_text=True,
    ),
    Pruner(
        "prumerge",
        "class-token attention; neighbours are added in, the rest becomes one token",
        reference=_MERGING,
        needs=("attention",),
        adaptive=True,
        merges=True,
        merged=1,
        min_tokens=2,
    ),
    Pruner(
        "prumerge_plus",
        "a quarter as prumerge, three quarters evenly spread",
        reference=_MERGING,
        needs=("attention",),
        adaptive=True,
        merges=True,
        merged=1,
        min_tokens=2,
    ),
    Pruner(
        "trim",
        "what matches the expression best; the rest becomes one token",
        reference=_MERGING,
        needs_text=True,
        adaptive=True,
        merges=True,
        merged=1,
        min_tokens=2,
    ),
    Pruner(
        "visionzip",
        "class token, what it attends to most, and tokens that sum up the rest",
        reference=_MERGING,
        needs=("attention",),
        merges=True,
        merged=1,
        keeps_class_token=True,
        min_tokens=2,
    ),
    Pruner(
        "divprune",
        "greedily the token farthest from all chosen ones",
        reference=_DIVERSE,
        reads_projected=True,
        sequential=True,
    ),
    Pruner(
        "vispruner",
        "half by class-token attention, half by weeding out what is alike",
        reference=_DIVERSE,
        needs=("attention",),
        sequential=True,
    ),
    Pruner(
        "cdpruner",
        "greedily what the chosen ones do not span, weighted by how it matches the expression",
        reference=_DIVERSE,
        needs_text=True,
        without_instruction=True,
        reads_projected=True,
        sequential=True,
    ),
    Pruner(
        "dart",
        "a few tokens of high norm, and what is least alike to them",
        reference=_DIVERSE,
        reads_projected=True,
    ),
    Pruner("random", "a seeded draw", reference=_SCORES, needs_seed=True),
    Pruner("spatial", "a uniform grid", reference=_SCORES),
    Pruner("none", "nothing is pruned", reference=_SCORES),
    Pruner(
        "fastv",
        "what the last token of the prompt attends to most in an early layer",
        reference="gap_export.prune.in_decoder.reference",
        in_decoder=True,
    ),
    Pruner(
        "pyramiddrop",
        "the same in three steps, each by the next layer's attention",
        reference="gap_export.prune.in_decoder.reference",
        in_decoder=True,
    ),
    Pruner(
        "sparsevlm",
        "what the relevant text tokens attend to most, in three steps; the best of the rest as cluster means",
        reference="gap_export.prune.in_decoder.reference",
        merges=True,
        in_decoder=True,
    ),
):
    register(_row)
