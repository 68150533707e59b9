"""What linear layers read of a calibration text, in every family: against transformers' model with the same weights."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from gap_export.graph.quantize.calibration import Moments, hand_over_moments
from gap_export.pipeline.opened import open_model
from gap_export.plan import plan_for
from gap_export.progress import SILENT
from gap_export.recipe.recipe import Recipe
from tests.families.answers import TEMPLATES, Families, whole_model
from tests.families.tiny_families import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_moments_are_those_of_transformers(name: str, tiny_family: Families) -> None:
    tiny = tiny_family(name)
    options = {
        "name": name,
        "checkpoint": str(tiny.checkpoint),
        "prompt": TEMPLATES[1],
        "max_text": 24,
        "max_batch": 2,
    }
    recipe = Recipe.model_validate({**options, **FAMILIES[name].builds[1][0], "precision": "int4"})
    model = open_model(recipe)
    component = model.components(plan_for(recipe, model.spec, model.text_tower))[-1]
    whole = whole_model(tiny.checkpoint)
    decoder = whole.model.language_model
    linear = {
        path: component.weight_key(f"language_model.{path}.weight")
        for path, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    ids_BS = np.random.default_rng(1).integers(5, 60, (2, 24))
    found: dict[str, Any] = {}

    def receive(moments: Moments) -> None:
        found.update(dict.fromkeys(moments.keys, moments.moments_KK))

    wanted = {f"language_model.{path}.weight": key for path, key in linear.items()}
    hand_over_moments(receive, component, model.checkpoint, ids_BS, wanted, SILENT)

    watched: dict[str, list[torch.Tensor]] = {path: [] for path in linear}
    with ExitStack() as hooks, torch.no_grad():
        for path, rows in watched.items():
            read = partial(lambda rows, _, inputs: rows.append(inputs[0].flatten(0, -2)), rows)
            hooks.callback(decoder.get_submodule(path).register_forward_pre_hook(read).remove)
        decoder(inputs_embeds=whole.get_input_embeddings()(torch.from_numpy(ids_BS)))
    assert len(linear) >= 7
    assert set(found) == set(linear.values())
    for path, (rows,) in watched.items():
        moments_KK = (rows.double().T @ rows.double()).numpy()
        near = 1e-4 * moments_KK.diagonal().mean()
        np.testing.assert_allclose(found[linear[path]], moments_KK, rtol=1e-4, atol=near, err_msg=path)
