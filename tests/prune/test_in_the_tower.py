"""Every strategy inside a vision tower: against transformers, with no weight that it does not need, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from gap_export import prune
from gap_export.bundle.manifest import Pruning
from gap_export.errors import RecipeError
from gap_export.positions import Ids, MergedId, PositionPolicy
from gap_export.runtime.torch.staged import open_reference
from tests.exported import ExportedGraph

pytestmark = pytest.mark.slow

TOTAL, KEPT = 36, 12
OTHERS = [name for name in prune.names(in_decoder=False) if name != "none"]
VARIANTS = [
    *((name, MergedId.LAST_VISUAL, PositionPolicy.GAP) for name in OTHERS),
    ("prumerge", MergedId.CENTROID, PositionPolicy.GAP),
    ("visionzip", MergedId.MAX_KEPT, PositionPolicy.PERMUTED),
    ("trim", MergedId.CENTROID, PositionPolicy.PERMUTED),
    ("divprune", MergedId.LAST_VISUAL, PositionPolicy.PERMUTED),
]
HEAD_OF_LAST_LAYER = {"layer_norm1.weight", "layer_norm1.bias", "self_attn.q_proj.weight", "self_attn.q_proj.bias",
                      "self_attn.k_proj.weight", "self_attn.k_proj.bias"}  # fmt: skip


@pytest.mark.parametrize(("name", "merged_id", "policy"), VARIANTS)
def test_exported_tower_equals_transformers(
    name: str,
    merged_id: MergedId,
    policy: PositionPolicy,
    vision_graph: Callable[..., ExportedGraph],
    tiny_reference: Callable[[Pruning], Any],
    pixels: NDArray[np.float32],
    text_ids: Ids,
) -> None:
    row = prune.row(name)
    vision = vision_graph(pruner=name, merged_id=merged_id, positions=policy)
    expression = {"text_ids": text_ids} if row.needs_text else {}
    embeds, kept = ort.InferenceSession(str(vision.path)).run(None, {"pixel_values": pixels, **expression})
    pruning = Pruning(pruner=name, keep=0.34, kept=KEPT, positions=policy, seed=0, merged=row.merged, merged_id=merged_id)  # fmt: skip
    expected = tiny_reference(pruning).encode(
        {"pixel_values": pixels}, text_ids_BL=expression.get("text_ids")
    )
    assert kept.shape == (4, KEPT)
    assert np.array_equal(kept, expected.kept_indices)
    scale = float(expected.embeds.abs().max())
    np.testing.assert_allclose(embeds, expected.embeds.numpy(), rtol=0, atol=2e-5 * scale)

    above = {key.partition(".layers.2.")[2] for key in vision.keys if ".layers.2." in key}
    assert above == (HEAD_OF_LAST_LAYER if name in ("prumerge", "prumerge_plus") else set())


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_a_tower_that_ends_at_the_feature_layer(
    name: str,
    vision_graph: Callable[..., ExportedGraph],
    checkpoint_copy: Path,
    pixels: NDArray[np.float32],
) -> None:
    """The feature layer is then the last that there is, and what would be read above it is read there."""
    config = json.loads((checkpoint_copy / "config.json").read_text())
    (checkpoint_copy / "config.json").write_text(json.dumps({**config, "vision_feature_layer": -1}))
    vision = vision_graph(pruner=name, checkpoint=str(checkpoint_copy))
    embeds, kept = ort.InferenceSession(str(vision.path)).run(None, {"pixel_values": pixels})
    pruning = Pruning(pruner=name, keep=0.34, kept=KEPT, positions="gap", seed=0, merged=1)
    expected = open_reference("llava", checkpoint_copy, pruning).encode({"pixel_values": pixels})
    assert np.array_equal(kept, expected.kept_indices)
    scale = float(expected.embeds.abs().max())
    np.testing.assert_allclose(embeds, expected.embeds.numpy(), rtol=0, atol=2e-5 * scale)


def test_a_tower_that_shows_no_attention_is_told_what_works() -> None:
    for row in prune.PRUNERS.values():
        if "attention" in row.needs:
            with pytest.raises(
                RecipeError, match="needs attention, which this vision tower does not show"
            ) as caught:
                prune.check_tower(row, ("attention",))
            assert caught.value.hint == (
                "these work on it: divprune, dart, random, spatial, none, fastv, pyramiddrop, sparsevlm"
            )
        else:
            prune.check_tower(row, ("attention", "projected_class_token"))


def test_advice_names_only_what_works_on_the_tower() -> None:
    with pytest.raises(RecipeError, match="looks at the expression") as caught:
        prune.check_text(prune.row("trim"), ("attention",), has_text_tower=False, published=None)
    assert caught.value.hint.endswith(
        "or use one of divprune, dart, random, spatial, none, fastv, pyramiddrop, sparsevlm"
    )
    with pytest.raises(RecipeError, match="has no rule of its own") as caught:
        prune.check_adaptive(prune.row("divprune"), ("attention",))
    assert caught.value.hint == "give a fraction or a range, or use one of trim"


def test_no_count_is_refused_that_can_be_given() -> None:
    for row in prune.PRUNERS.values():
        for kept in range(row.min_tokens, TOTAL + 1) if row.name != "none" else [TOTAL]:
            prune.check_count(row, kept, TOTAL)
    with pytest.raises(RecipeError, match="keeps all 36 tokens"):
        prune.check_count(prune.row("none"), 35, TOTAL)


@pytest.mark.parametrize(("typed", "meant"), [("visonzip", "visionzip"), ("prumerge+", "prumerge"), ("divprun", "divprune")])  # fmt: skip
def test_did_you_mean(typed: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"did you mean '{meant}'"):
        prune.row(typed)
