"""Recipes: what is known, what is refused and how it is said, what gates are in force."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gap_export.errors import RecipeError
from gap_export.precision import PRECISIONS, Thresholds
from gap_export.recipe.recipe import Recipe, known_recipes, load_recipe


def recipe(**given: Any) -> Recipe:
    return Recipe.model_validate({"name": "x", "checkpoint": "y", **given})


@pytest.mark.parametrize("name", sorted(known_recipes()))
def test_recipes_that_come_along_are_valid(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.name == name
    assert loaded.summary
    assert loaded.prompt is None or loaded.prompt.count("{expression}") == 1


def test_a_file_may_leave_out_its_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("checkpoint: somewhere\nkeep: 0.5\n")
    assert (load_recipe(str(path)).name, load_recipe(str(path)).keep) == ("mine", 0.5)


def test_relative_names_are_looked_for_beside_the_recipe_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working, recipes = tmp_path / "working", tmp_path / "recipes"
    for folder in (
        recipes / "both",
        recipes / "owner" / "name",
        working / "both",
        working / "here",
        tmp_path / "up",
    ):
        folder.mkdir(parents=True)
    monkeypatch.chdir(working)
    (recipes / "tower.pth").symlink_to(tmp_path / "up")

    def loaded(name: str, field: str = "checkpoint") -> str:
        content = {"checkpoint": "x", field: name}
        (recipes / "mine.yaml").write_text("".join(f"{key}: {value}\n" for key, value in content.items()))
        stored: str = getattr(load_recipe("../recipes/mine.yaml"), field)
        return stored

    for field in ("checkpoint", "base", "vision_tower", "text_tower", "ranges"):
        for name in ("both", "./both", "../recipes/both"):
            assert loaded(name, field) == str(recipes / "both")
        for name in ("here", "./here", "nowhere/at/all", "owner/other", "bundled:x", str(working / "here")):
            assert loaded(name, field) == name
        assert loaded("../up", field) == str(tmp_path / "up")
        assert loaded("owner/name", field) == str(recipes / "owner" / "name")
        assert loaded("tower.pth", field) == str(recipes / "tower.pth")
    assert load_recipe(str(recipes / "mine.yaml")).replaced(ranges="both").ranges == "both", (
        "typed ones are left"
    )


def test_folders_and_hub_ids_make_a_recipe_of_their_own(tmp_path: Path) -> None:
    assert load_recipe(str(tmp_path)).checkpoint == str(tmp_path)
    hub = load_recipe("owner/some-model")
    assert (hub.name, hub.checkpoint) == ("some-model", "owner/some-model")


@pytest.mark.parametrize("model", ["shape", "lava", "./nothing/here", "/no/where", "a/b/c"])
def test_what_is_none_of_these_is_refused(model: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(model)


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan"), float("inf"), "many", None])
def test_keep_is_a_fraction(keep: Any) -> None:
    with pytest.raises(ValidationError):
        recipe(keep=keep)
    assert recipe(keep=1).keep == 1


def test_replacing_validates_again_and_leaves_out_what_is_none() -> None:
    base = recipe(keep=0.5, capacity=100)
    assert base.replaced(keep=None, pruner=None) == base
    changed = base.replaced(keep=0.25, targets=["onnx", "tensorrt-rtx"])
    assert (changed.keep, changed.targets, changed.capacity) == (0.25, ("onnx", "tensorrt-rtx"), 100)
    for wrong in ({"keep": 2.0}, {"precision": "fp6"}, {"positions": "packed"}, {"seed": -1}, {"kep": 0.5}):
        with pytest.raises(RecipeError) as caught:
            base.replaced(**wrong)
        assert next(iter(wrong)) in caught.value.message


def test_the_value_given_is_shown() -> None:
    with pytest.raises(RecipeError, match=r"keep 1\.5: is the fraction of visual tokens kept"):
        recipe().replaced(keep=1.5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gates_are_those_of_the_precision_unless_given(precision: str) -> None:
    assert recipe(precision=precision).thresholds == PRECISIONS[precision].gates
    strict = recipe(precision=precision, gates={"max_logit_difference": 1e-6})
    assert strict.thresholds.max_logit_difference == 1e-6
    with pytest.raises(ValidationError):
        recipe(gates={"max_logit_diference": 1e-6})


@pytest.mark.parametrize("field", [each.name for each in fields(Thresholds)])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), ".inf", 1e400])
def test_gates_are_numbers(field: str, value: Any) -> None:
    """JSON has no word for others: a bundle that stored one could not be read."""
    with pytest.raises(ValidationError):
        recipe(gates={field: value})
    if isinstance(value, float):
        with pytest.raises(ValueError, match="must be a number"):
            Thresholds(**{field: value})


def test_no_default_gate_lets_everything_pass() -> None:
    """Logits of quantised weights differ wherever one looks; there, boxes, tokens and accuracy are what is demanded."""
    for precision in ("int8", "int4", "int4-fp16", "fp8"):
        low = PRECISIONS[precision].gates
        assert low.min_box_iou >= 0.9
        assert low.min_token_agreement >= 0.8
        assert low.max_accuracy_drop <= 0.02
    for row in PRECISIONS.values():
        bits = 4 if row.decoder in ("uint4", "int4", "nvfp4") else 8 if row.quantizes else 16
        most_rise, most_kl, least_top1 = {4: (0.4, 0.4, 0.7), 8: (0.03, 0.02, 0.9), 16: (5e-3, 1e-3, 0.98)}[
            bits
        ]
        assert row.gates.max_perplexity_rise <= most_rise
        assert row.gates.max_mean_kl <= most_kl
        assert row.gates.min_top1_agreement >= least_top1
        assert {row.gates.max_logit_difference, row.gates.max_relative_logit_difference} != {None}
    # Activations of four bits move boxes; they must hit as often all the same.
    four_bits = PRECISIONS["nvfp4"].gates
    assert four_bits.min_box_iou >= 0.75
    assert four_bits.min_token_agreement >= 0.7
    assert four_bits.max_accuracy_drop <= 0.05
    for gates in (Thresholds(), *(PRECISIONS[name].gates for name in ("fp32", "fp16", "bf16"))):
        absolute, relative = gates.max_logit_difference, gates.max_relative_logit_difference
        assert (absolute is not None and absolute < 1) or (relative is not None and relative <= 0.05)
        assert gates.min_logit_cosine > 0.99
        assert gates.min_token_agreement >= 0.95
        assert gates.min_kept_sets_equal >= 0.95
        assert gates.max_accuracy_drop <= 0.01


def test_what_a_bundle_stores_is_the_recipe_again() -> None:
    stored = recipe(keep=0.5, targets=["onnx", "tensorrt"], gates=Thresholds()).model_dump(mode="json")
    assert Recipe.model_validate(stored) == recipe(keep=0.5, targets=["onnx", "tensorrt"], gates=Thresholds())


def test_a_recipe_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError):
        recipe().keep = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        ("0.25", 0.25),
        ("0.1:1.0", (0.1, 0.25, 1.0)),
        ([0.1, 1.0], (0.1, 0.25, 1.0)),
        ("0.5:1", (0.5, 0.5, 1.0)),
        ("0.05:0.1", (0.05, 0.1, 0.1)),
        ("0.1:0.3:0.5", (0.1, 0.3, 0.5)),
        ("adaptive", "adaptive"),
    ],
)
def test_keep_may_be_a_range_or_adaptive(typed: Any, stored: Any) -> None:
    read = recipe(keep=typed)
    assert read.keep == stored
    assert Recipe.model_validate(read.model_dump(mode="json")) == read


@pytest.mark.parametrize("keep", ["", ":", "0.5:", "a:b", "1.0:0.1", "0.3:0.3", "0.1:0.7:0.5", "0:1", [0.1, 0.2, 0.3, 0.4], [], "adapt"])  # fmt: skip
def test_a_range_goes_from_the_smallest_to_the_largest(keep: Any) -> None:
    with pytest.raises(ValidationError):
        recipe(keep=keep)


def test_devices_are_those_that_know_the_precision() -> None:
    assert recipe().devices == ("8.6", "8.9", "12.0")
    assert recipe(precision="fp8").devices == ("8.9", "12.0")
    assert recipe(precision="nvfp4").devices == ("12.0",)
    assert recipe(precision="fp8", compute_capabilities=["12.0"]).devices == ("12.0",)
