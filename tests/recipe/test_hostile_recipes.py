"""Recipes of people who do not mean well, or mistype: every field with values that it should not have, in a file and as an option."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gap_export.errors import RecipeError
from gap_export.recipe import recipe as module
from gap_export.recipe.ranges import Ranges, read_ranges
from gap_export.recipe.recipe import Recipe, load_recipe, plain_name
from tests.recipe.test_ranges import RANGES

VALUES: tuple[Any, ...] = (
    True, 0, -1, 10**9 + 1, 10**18, 10**400, 1.5, float("nan"), float("inf"), -float("inf"), 1e300, "", "x" * 10**5, "../../x", "[/red]",
    "a\nb", "\0", "1_000", "nan", "0.1:nan", "1e999", [], {}, [[1]], [True], ["x"] * 1000, list(range(200)), {"x": 1}, {"min_box_iou": "x"},
    {"max_logit_difference": float("inf")}, {"max_logit_difference": float("nan")}, {"min_box_iou": -float("inf")},
)  # fmt: skip
NUMBERS = (
    "keep_bound",
    "seed",
    "max_new_tokens",
    "max_text",
    "max_batch",
    "capacity",
    "images",
    "max_pixels",
)


def _yaml(value: Any) -> str:
    text = json.dumps(value)
    return text.replace("NaN", ".nan").replace("-Infinity", "-.inf").replace("Infinity", ".inf")


def _accepted(field: str, value: Any, folder: Path) -> bool:
    """Whether a recipe file with the value is read; what is refused is told in one line that names the field."""
    file = folder / "mine.yaml"
    content = {"checkpoint": "x", field: value}
    file.write_text("".join(f"{name}: {_yaml(each)}\n" for name, each in content.items()))
    try:
        load_recipe(str(file))
    except RecipeError as error:
        _told(error, field)
        return False
    return True


def _told(error: RecipeError, field: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 1500
    assert field in text or "cannot be read as YAML" in text
    assert "Input should" not in text


@pytest.mark.parametrize("field", Recipe.model_fields)
def test_a_field_with_other_values(field: str, tmp_path: Path) -> None:
    accepted = [value for value in VALUES if _accepted(field, value, tmp_path)]
    if field in NUMBERS:
        harmless = [0, 1.5, 10**9 + 1] if field == "seed" else []
        assert [value for value in accepted if value not in harmless] == []
    if field in (
        "keep",
        "precision",
        "gates",
        "positions",
        "weights",
        "targets",
        "compute_capabilities",
        "fit",
        "box_format",
    ):
        assert all(value in ([], {}) for value in accepted), accepted


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("name", "../x", "name '../x': becomes the name of files"),
        ("name", ".x", "name '.x': becomes the name of files"),
        ("name", "a" * 101, "becomes the name of files"),
        ("name", "-x", "becomes the name of files"),
        ("name", "[/red]", "becomes the name of files"),
        ("seed", True, "seed True: is not a whole number from 0"),
        ("max_batch", 10**9, "max_batch 1000000000: is not a whole number from 1 to 4096"),
        ("max_text", "128", "max_text '128': is not a whole number"),
        ("box_format", "list_pixel", "box_format 'list_pixel': is not a box format; did you mean 'list_pixels'?"),
        ("keep", True, "keep True: is the fraction"),
        ("compute_capabilities", [8.6], "compute_capabilities.0 8.6: must be text"),
        ("compute_capabilities", ["8.66"], "compute_capabilities.0 '8.66': must be as in"),
        ("gates", {"max_logit_difference": float("inf")}, "gates.max_logit_difference inf: must be a finite number"),
        ("kep", 0.5, "kep 0.5: is not a field here"),
        ("prune_layers", ["x"], "prune_layers.0 'x': is not a whole number"),
    ],
)  # fmt: skip
def test_what_is_said(field: str, value: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"checkpoint: x\n{field}: {_yaml(value)}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file))
    assert said in caught.value.message
    assert caught.value.subject == str(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: &a [x]\nb: *a\n", "has an alias"),
        ("checkpoint: x\n<<: {keep: 0.5}\n", "a key that is no plain text"),
        ("checkpoint: x\ncheckpoint: y\n", "checkpoint stands twice"),
        ("checkpoint: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
        ("[" * 1000, "nested too deeply"),
        ("- x\n", "is not a mapping"),
        ("", "is not a mapping"),
        ("seed: " + "9" * 5000, "cannot be read as YAML"),
        ("# x\n" * 100_000, "a recipe has at most"),
        ("checkpoint: \x00", "is not YAML"),
        ("{", "is not YAML"),
    ],
)
def test_files_that_are_no_recipes(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(str(file))
    assert caught.value.subject.startswith(str(file))


def test_what_lies_in_its_place(tmp_path: Path) -> None:
    """A pipe would be waited for."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to("nowhere")
    for name, said in (
        ("pipe", "is a pipe"),
        ("link", "No such file"),
        ("none", "No such file"),
        ("x" * 300, "too long"),
    ):
        with pytest.raises(RecipeError, match=said):
            load_recipe(str(tmp_path / f"{name}.yaml"))
    assert load_recipe(str(tmp_path / "folder.yaml")).checkpoint == str(tmp_path / "folder.yaml"), (
        "a checkpoint"
    )
    with pytest.raises(RecipeError, match="is not a recipe, a folder or a hub id"):
        load_recipe("x\0" * 10**5)


@given(name=st.text(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_name_is_made_of_any_folders(name: str) -> None:
    """Where a recipe has none of its own, it is made of a folder's, a file's or a repository's, and is one."""
    made = plain_name(name)
    assert Recipe(name=made, checkpoint="x").name == made
    assert plain_name(made) == made


def test_folders_and_files_of_any_name_make_a_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "mein Modell [v2]"
    folder.mkdir()
    assert load_recipe(str(folder)).name == "mein-Modell-v2"
    file = tmp_path / "my recipe.yaml"
    file.write_text("checkpoint: x\n")
    assert load_recipe(str(file)).name == "my-recipe"
    assert load_recipe("owner/name@v1.0").name == "name@v1.0"


def test_without_the_bounds_they_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    assert not _accepted("max_batch", 10**9, tmp_path)
    monkeypatch.setattr("gap_export.bounds.Bound.holds", lambda self, value: True)
    assert _accepted("max_batch", 10**9, tmp_path)
    assert not _accepted("name", "../x", tmp_path)
    monkeypatch.setattr(module, "_NAME", module.re.compile(".*"))
    assert _accepted("name", "../x", tmp_path)


# Ranges


@pytest.mark.parametrize("field", Ranges.model_fields)
def test_ranges_with_other_values(field: str, tmp_path: Path) -> None:
    file, refused = tmp_path / "ranges.json", 0
    others = [value for value in VALUES if not isinstance(value, str)] + [
        {"a": -1.0},
        {"a": True},
        {"a": "1"},
        {"a": float("nan")},
    ]
    for value in others:
        file.write_text(json.dumps({**RANGES.model_dump(), field: value}))
        try:
            read_ranges(file)
        except RecipeError as error:
            assert_one_line(error)
            refused += 1
        else:
            assert (
                value == {}
                or (field == "samples" and value in (10**9 + 1, 10**18))
                or (field == "largest" and value == {"x": 1})
            )
    assert refused > 20


def assert_one_line(error: RecipeError) -> None:
    assert "\n" not in str(error)


def test_ranges_that_are_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ranges.json")
    with pytest.raises(RecipeError, match="is a pipe"):
        read_ranges(tmp_path / "ranges.json")
