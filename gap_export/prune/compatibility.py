"""What a pruner cannot do, said before a build: towers it cannot work on, counts it cannot give, text that nothing reads."""

from __future__ import annotations

from collections.abc import Callable

from gap_export.bundle.manifest import VisionFeature
from gap_export.errors import RecipeError
from gap_export.prune.table import PRUNERS, Pruner

NEEDED: dict[VisionFeature, str] = {
    "attention": "attention",
    "projected_class_token": "a class token that the decoder can take",
}
"""What a pruner may need of a tower, in words."""


def working(lacking: tuple[VisionFeature, ...], wanted: Callable[[Pruner], bool]) -> tuple[str, ...]:
    """Names of the pruners of a kind that work on a tower, for advice.

    Args:
        lacking: what the tower does not have.
        wanted: whether a pruner is of the kind.
    """
    return tuple(row.name for row in PRUNERS.values() if wanted(row) and not set(row.needs) & set(lacking))


def check_tower(wanted: Pruner, lacking: tuple[VisionFeature, ...]) -> None:
    """Refuse a pruner that cannot work on a tower.

    Args:
        wanted: the pruner.
        lacking: what the tower does not have.

    Raises:
        RecipeError: with the list of those that can.
    """
    missing = [NEEDED[part] for part in wanted.needs if part in lacking]
    if missing:
        able = working(lacking, lambda row: not row.needs_text)
        raise RecipeError(
            f"needs {' and '.join(missing)}, which this vision tower does not show",
            subject=f"pruner {wanted.name}",
            hint=f"these work on it: {', '.join(able)}",
        )


def check_adaptive(wanted: Pruner, lacking: tuple[VisionFeature, ...] = ()) -> None:
    """Refuse `keep: adaptive` for a pruner that has no rule for it.

    Args:
        wanted: the pruner.
        lacking: what the tower does not have.

    Raises:
        RecipeError: with the list of those that have, and work on the tower.
    """
    if not wanted.adaptive:
        able = working(lacking, lambda row: row.adaptive)
        instead = f", or use one of {', '.join(able)}" if able else ""
        raise RecipeError(
            "has no rule of its own for how many tokens an image needs",
            subject=f"pruner {wanted.name}, keep adaptive",
            hint=f"give a fraction or a range{instead}",
        )


def check_text(
    wanted: Pruner,
    lacking: tuple[VisionFeature, ...] = (),
    *,
    has_text_tower: bool,
    published: str | None,
) -> None:
    """Refuse a pruner that looks at the expression where nothing can read it.

    Args:
        wanted: the pruner.
        lacking: what the tower does not have.
        has_text_tower: whether the recipe names a CLIP checkpoint with one.
        published: hub id of the checkpoint to add, where it is known.

    Raises:
        RecipeError: with the checkpoint to add, and the pruners that do without and work on the tower.
    """
    if wanted.needs_text and not has_text_tower:
        able = ", ".join(working(lacking, lambda row: not row.needs_text))
        raise RecipeError(
            "looks at the expression, and the checkpoint has no text tower to read it with",
            subject=f"pruner {wanted.name}",
            hint=f"add --text-tower {published or 'with the CLIP checkpoint that the vision tower comes from'}, or use one of {able}",
        )


def check_count(wanted: Pruner, kept: int, visual_tokens: int) -> None:
    """Refuse a count that a pruner cannot give.

    Raises:
        RecipeError: with the reason.
    """
    if wanted.name == "none" and kept != visual_tokens:
        raise RecipeError(
            f"keeps all {visual_tokens} tokens, and keep asks for {kept}",
            subject="pruner none",
            hint="use --keep 1.0, or another pruner",
        )
    if kept < wanted.min_tokens:
        raise RecipeError(
            f"keeps at least {wanted.min_tokens} tokens: {wanted.merged} without a place of their own, and at least one patch "
            "from which the order of the image can be told",
            subject=f"pruner {wanted.name}, keep {kept} of {visual_tokens}",
            hint=f"use --keep {wanted.min_tokens / visual_tokens:.3g} or more, or another pruner",
        )


def check_fraction(keep: float) -> None:
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
    check_fraction(keep)
    kept = int(keep * visual_tokens + 0.5)
    if kept == 0:
        raise RecipeError(
            f"keeps none of {visual_tokens} tokens",
            subject=f"keep {keep:g}",
            hint=f"{1 / visual_tokens:.2g} keeps one of them",
        )
    return kept


def share_of(keep: float, tokens: int, at_least: int) -> int:
    """K of an image with so many tokens: the nearest count, but no fewer than the pruner can give, or all.

    For images that differ in size: one with few tokens must not fail where others do not.

    Args:
        keep: in (0, 1].
        tokens: of the image.
        at_least: smallest count that the pruner can give.
    """
    return min(tokens, max(at_least, int(keep * tokens + 0.5)))
