"""What references say of towers without a class token, held against the attention maps that transformers computes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

from gap_export import families
from gap_export.checkpoint import open_checkpoint
from gap_export.errors import RecipeError
from gap_export.families.reference import open_model
from gap_export.plan import plan_for
from gap_export.recipe.recipe import Recipe
from tests.families.answers import TEMPLATES, Families, Tiny, noise

SCORING = {
    "qwen2_vl": (modeling_qwen2_vl, 1),
    "qwen2_5_vl": (modeling_qwen2_5_vl, 1),
    "qwen3_vl": (modeling_qwen3_vl, 2),
}
"""Family -> where its eager attention is, and the last layer whose patches attend to all: of Qwen2.5-VL's three the second."""


def family_of(tiny: Tiny, pruner: str = "none") -> tuple[Any, Recipe]:
    checkpoint = open_checkpoint(tiny.checkpoint)
    row = families.row_of(checkpoint)
    options = {"name": "tiny", "checkpoint": str(tiny.checkpoint), "prompt": TEMPLATES[1], "pruner": pruner}
    return row.load()(row, checkpoint), Recipe.model_validate({**options, "keep": 0.3})


def call_of(tiny: Tiny, size: tuple[int, int]) -> Any:
    family, recipe = family_of(tiny)
    most = family.spec(recipe).visual_tokens
    return family.layout(recipe).prepare([noise(*size)], visual_tokens=most).calls[0]


@pytest.mark.parametrize("size", [(40, 30), (30, 90), (70, 50)])
@pytest.mark.parametrize("name", SCORING)
def test_scores_are_the_column_means_of_the_eager_map(
    name: str, size: tuple[int, int], tiny_family: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token's score is the mean over its four patches; the order of windows is undone by what preprocessing says of them."""
    modeling, number = SCORING[name]
    tiny = tiny_family(name)
    call, model = call_of(tiny, size), open_model(name, tiny.checkpoint, {})
    eager, maps = modeling.eager_attention_forward, {}

    def recorded(module: Any, *args: Any, **options: Any) -> Any:
        output, weights = eager(module, *args, **options)
        maps[module] = weights
        return output, weights

    monkeypatch.setattr(modeling, "eager_attention_forward", recorded)
    with torch.inference_mode():
        shown = model.extract_features(call)[0].shown
    map_1APP = maps[model._tower.blocks[number].attn]  # type: ignore[attr-defined]
    patches = call["pixel_values"].shape[:2]
    assert map_1APP.shape[-1] == patches[0] * patches[1], "all patches of the image, and no window"
    in_order_N = map_1APP.double().mean(dim=(0, 1, 2)).reshape(patches).mean(dim=1).numpy()
    expected_N = in_order_N
    if "window_tokens" in call:
        order = call["window_tokens"][call["window_tokens"] >= 0]
        assert not np.array_equal(order, np.arange(len(order))), "one window would hide its order"
        expected_N = np.empty_like(in_order_N)
        expected_N[order] = in_order_N
        assert np.abs(in_order_N - expected_N).max() > 1e-4, "an order that is left as it is must show"
    assert shown.attention is not None
    np.testing.assert_allclose(shown.attention.numpy(), expected_N, rtol=0, atol=1e-7)
    assert abs(float(shown.attention.sum()) * patches[1] - 1) < 1e-5


def test_tiles_score_by_their_own_map(tiny_family: Families) -> None:
    """LLaVA-OneVision: every tile for itself; the tokens of a scaled-down grid are weighted sums."""
    tiny = tiny_family("llava_onevision")
    call, model = call_of(tiny, (100, 70)), open_model("llava_onevision", tiny.checkpoint, {})
    with torch.inference_mode():
        shown = model.extract_features(call)[0].shown
        states = model._tower(  # type: ignore[attr-defined]
            torch.from_numpy(call["pixel_values"]), output_attentions=True
        )
    columns = states.attentions[-1].double().mean(dim=(1, 2)).numpy()
    np.testing.assert_allclose(columns.sum(axis=1), 1, rtol=1e-6)
    expected = [
        sum(weight * columns.flat[token] for token, weight in zip(corners, weights, strict=True))
        for corners, weights in zip(call["corners"], call["corner_weights"], strict=True)
    ]
    assert shown.attention is not None
    assert shown.tile is not None
    np.testing.assert_allclose(shown.attention.numpy(), expected, rtol=0, atol=1e-7)
    assert (call["corner_weights"].max(axis=1) < 1).any(), "no grid was scaled down, and nothing blended"
    tiles = [
        corners[np.argmax(weights)] // columns.shape[1]
        for corners, weights in zip(call["corners"], call["corner_weights"], strict=True)
    ]
    assert shown.tile.tolist() == tiles
    assert len(set(tiles)) > 1


def test_windows_alone_show_no_attention(tiny_family: Families) -> None:
    """In a window a score would compare four tokens. What goes by no attention still works."""
    tiny = tiny_family("qwen2_5_vl")
    family, recipe = family_of(tiny, "vispruner")
    assert plan_for(recipe, family.spec(recipe)).pruning.pruner == "vispruner"
    family.config.vision_config.fullatt_block_indexes = []
    with pytest.raises(RecipeError, match="needs attention, which this vision tower does not show") as caught:
        plan_for(recipe, family.spec(recipe))
    assert (
        caught.value.hint
        == "these work on it: divprune, dart, random, spatial, none, fastv, pyramiddrop, sparsevlm"
    )


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen3_vl", {"pruner": "sparsevlm"}, "needs a decoder of more than 3 layers, this one has"),
        ("llava_onevision", {"pruner": "fastv", "prune_layers": (2,)}, "takes one layer from 1 to 1"),
        ("qwen2_vl", {"pruner": "divprune", "prune_layers": (1,)}, "drops no tokens inside the decoder"),
    ],
)
def test_what_a_family_cannot_have_is_refused_by_one_line(
    name: str, changes: dict[str, Any], words: str, tiny_family: Families
) -> None:
    family, recipe = family_of(tiny_family(name))
    recipe = recipe.model_validate({**json.loads(recipe.model_dump_json()), **changes})
    with pytest.raises(RecipeError, match=words) as caught:
        plan_for(recipe, family.spec(recipe))
    assert "\n" not in caught.value.message
    assert caught.value.hint
