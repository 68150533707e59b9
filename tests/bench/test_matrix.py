"""`bench/matrix.py`: which cells there are, how they are judged by the table, and how an interrupted run continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gap_export import families, prune
from gap_export.checkpoint.random_weights import published
from gap_export.recipe.recipe import known_recipes, load_recipe
from tests.families.reduced import EOS, IMAGE_TOKEN, VOCABULARY, reduced


@pytest.fixture
def matrix(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("matrix")


def test_cells_are_those_of_the_tables(matrix: ModuleType) -> None:
    cells = list(matrix.cells())
    recipes = set(known_recipes()) - {"shapes"}
    pruners = set(prune.names()) - {"none"}
    assert {(cell.recipe, cell.pruner) for cell in cells} == {
        (recipe, pruner) for recipe in recipes for pruner in pruners
    }
    assert len(cells) == len(recipes) * len(pruners)
    for cell in cells:
        assert cell.family == load_recipe(cell.recipe).family
        assert (cell.pruner in families.row(cell.family).pruners) == (cell.lacks == "")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("qwen2_vl,dart", [("qwen2-vl", "dart")]),
        ("qwen2-vl,dart", [("qwen2-vl", "dart")]),
        ("llava,dart", [("llava", "dart"), ("llava-13b", "dart")]),
        ("llava-13b,dart", [("llava-13b", "dart")]),
    ],
)
def test_cells_of_a_family_or_a_recipe(matrix: ModuleType, text: str, found: list[tuple[str, str]]) -> None:
    cells = list(matrix.cells())
    assert [(cell.recipe, cell.pruner) for cell in matrix.only(cells, text)] == found
    assert list(matrix.only(cells, "")) == cells
    assert {cell.pruner for cell in matrix.only(cells, "shikra")} == set(prune.names()) - {"none"}
    with pytest.raises(SystemExit, match="no such cell"):
        list(matrix.only(cells, "shikra,none"))


def cell_of(matrix: ModuleType, pruner: str, lacks: str = "") -> Any:
    return matrix.Cell("llava", "llava", pruner, lacks)


def test_what_the_table_says_is_held_against_what_happens(matrix: ModuleType) -> None:
    works, refused, failed = (matrix.Outcome(result, "why") for result in ("works", "refused", "failed"))
    yes, no = cell_of(matrix, "dart"), cell_of(matrix, "fastv", "images of one size")
    assert [matrix.agrees(yes, each) for each in (works, refused, failed)] == [True, False, False]
    assert [matrix.agrees(no, each) for each in (works, refused, failed)] == [False, True, False]
    found = matrix.summary({yes: failed, no: refused})
    assert (found["cells"], found["works"], found["refused"], found["failed"]) == (2, 0, 1, 1)
    assert [entry["pruner"] for entry in found["against_the_table"]] == ["dart"]
    assert found["refused_by_reason"] == {
        "why": {"table": "images of one size", "cells": [["llava", "fastv"]]}
    }
    assert found["matrix"] == {"llava": {"dart": "failed", "fastv": "refused"}}


def test_a_reason_is_the_line_that_is_about_the_pruner(matrix: ModuleType) -> None:
    message = "recipe: pruner fastv: needs  images of one size\n  hint: use another\n"
    assert matrix.reason_in(message, "fastv") == "recipe: pruner fastv: needs images of one size"
    assert matrix.reason_in("recipe: pruner fastv, keep 0.25: has none left\n", "fastv") != ""
    # Another pruner, and another fault of the recipe.
    assert matrix.reason_in(message, "dart") == ""
    assert matrix.reason_in("checkpoint: there: is no folder\n", "fastv") == ""


def test_an_interrupted_run_continues(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, cell, outcome = (
        tmp_path / "cells.jsonl",
        cell_of(matrix, "dart"),
        matrix.Outcome("works", tokens=(36, 9)),
    )
    assert matrix.read(log) == {}
    matrix.append(log, cell, matrix.Outcome("failed", "once"))
    matrix.append(log, cell, outcome)
    with log.open("a") as out:
        out.write(json.dumps({"sources": "x"})[:-3])  # killed while it was written
    assert matrix.read(log) == {cell: outcome}
    other = cell_of(matrix, "fastv")
    matrix.append(log, other, outcome)
    assert matrix.read(log) == {cell: outcome, other: outcome}, "it does not swallow the next"
    assert matrix.sources("llava") != matrix.sources("qwen2-vl")
    monkeypatch.setattr(matrix, "sources", lambda recipe: "another")
    assert matrix.read(log) == {}


def test_a_checkpoint_that_is_there_is_of_the_same_sources(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = matrix.small_checkpoints
    written: list[Path] = []

    def write(folder: Path) -> None:
        (folder / "checkpoint").mkdir()
        written.append(folder)

    monkeypatch.setitem(made._ORIGINALS, "shikra", write)
    monkeypatch.setattr(made, "_ensure_clip", lambda folder: folder)
    recipe = load_recipe("shikra")
    names = {path.name for path in made.sources()}
    assert {"small_checkpoints.py", "reduced.py", "plain_models.py", "random_weights.py"} <= names
    first = made.ensure(recipe, tmp_path / "shikra")
    assert made.ensure(recipe, tmp_path / "shikra") == first
    assert len(written) == 1
    changed = tmp_path / "reduced.py"
    changed.write_text("VOCABULARY = 5")
    monkeypatch.setattr(made, "sources", lambda: [changed])
    second = made.ensure(recipe, tmp_path / "shikra")
    assert len(written) == 2
    assert all(second[name] != first[name] for name in first)


def generation(**changes: Any) -> Any:
    values = {
        "every_kept_indices": (np.array([[1, 4]]),),
        "tokens": [[5, 6]],
        "logits": [np.array([[1.0, -4.0]]), np.array([[2.0, 3.0]])],
        **changes,
    }
    return SimpleNamespace(generation=SimpleNamespace(**values))


def test_answers_are_compared_in_all_that_matters(matrix: ModuleType) -> None:
    reference = generation()
    assert matrix.difference(generation(), reference) == ""
    near = [logits + 1e-4 for logits in reference.generation.logits]
    assert matrix.difference(generation(logits=near), reference) == ""
    assert "keeps" in matrix.difference(generation(every_kept_indices=(np.array([[1, 5]]),)), reference)
    assert "answers" in matrix.difference(generation(tokens=[[5, 7]]), reference)
    far = [reference.generation.logits[0], reference.generation.logits[1] + 0.01]
    assert "logits differ" in matrix.difference(generation(logits=far), reference)


@pytest.mark.parametrize("name", ["Qwen/Qwen2-VL-7B-Instruct", "llava-hf/llava-1.5-7b-hf"])
def test_special_tokens_get_the_ids_of_the_small_table(
    script: Callable[[str], ModuleType], name: str
) -> None:
    small, original = script("small_checkpoints"), published(name)
    family = "qwen2_vl" if name.startswith("Qwen") else "llava"
    ids = small.special_ids(original.special_tokens, original.config, reduced(name, family)[0])
    assert list(ids) == list(original.special_tokens)
    assert len(set(ids.values())) == len(ids)
    assert max(ids.values()) < VOCABULARY
    placeholder, end = ("<|image_pad|>", "<|im_end|>") if family == "qwen2_vl" else ("<image>", "</s>")
    assert (ids[placeholder], ids[end]) == (IMAGE_TOKEN, EOS)
