"""The table of families: what is said without a checkpoint is what their code says of one."""

from __future__ import annotations

import dataclasses

import pytest

from gap_export import families, prune
from gap_export.boxes.codecs import CODECS
from gap_export.recipe.recipe import known_recipes, load_recipe


def test_a_second_row_of_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'llava' is in the table already"):
        families.register(dataclasses.replace(families.row("llava"), title="another"))
    assert families.row("llava").title == "LLaVA-1.5"


def test_boxes_have_a_codec() -> None:
    for name in families.names():
        assert families.row(name).box.codec in CODECS


def test_every_recipe_is_of_a_family_and_asks_for_what_works() -> None:
    for name in known_recipes():
        recipe = load_recipe(name)
        assert recipe.family in families.names(), name
        assert recipe.pruner in families.row(recipe.family).pruners
        assert recipe.summary


def test_pruners_follow_from_what_there_is() -> None:
    assert set(families.row("llava").pruners) == set(prune.names())
    by_attention = {"cls_attention", "tile_attention", "prumerge", "prumerge_plus", "visionzip", "vispruner"}
    without = {"divprune", "dart", "random", "spatial", "none", "text_similarity", "trim", "cdpruner"}
    inside = {"fastv", "pyramiddrop", "sparsevlm"}
    assert set(families.row("llava_onevision").pruners) == without | by_attention | inside
    assert {"fastv", "prumerge", "visionzip"} <= set(families.row("minigpt_v2").pruners)
    assert "trim" in families.row("minigpt_v2").pruners
    row = families.row("qwen3_vl")
    assert row.lacks(prune.row("visionzip")) == ""
    assert row.lacks(prune.row("spatial")) == ""
    assert row.lacks(prune.row("trim")) == ""
    assert row.lacks(prune.row("fastv")) == ""
    assert (
        dataclasses.replace(row, attention_mask="image_blocks").lacks(prune.row("fastv")) == "a causal mask"
    )
    assert (
        dataclasses.replace(row, missing_features=("attention",)).lacks(prune.row("visionzip")) == "attention"
    )


@pytest.mark.parametrize("name", families.names())
def test_every_row_leads_to_what_it_names(name: str) -> None:
    assert families.row(name).load()
    assert families.row(name).load_reference()
