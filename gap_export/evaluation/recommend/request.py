"""What pruners and shares are to be tried, which of them can be, and in how many bundles."""

from __future__ import annotations

from dataclasses import dataclass

from gap_export import bounds, prune
from gap_export.bundle.manifest import ModelSpec
from gap_export.errors import InputError, RecipeError
from gap_export.evaluation.recommend.bundle import KEEPS
from gap_export.evaluation.recommend.record import LeftOut
from gap_export.evaluation.sweep.request import (
    UNPRUNED,
    check_keeps,
    check_pruners,
    counts_of,
    recipe_for,
)
from gap_export.inputs.prompt import TextTower
from gap_export.plan import plan_for
from gap_export.recipe.recipe import Recipe


@dataclass(frozen=True)
class PrunerRequest:
    """What is to be tried, and how it is asked.

    Attributes:
        recipe: all but pruner and share.
        pruners: names, each once; not `none`, which all are compared with.
        keeps: fractions of the visual tokens, each once; 1 is that of the unpruned model, which is always there.
        backend: name of a runtime that runs bundles.
        protocol: under which answers are scored.
        limit: only so many expressions.
        requests: per share, whose time is measured.
        threads: of the runtime; 0 lets it choose.
        rescale_boxes: scale true boxes where images are of another size than their annotations.

    Raises:
        RecipeError: no pruner, an unknown one, `none`, a fraction outside (0, 1], anything twice.
        InputError: a count out of bounds, or no fraction below 1.
    """

    recipe: Recipe
    pruners: tuple[str, ...]
    keeps: tuple[float, ...] = KEEPS
    backend: str = "onnxruntime"
    protocol: str = "unc"
    limit: int | None = None
    requests: int = 30
    threads: int = 0
    rescale_boxes: bool = False

    def __post_init__(self) -> None:
        if not self.pruners:
            raise RecipeError("are none", subject="pruners", hint="name at least one")
        check_pruners(self.pruners)
        check_keeps(self.keeps)
        bounds.check(limit=self.limit, requests=self.requests, threads=self.threads)
        if not self.shares:
            raise InputError(
                "is not below 1",
                subject=f"keep {', '.join(f'{keep:g}' for keep in self.keeps) or 'nothing'}",
                hint="give fractions below 1: losses are against the unpruned model",
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """Fractions that leave something out, from the largest on."""
        return tuple(sorted((float(keep) for keep in self.keeps if keep < 1), reverse=True))


@dataclass(frozen=True)
class Place:
    """A pruner at one share.

    Attributes:
        pruner: its name.
        keep: fraction of the visual tokens kept.
    """

    pruner: str
    keep: float

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.pruner}-keep{self.keep}"

    @property
    def label(self) -> str:
        """What it is, for people."""
        return f"{self.pruner}, keep {self.keep:g}"


@dataclass(frozen=True)
class Variant:
    """One bundle to be built, and the shares that it is asked at.

    Attributes:
        pruner: its name.
        shares: fractions of the visual tokens, from the largest on; requests choose where there are several.
    """

    pruner: str
    shares: tuple[float, ...]

    @property
    def points(self) -> tuple[Place, ...]:
        """One per share."""
        return tuple(Place(self.pruner, share) for share in self.shares)

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"{self.pruner}-keep{self.shares[-1]}"

    @property
    def label(self) -> str:
        """What it is, for people."""
        shares = f"{self.shares[-1]:g}" + (f":{self.shares[0]:g}" if len(self.shares) > 1 else "")
        return f"{self.pruner}, keep {shares}"

    def keep_of(self, place: Place) -> float | None:
        """What a request asks for; None for the bundle's own share."""
        return place.keep if len(self.shares) > 1 else None

    def recipe(self, request: PrunerRequest) -> Recipe:
        """Of its bundle.

        Raises:
            RecipeError: it cannot be.
        """
        keep = (self.shares[-1], self.shares[0]) if len(self.shares) > 1 else self.shares[0]
        return recipe_for(request.recipe, request.backend, pruner=self.pruner, keep=keep)


BASELINE = Variant(UNPRUNED, (1.0,))
"""What all others are compared with."""


def plan_variants(
    request: PrunerRequest, spec: ModelSpec, text_tower: TextTower | None = None
) -> tuple[list[Variant], list[LeftOut]]:
    """Which bundles are built besides the baseline, and what cannot be.

    A pruner gets one bundle whose requests choose among its shares, where the planner lets it; else one for every share.

    Args:
        request: what is to be tried.
        spec: sizes of the model.
        text_tower: for pruners that look at the expression, where the recipe has one.

    Raises:
        RecipeError: two fractions that keep the same count, a recipe that does not work unpruned either, or nothing that works.
    """
    counts_of(request.shares, spec.visual_tokens)
    plan_for(BASELINE.recipe(request), spec)
    variants: list[Variant] = []
    left_out: list[LeftOut] = []
    for name in request.pruners:
        tower = text_tower if prune.row(name).needs_text else None
        reasons = {share: _fault(Variant(name, (share,)), request, spec, tower) for share in request.shares}
        able = tuple(share for share, reason in reasons.items() if reason is None)
        together = Variant(name, able)
        if len(able) > 1 and _fault(together, request, spec, tower) is None:
            variants.append(together)
        else:
            variants += [Variant(name, (share,)) for share in able]
        left_out += _grouped(name, reasons)
    if not variants:
        raise RecipeError(
            f"cannot be asked: {left_out[0].reason}",
            subject=f"pruner {left_out[0].pruner}" + (" and all others" if len(request.pruners) > 1 else ""),
            hint="choose other pruners (--pruners), or other fractions (--keep)",
        )
    return variants, left_out


def _fault(
    variant: Variant, request: PrunerRequest, spec: ModelSpec, text_tower: TextTower | None
) -> str | None:
    """Why a bundle cannot be; None where it can."""
    try:
        plan_for(variant.recipe(request), spec, text_tower)
    except RecipeError as error:
        return error.message
    return None


def _grouped(pruner: str, reasons: dict[float, str | None]) -> list[LeftOut]:
    """Shares that cannot be, by the reason."""
    found: dict[str, list[float]] = {}
    for share, reason in reasons.items():
        if reason is not None:
            found.setdefault(reason, []).append(share)
    return [LeftOut(pruner=pruner, keeps=tuple(keeps), reason=reason) for reason, keeps in found.items()]
