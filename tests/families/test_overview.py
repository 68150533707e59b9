"""What is said of families without a checkpoint is what their code says of one."""

from __future__ import annotations

from gap_export import prune
from gap_export.boxes.codecs import CODECS
from gap_export.families import FAMILIES
from gap_export.families.overview import OVERVIEW
from gap_export.recipe.recipe import known_recipes, load_recipe


def test_every_family_is_there() -> None:
    assert set(OVERVIEW) == set(FAMILIES)


def test_boxes_are_those_of_the_family() -> None:
    import importlib

    for name, overview in OVERVIEW.items():
        family = importlib.import_module(FAMILIES[name])
        recipe = load_recipe("llava").replaced(fit=None).model_copy(update={"fit": None})
        assert family.box(recipe) == overview.box
        assert overview.box.codec in CODECS


def test_every_recipe_is_of_a_family_and_asks_for_what_works() -> None:
    for name in known_recipes():
        recipe = load_recipe(name)
        assert recipe.family in OVERVIEW, name
        assert recipe.pruner in OVERVIEW[recipe.family].pruners
        assert recipe.summary


def test_strategies_follow_from_what_there_is() -> None:
    assert set(OVERVIEW["llava"].pruners) == set(prune.names())
    assert set(OVERVIEW["llava_onevision"].pruners) == {"divprune", "dart", "random", "none"}
    assert "fastv" in OVERVIEW["minigpt_v2"].pruners
    assert not {"trim", "prumerge", "visionzip"} & set(OVERVIEW["minigpt_v2"].pruners)
