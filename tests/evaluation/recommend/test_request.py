"""Which pruners and shares are tried, in how many bundles, and why others are not."""

from __future__ import annotations

from typing import Any

import pytest

from gap_export.bundle.manifest import ModelSpec
from gap_export.errors import InputError, RecipeError
from gap_export.evaluation.recommend import request as requests
from gap_export.evaluation.recommend.request import BASELINE, Place, Variant, plan_variants
from gap_export.recipe.recipe import Recipe
from tests.evaluation.recommend.conftest import RequestOf

FACTS = ModelSpec(
    hidden_size=32, layers=2, attention_heads=4, kv_heads=2, head_dim=8, vocabulary=64, visual_tokens=36, grid=(6, 6), max_positions=256
)  # fmt: skip


def test_one_bundle_of_a_pruner_answers_all_its_shares(request_of: RequestOf) -> None:
    request = request_of()
    variants, left_out = plan_variants(request, FACTS)
    assert variants == [Variant("random", (0.5, 0.25)), Variant("divprune", (0.5, 0.25))]
    assert not left_out
    first = variants[0]
    assert first.points == (Place("random", 0.5), Place("random", 0.25))
    assert [first.keep_of(place) for place in first.points] == [0.5, 0.25]
    recipe = first.recipe(request)
    assert (recipe.pruner, recipe.keep, recipe.capacity) == ("random", (0.25, 0.25, 0.5), None)


def test_the_unpruned_model_is_a_bundle_of_its_own(request_of: RequestOf) -> None:
    recipe = BASELINE.recipe(request_of())
    assert (recipe.pruner, recipe.keep) == ("none", 1.0)
    assert BASELINE.keep_of(BASELINE.points[0]) is None


def test_where_the_planner_takes_no_range_every_share_has_a_bundle(
    request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_for = requests.plan_for

    def without_ranges(recipe: Recipe, *args: Any) -> Any:
        if isinstance(recipe.keep, tuple) and recipe.pruner == "random":
            raise RecipeError("takes one share", subject="random", hint="")
        return plan_for(recipe, *args)

    monkeypatch.setattr(requests, "plan_for", without_ranges)
    request = request_of()
    variants, left_out = plan_variants(request, FACTS)
    assert variants == [
        Variant("random", (0.5,)),
        Variant("random", (0.25,)),
        Variant("divprune", (0.5, 0.25)),
    ]
    assert not left_out
    assert variants[0].recipe(request).keep == 0.5
    assert variants[0].keep_of(Place("random", 0.5)) is None


def test_what_cannot_be_is_left_out_with_its_reason(request_of: RequestOf) -> None:
    """Too few tokens for one, nothing to look at for others; the rest is tried."""
    request = request_of(pruners=("visionzip", "trim", "vispruner", "random"), keeps=(0.5, 0.25, 0.02))
    variants, left_out = plan_variants(request, FACTS)
    assert variants == [
        Variant("visionzip", (0.5, 0.25)),
        Variant("vispruner", (0.5, 0.25, 0.02)),
        Variant("random", (0.5, 0.25, 0.02)),
    ]
    assert [(each.pruner, each.keeps) for each in left_out] == [
        ("visionzip", (0.02,)),
        ("trim", (0.5, 0.25, 0.02)),
    ]
    assert "keeps at least 2 tokens" in left_out[0].reason
    assert "has no text tower" in left_out[1].reason


def test_nothing_that_works_is_refused(request_of: RequestOf) -> None:
    with pytest.raises(RecipeError, match=r"pruner trim: cannot be asked: .*has no text tower"):
        plan_variants(request_of(pruners=("trim",)), FACTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pruners": ("rando",)}, "is not a pruner"),
        ({"pruners": ("none",)}, "always measured"),
        ({"pruners": ("dart", "dart")}, "is listed twice"),
        ({"pruners": ()}, "pruners: are none"),
        ({"keeps": (0.5, 1.5)}, "above 0"),
        ({"keeps": (0.5, 0.5)}, "is listed twice"),
        ({"keeps": (1.0,)}, "keep 1: is not below 1"),
        ({"keeps": ()}, "is not below 1"),
        ({"limit": 0}, "from 1 to"),
        ({"requests": 0}, "from 1 to"),
        ({"threads": -1}, "from 0 to"),
    ],
)
def test_what_cannot_be_asked_for(changes: dict[str, Any], words: str, request_of: RequestOf) -> None:
    with pytest.raises((RecipeError, InputError), match=words):
        request_of(**changes)


def test_shares_that_are_the_same_and_recipes_that_work_nowhere(request_of: RequestOf) -> None:
    with pytest.raises(RecipeError, match="keep the same 9 of 36"):
        plan_variants(request_of(keeps=(0.25, 0.26)), FACTS)
    with pytest.raises(RecipeError, match="the model knows 40"):
        plan_variants(request_of(), FACTS.model_copy(update={"max_positions": 40}))


def test_a_capacity_of_the_recipe_does_not_bind_its_bundles(request_of: RequestOf) -> None:
    variants, left_out = plan_variants(request_of({"capacity": 38}), FACTS)
    assert (len(variants), len(left_out)) == (2, 0)
