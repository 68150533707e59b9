"""Graphs with copied layers against graphs whose layers were all traced, of any family: its small checkpoint is made deeper for that."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gap_export.bundle.spec import GraphName
from gap_export.pipeline.opened import open_model
from gap_export.plan import plan_for
from gap_export.recipe.recipe import Recipe
from tests.graph.traced import traced

MORE = 5
"""Layers that are added to every stack: then there are at least seven, and some to spare."""

_LAYER = re.compile(r"(.*\b(?:layers|layer|blocks)\.)(\d+)(\..*)")
_DEPTHS = ("num_hidden_layers", "depth")
_PLACES = ("checkpoint", "base", "vision_tower", "text_tower")


def assert_equal_both_ways(options: dict[str, Any], folder: Path, *, copied: Collection[GraphName]) -> None:
    """Trace every graph with layers in both ways.

    Args:
        options: of a recipe.
        folder: for deeper checkpoints.
        copied: graphs in which layers must have been copied; any other may have been traced whole.
    """
    places = {name: deepened(Path(options[name]), folder / name) for name in _PLACES if name in options}
    recipe = Recipe.model_validate({"name": "deep", **options, **places})
    model = open_model(recipe)
    plan = plan_for(recipe, model.spec, model.text_tower)
    made = set()
    for component in model.components(plan):
        if component.layers is not None and component.layers.passed_by:
            mine, whole = traced(component), traced(component, whole=True)
            assert mine.content == whole.content, component.spec.name
            if "copies" in mine.how:
                made.add(component.spec.name)
    assert made == set(copied)


def deepened(source: Path, target: Path) -> str:
    """A copy of a checkpoint in which every stack of layers is deeper by copies of its last."""
    if source.is_file():
        target.mkdir(parents=True)
        torch.save(_deeper(torch.load(source)), target / source.name)
        return str(target / source.name)
    shutil.copytree(source, target)
    for path in target.iterdir():
        if path.suffix == ".safetensors":
            save_file(_deeper(load_file(path)), path)
        elif path.name == "config.json":
            path.write_text(json.dumps(_deeper_config(json.loads(path.read_text()))))
    return str(target)


def _deeper(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = [match for match in map(_LAYER.fullmatch, weights) if match is not None]
    last = {match[1]: max(int(each[2]) for each in found if each[1] == match[1]) for match in found}
    added = {
        f"{match[1]}{number}{match[3]}": weights[match[0]].clone()
        for match in found
        if int(match[2]) == last[match[1]]
        for number in range(last[match[1]] + 1, last[match[1]] + 1 + MORE)
    }
    return {**weights, **added}


def _deeper_config(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {
        name: value + MORE if name in _DEPTHS else _deeper_config(value) for name, value in config.items()
    }
