"""What every pruner would keep, held against sessions that really prune by it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from gap_export import prune
from gap_export.boxes import scenes
from gap_export.bundle.folder import Bundle
from gap_export.evaluation.report.choices import Choices, pruner_choices
from gap_export.plan import plan_for
from gap_export.runtime.torch.reference import open_torch


@pytest.fixture(scope="module")
def batch() -> list[Image.Image]:
    return [Image.fromarray(scenes.make_scene(5, number).pixels) for number in range(2)]


@pytest.fixture(scope="module")
def found(tiny_bundle: Callable[..., Bundle], batch: list[Image.Image]) -> dict[str, Choices]:
    return {each.name: each for each in pruner_choices(tiny_bundle(), batch, ["the mug", "the cat"])}


def test_every_pruner_is_drawn_or_says_why_not(found: dict[str, Choices]) -> None:
    assert found.keys() == set(prune.names()) - {"none"}
    for each in found.values():
        assert len(each.maps) == 2 or each.refused
    assert "between the decoder's layers" in found["fastv"].refused
    assert len(found["cls_attention"].maps) == 2


def test_without_a_text_tower(tiny_bundle: Callable[..., Bundle], batch: list[Image.Image]) -> None:
    bundle = tiny_bundle()
    recipe = bundle.manifest.recipe.model_copy(update={"text_tower": None})
    bundle = Bundle(bundle.folder, bundle.manifest.model_copy(update={"recipe": recipe}))
    found = {each.name: each for each in pruner_choices(bundle, batch, ["the mug", "the cat"])}
    assert "names no text tower" in found["trim"].refused
    assert found["divprune"].maps


def test_pruners_that_read_follow_the_expression(
    tiny_bundle: Callable[..., Bundle], batch: list[Image.Image], found: dict[str, Choices]
) -> None:
    other = {each.name: each for each in pruner_choices(tiny_bundle(), batch, ["the small red circle"] * 2)}
    assert other["text_similarity"].maps != found["text_similarity"].maps
    assert other["cls_attention"].maps == found["cls_attention"].maps


def pruned_by(pruner: str, bundle: Bundle) -> Bundle:
    """The bundle with another pruner in its manifest, which is all that PyTorch reads of it."""
    recipe = bundle.manifest.recipe.replaced(pruner=pruner)
    pruning = plan_for(recipe, bundle.manifest.spec).pruning
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"recipe": recipe, "pruning": pruning}))


@pytest.mark.parametrize("pruner", ["cls_attention", "divprune", "spatial", "random", "prumerge"])
def test_bright_is_what_a_session_keeps(
    tiny_bundle: Callable[..., Bundle],
    batch: list[Image.Image],
    found: dict[str, Choices],
    pruner: str,
) -> None:
    bundle = pruned_by(pruner, tiny_bundle())
    manifest = bundle.manifest
    (pixels,) = manifest.layout.prepare(batch, visual_tokens=manifest.spec.visual_tokens).calls
    kept = open_torch(bundle).encode(pixels).kept_indices
    for row, each in enumerate(found[pruner].maps):
        content = base64.b64decode(each.uri.partition(",")[2])
        shades = np.array(Image.open(io.BytesIO(content))).reshape(36, 4)
        dropped = (shades == (72, 77, 86, 190)).all(axis=1)
        assert set(np.flatnonzero(~dropped)) == set(kept[row].tolist())


def test_the_first_is_the_brightest(tiny_bundle: Callable[..., Bundle], batch: list[Image.Image]) -> None:
    bundle = tiny_bundle()
    manifest = bundle.manifest
    session = open_torch(bundle)
    pixels = manifest.layout.prepare(batch[:1], visual_tokens=manifest.spec.visual_tokens).calls[0]
    order = session.order_of("cls_attention", pixels, 9, grid=(6, 6))  # type: ignore[attr-defined]
    one = session.order_of("cls_attention", pixels, 1, grid=(6, 6))  # type: ignore[attr-defined]
    assert order[0] == one[0]
    (each,) = (c for c in pruner_choices(bundle, batch[:1], ["the mug"]) if c.name == "cls_attention")
    content = base64.b64decode(each.maps[0].uri.partition(",")[2])
    light = np.array(Image.open(io.BytesIO(content)).convert("L"), np.int64).reshape(-1)
    assert light[order[0]] == light[order].max()
    assert light[order[-1]] == light[order].min()
