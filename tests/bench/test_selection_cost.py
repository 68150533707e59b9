"""`bench/selection_cost.py`: what is timed against what, and how shares are computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from gap_export.checkpoint.random_weights import published
from gap_export.recipe.recipe import load_recipe


@pytest.fixture
def cost(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("selection_cost")


def test_sizes_are_the_published_ones(cost: ModuleType) -> None:
    assert [case.tokens for case in cost.CASES] == [576, 1280, 2880]


def test_a_shallow_tower_differs_in_its_depth_alone(cost: ModuleType) -> None:
    for case in cost.CASES:
        tower = published(load_recipe(case.recipe).checkpoint).config["vision_config"]
        shallow = case.shallow(tower)
        changed = {name for name in tower if shallow[name] != tower[name]}
        assert changed in ({"num_hidden_layers"}, {"depth", "fullatt_block_indexes"})
        # The last layer is one that attends to all, as in the whole tower.
        assert tower.get("fullatt_block_indexes", [31])[-1] == 31
        assert shallow.get("fullatt_block_indexes", [0])[-1] == shallow.get("depth", 1) - 1


def test_a_checkpoint_of_another_configuration_lies_elsewhere(cost: ModuleType) -> None:
    (case, *_), original = cost.CASES, published(load_recipe("llava").checkpoint)
    deeper = replace(original, config={**original.config, "num_hidden_layers": 5})
    names = [cost.checkpoint_name(case, "whole", content) for content in (original, original, deeper)]
    assert names[0] == names[1] != names[2]


def test_graphs_are_timed_in_turns_and_the_first_round_warms_up(cost: ModuleType) -> None:
    calls: list[str] = []

    def graph(name: str) -> Callable[[], float]:
        def run() -> float:
            calls.append(name)
            return float(len(calls))

        return run

    assert cost.in_turns((graph("own"), graph("random")), 2) == [(3.0, 4.0), (5.0, 6.0)]
    assert calls == ["own", "random"] * 3


def test_shares_are_of_the_whole_graph(cost: ModuleType) -> None:
    found = cost.shares(
        {"dart": [0.2, 0.1, 0.3], "trim": [1.0, 1.1, 1.2]}, "trim", [(11.0, 10.0), (11.2, 10.0)]
    )
    assert found["pruners"]["dart"] == {"seconds": 0.2, "share": 0.02, "smallest": 0.01, "largest": 0.03}
    assert found["pruners"]["trim"]["share"] == 0.11
    assert found["checked"] == {
        "pruner": "trim",
        "in_the_whole_graph": 0.11,
        "smallest": 0.1,
        "largest": 0.12,
        "behind_few_layers": 0.11,
        "same": True,
    }
    assert found["ok"]
    assert found["above_the_limit"] == []


def test_what_costs_too_much_is_said(cost: ModuleType) -> None:
    found = cost.shares({"dart": [0.2], "trim": [2.0]}, "trim", [(12.0, 10.0)])
    assert found["checked"]["same"]
    assert found["above_the_limit"] == ["trim"]
    assert not found["ok"]


def test_two_ways_to_measure_that_disagree_are_a_fault(cost: ModuleType) -> None:
    found = cost.shares({"dart": [0.2], "trim": [1.0]}, "trim", [(12.0, 10.0)])
    assert not found["checked"]["same"]
    assert found["above_the_limit"] == []
    assert not found["ok"]


def test_models_that_are_not_measured_keep_what_was_found(
    cost: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost.harness, "RESULTS", tmp_path)
    assert cost.stored() == {}
    models = [{"recipe": "llava", "tokens": 576}, {"recipe": "llava-next", "tokens": 2880}]
    (tmp_path / "selection_cost.json").write_text(json.dumps({"models": models}))
    found = {**cost.stored(), "qwen2.5-vl": {"recipe": "qwen2.5-vl", "tokens": 1280}}
    assert [model["recipe"] for model in cost.in_order(found)] == ["llava", "qwen2.5-vl", "llava-next"]
