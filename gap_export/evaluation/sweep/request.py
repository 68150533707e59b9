"""What a sweep is asked for, and which of its points can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from gap_export import bounds, prune
from gap_export.bundle.manifest import ModelSpec
from gap_export.errors import RecipeError
from gap_export.evaluation.sweep.record import FULL, Skipped, SweepPoint
from gap_export.inputs.prompt import TextTower
from gap_export.plan import plan_for
from gap_export.positions import PositionPolicy
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.backends import target_of

Entry = TypeVar("Entry")

UNPRUNED = "none"
"""The pruner of the reference point, which every sweep has once."""

KEEPS = (0.5, 0.25, 0.11)
"""Fractions that are swept where nothing else is said."""


@dataclass(frozen=True)
class SweepRequest:
    """What a sweep is asked for.

    Attributes:
        recipe: all that is not swept.
        pruners: names, each once; not `none`, which is the reference of every sweep.
        keeps: fractions of visual tokens kept, each once.
        positions: policies, each once.
        backend: name of a runtime that runs bundles.
        limit: scenes per point.
        batch: images per call, at most what the recipe allows.
        threads: of ONNX Runtime, in every process; 0 lets it choose.

    Raises:
        RecipeError: an unknown pruner, `none`, a fraction outside (0, 1], anything twice.
        InputError: a count below 1.
    """

    recipe: Recipe
    pruners: tuple[str, ...]
    keeps: tuple[float, ...] = KEEPS
    positions: tuple[PositionPolicy, ...] = tuple(PositionPolicy)
    backend: str = "onnxruntime"
    limit: int = 500
    batch: int = 16
    threads: int = 1

    def __post_init__(self) -> None:
        check_pruners(self.pruners)
        check_keeps(self.keeps)
        _check_distinct(self.positions, "positions")
        bounds.check(limit=self.limit, batch=self.batch, threads=self.threads)

    def recipe_of(self, point: SweepPoint) -> Recipe:
        """The recipe of one point's bundle."""
        return recipe_for(
            self.recipe,
            self.backend,
            pruner=point.pruner,
            keep=point.keep,
            positions=PositionPolicy.GAP if point.positions == FULL else point.positions,
        )


def recipe_for(recipe: Recipe, backend: str, **options: Any) -> Recipe:
    """The recipe of one of many bundles.

    Args:
        recipe: what they have in common.
        backend: name of the runtime that runs them.
        options: fields that are this bundle's own.

    Raises:
        RecipeError: an option that cannot work.
        SessionError: an unknown backend, or one that runs no bundles.
    """
    # A capacity that is just enough for one count is too small for another; by default it is enough for each.
    fitting = recipe.model_copy(update={"capacity": None})
    return fitting.replaced(**options, targets=(target_of(backend),))


def pruners_from(text: str) -> tuple[str, ...]:
    """Pruners in a list with commas; `all` is every one but `none`, which is the reference of every sweep.

    Raises:
        RecipeError: an unknown name, `none`, an empty list, a name twice.
    """
    if text.strip() == "all":
        return all_pruners()
    names = tuple(_entries(text, "pruners"))
    check_pruners(names)
    return names


def all_pruners() -> tuple[str, ...]:
    """Every pruner of the table but `none`."""
    return tuple(name for name in prune.names() if name != UNPRUNED)


def keeps_from(text: str) -> tuple[float, ...]:
    """Fractions in a list with commas.

    Raises:
        InputError: not a number, outside (0, 1], an empty list, a fraction twice.
    """
    return tuple(bounds.several(text, bounds.FRACTION, "--keep"))


def positions_from(text: str) -> tuple[PositionPolicy, ...]:
    """Policies in a list with commas.

    Raises:
        RecipeError: an unknown name, an empty list, a name twice.
    """
    known = {str(policy): policy for policy in PositionPolicy}
    entries = _entries(text, "positions")
    for entry in entries:
        if entry not in known:
            raise RecipeError(
                "is not a position policy",
                subject=repr(entry),
                hint=f"choose from {', '.join(known)}; unpruned (full) is always measured",
            )
    _check_distinct(entries, "positions")
    return tuple(known[entry] for entry in entries)


def plan_points(
    request: SweepRequest, spec: ModelSpec, text_tower: TextTower | None = None
) -> tuple[list[SweepPoint], list[Skipped]]:
    """Which points there are, and which cannot be.

    Args:
        request: of the sweep.
        spec: sizes of the model.
        text_tower: for pruners that look at the expression, where there is something that reads it.

    Raises:
        RecipeError: an unknown pruner, two fractions that keep the same count, or a recipe that does not work unpruned either.
    """
    # An unknown name is a mistake, not a pruner to be skipped.
    pruners = [prune.row(name) for name in request.pruners]
    counts = counts_of(request.keeps, spec.visual_tokens)
    full = SweepPoint(pruner=UNPRUNED, keep=1.0, kept=spec.visual_tokens, positions=FULL)
    plan_for(request.recipe_of(full), spec)
    points, skipped = [full], []
    for pruner in pruners:
        for kept, keep in counts.items():
            for policy in request.positions:
                point = SweepPoint(pruner=pruner.name, keep=keep, kept=kept, positions=policy)
                try:
                    plan_for(request.recipe_of(point), spec, text_tower if pruner.needs_text else None)
                    points.append(point)
                except RecipeError as error:
                    skipped.append(Skipped(**point.model_dump(), reason=error.message))
    return points, skipped


def counts_of(keeps: Sequence[float], visual_tokens: int) -> dict[int, float]:
    """How many tokens each fraction keeps -> the fraction.

    Args:
        keeps: fractions of visual tokens kept.
        visual_tokens: before pruning.

    Raises:
        RecipeError: two fractions that keep the same count, or one that keeps none.
    """
    counts: dict[int, float] = {}
    for keep in keeps:
        kept = prune.kept_count(keep, visual_tokens)
        if kept in counts:
            raise RecipeError(
                f"keep the same {kept} of {visual_tokens} tokens",
                subject=f"keep {counts[kept]:g} and {keep:g}",
                hint="leave one of them out",
            )
        counts[kept] = keep
    return counts


def _entries(text: str, option: str) -> list[str]:
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise RecipeError(
            "has an empty entry", subject=f"{option} {text!r}", hint="separate entries with single commas"
        )
    return entries


def check_pruners(names: Sequence[str]) -> None:
    """Refuse pruners that cannot be compared.

    Raises:
        RecipeError: an unknown name, `none`, a name twice.
    """
    for name in names:
        if prune.row(name).name == UNPRUNED:
            raise RecipeError(
                "is the reference and always measured",
                subject="pruners: none",
                hint="leave it out",
            )
    _check_distinct(names, "pruners")


def check_keeps(keeps: Sequence[float]) -> None:
    """Refuse fractions that cannot be compared.

    Raises:
        RecipeError: one outside (0, 1], or one twice.
    """
    for keep in keeps:
        prune.check_fraction(keep)
    _check_distinct(keeps, "keep")


def _check_distinct(entries: Sequence[Entry], option: str) -> None:
    twice = next((entry for place, entry in enumerate(entries) if entry in entries[:place]), None)
    if twice is not None:
        raise RecipeError("is listed twice", subject=f"{option} {twice}", hint="leave one of them out")
