"""From a recipe and the sizes of a model to the numbers that shape the graphs, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass

from gap_export import prune
from gap_export.bundle import ModelFacts, Precision
from gap_export.errors import RecipeError
from gap_export.positions import MergedId, PositionPolicy
from gap_export.recipe import Recipe

_CAPACITY_STEP = 16


@dataclass(frozen=True)
class Plan:
    """The numbers that shape a build's graphs, after recipe and checkpoint have been read.

    Attributes:
        precision: element type of weights and activations.
        pruner: strategy.
        kept: K.
        positions: numbering policy.
        seed: for strategies that draw at random.
        merged_id: for strategies that merge.
        capacity: cache slots C.
        max_text: text tokens of the longest prompt, placeholder included.
        max_batch: most rows per call.
    """

    precision: Precision
    pruner: str
    kept: int
    positions: PositionPolicy
    seed: int
    merged_id: MergedId
    capacity: int
    max_text: int
    max_batch: int


def plan_for(recipe: Recipe, facts: ModelFacts) -> Plan:
    """The numbers that shape the graphs.

    Raises:
        RecipeError: numbers that contradict each other or the model.
    """
    strategy = prune.strategy(recipe.pruner)
    kept = prune.kept_count(recipe.keep, facts.visual_tokens)
    prune.require_tower(strategy, facts.tower_lacks)
    prune.require_count(strategy, kept, facts.visual_tokens)
    longest_answer = recipe.max_text - 1 + facts.visual_tokens + recipe.max_new_tokens
    if longest_answer > facts.max_positions:
        raise RecipeError(
            f"positions up to {longest_answer} are needed (unpruned), the model knows {facts.max_positions}",
            subject="max_text + max_new_tokens",
            hint="lower max_text or max_new_tokens",
        )
    # One slot more than the longest answer needs: `validate` writes one too far on purpose.
    needed = recipe.max_text - 1 + kept + recipe.max_new_tokens + 1
    if recipe.capacity is not None and recipe.capacity < needed:
        raise RecipeError(
            f"is too small: {recipe.max_text} text tokens, {kept} visual tokens and {recipe.max_new_tokens} new tokens "
            f"need {needed}",
            subject=f"capacity {recipe.capacity}",
            hint=f"use at least {needed}, or lower max_text, keep or max_new_tokens",
        )
    return Plan(
        precision=recipe.precision,
        pruner=recipe.pruner,
        kept=kept,
        positions=recipe.positions,
        seed=recipe.seed,
        merged_id=recipe.merged_id,
        capacity=recipe.capacity or -(-needed // _CAPACITY_STEP) * _CAPACITY_STEP,
        max_text=recipe.max_text,
        max_batch=recipe.max_batch,
    )
