"""Families that take images at their own shape, from a small checkpoint to answers: ONNX Runtime against transformers' own models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from gap_export.errors import RecipeError
from gap_export.evaluation.controls import controls
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import generate
from gap_export.runtime.grounder import keep_counts
from tests.unpruned import gather_ids

from .answers import (
    PROMPTS,
    Families,
    answer,
    assert_equal,
    both,
    images_of,
    moved_by,
    prompts,
    unpruned_prompt,
    whole_model,
)
from .conftest import IMAGE_TOKEN

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
USUAL: dict[str, Any] = {"pruner": "divprune", "keep": "0.1:0.3:1.0"}
BUILDS: list[tuple[str, dict[str, Any]]] = [
    *((name, USUAL) for name in NAMES),
    *((name, {"pruner": "dart", "keep": 0.3}) for name in NAMES),
    ("qwen2_vl", {"pruner": "random", "keep": 0.3, "positions": "permuted"}),
    ("qwen2_5_vl", {"pruner": "divprune", "keep": 0.3, "positions": "shifted"}),
    ("qwen3_vl", {"pruner": "divprune", "keep": 0.3, "positions": "permuted"}),
]


def usual(tiny_family: Families, name: str) -> tuple[Any, Any, Any]:
    """(checkpoint, bundle, open session)."""
    tiny = tiny_family(name)
    bundle = tiny.bundle(**USUAL)
    return tiny, bundle, open_session(bundle, "onnxruntime", threads=1)


def grid_thw(call: Any) -> torch.Tensor:
    """[1, 3], as transformers wants it."""
    rows, columns = call["patch_positions"].max(axis=(0, 1)) + 1
    return torch.tensor([[1, rows, columns]])


@pytest.mark.parametrize(("name", "options"), BUILDS, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_graphs_answer_as_the_reference(
    tiny_family: Families, name: str, options: dict[str, Any], batch: int
) -> None:
    tiny = tiny_family(name)
    assert_equal(*both(tiny, tiny.bundle(**options), batch))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0.1, 1.0])
def test_requests_choose_their_share(tiny_family: Families, name: str, keep: float) -> None:
    tiny = tiny_family(name)
    bundle = tiny.bundle(**USUAL)
    mine, theirs = both(tiny, bundle, 2, keep)
    assert_equal(mine, theirs)
    images = images_of(bundle, 2)
    kept = (mine.kept_indices >= 0).sum(axis=1)
    assert kept.tolist() == np.floor(keep * images.visual_tokens + 0.5).tolist()
    assert len(set(images.visual_tokens)) == 2, "images must differ, or nothing is tested"


@pytest.mark.parametrize("name", NAMES)
def test_unpruned_is_the_whole_model(tiny_family: Families, name: str) -> None:
    """transformers counts positions, masks visual tokens and adds deepstack_levels by itself: nothing of ours is in it."""
    tiny, bundle, session = usual(tiny_family, name)
    mine = answer(session, bundle, 2, 1.0)
    images, model = images_of(bundle, 2), whole_model(tiny.folder)
    for row, call in enumerate(images.calls):
        ids = torch.tensor([unpruned_prompt(row, int(images.visual_tokens[row]))])
        with torch.inference_mode():
            logits = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == IMAGE_TOKEN).int(),
                pixel_values=torch.from_numpy(call["pixel_values"]).flatten(0, 1),
                image_grid_thw=grid_thw(call),
            ).logits[0, -1]
        np.testing.assert_allclose(mine.logits[0][row], logits.numpy(), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_the_unpruned_prompt(tiny_family: Families, name: str) -> None:
    """Let transformers number the unpruned prompt, and cross out what was pruned."""
    tiny, bundle, session = usual(tiny_family, name)
    run, images = answer(session, bundle, 2), images_of(bundle, 2)
    for row, tokens in enumerate(PROMPTS):
        before, visual = tokens.index(IMAGE_TOKEN), int(images.visual_tokens[row])
        ids = torch.tensor([unpruned_prompt(row, visual)])
        everything, _ = whole_model(tiny.folder).model.get_rope_index(
            ids, mm_token_type_ids=(ids == IMAGE_TOKEN).int(), image_grid_thw=grid_thw(images.calls[row])
        )
        kept = run.kept_indices[row][run.kept_indices[row] >= 0]
        text = np.flatnonzero(ids[0].numpy() != IMAGE_TOKEN)
        expected, following = gather_ids(
            everything[:, 0].numpy(), np.sort(np.concatenate([text, before + kept]))
        )
        assert expected.shape[1] < ids.shape[1]
        np.testing.assert_array_equal(run.placement.position_ids[:, row, : expected.shape[1]], expected)
        assert run.placement.next_position[row] == following
        assert run.placement.next_slot[row] == expected.shape[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("control", controls())
def test_wrong_placements_show(tiny_family: Families, name: str, control: str) -> None:
    _, bundle, session = usual(tiny_family, name)
    assert moved_by(control, PROMPTS, partial(answer, session, bundle, 2)) > 1e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row", range(3))
def test_every_row_of_the_ids_is_read(tiny_family: Families, name: str, row: int) -> None:
    _, bundle, session = usual(tiny_family, name)

    def shift(placement: Any, visual: Any) -> Any:
        ids = placement.position_ids.copy()
        ids[row, :, 3:5] += 1
        return replace(placement, position_ids=ids)

    right, off = answer(session, bundle, 1), answer(session, bundle, 1, adjust=shift)
    assert np.abs(right.logits[0] - off.logits[0]).max() > 1e-2


def changed(bundle: Any, session: Any, **inputs: Any) -> float:
    """By how much logits move when inputs of the vision graph are replaced."""
    images = images_of(bundle, 1)
    (call,) = images.calls
    counts = keep_counts(bundle.manifest.pruning, bundle.manifest.spec, images, 1.0)
    right, wrong = (
        generate(
            session,
            replace(images, calls=(given,)),
            prompts(1),
            max_new_tokens=2,
            eos_token_ids=(),
            keep_counts=counts,
        ).logits[0]
        for given in (call, {**call, **{name: change(call[name]) for name, change in inputs.items()}})
    )
    return float(np.abs(right - wrong).max())


@pytest.mark.parametrize("name", NAMES)
def test_places_of_patches_show(tiny_family: Families, name: str) -> None:
    _, bundle, session = usual(tiny_family, name)
    assert changed(bundle, session, patch_positions=lambda places: places[:, :, ::-1].copy()) > 1e-2


def test_windows_show(tiny_family: Families) -> None:
    """Tokens that sit in each other's windows: nothing else says who attends to whom."""
    _, bundle, session = usual(tiny_family, "qwen2_5_vl")

    def exchanged(tokens_WM: Any) -> Any:
        exchange = {0: 7, 7: 0}
        return np.vectorize(lambda token: exchange.get(token, token))(tokens_WM)

    slots = images_of(bundle, 1).calls[0]["token_slots"].copy()
    slots[[0, 7]] = slots[[7, 0]]
    moved = changed(bundle, session, window_tokens=exchanged, token_slots=lambda _: slots)
    assert moved > 1e-3


def test_deepstack_planes_enter_the_decoder(tiny_family: Families) -> None:
    """Without them, with their order changed, and on the wrong tokens, answers are others."""
    _, bundle, session = usual(tiny_family, "qwen3_vl")
    images, width = images_of(bundle, 1), bundle.manifest.spec.hidden_size
    assert bundle.manifest.spec.deepstack_levels == 2
    visual = session.encode(images.calls[0], keep_count=6)
    embeds = np.array(visual.embeds.numpy() if hasattr(visual.embeds, "numpy") else visual.embeds)
    own, deepstack_levels = embeds[..., :width], embeds[..., width:]
    assert embeds.shape[-1] == 3 * width

    def logits(embeds: Any) -> Any:
        given = replace(
            visual,
            embeds=np.ascontiguousarray(embeds),
            kept_counts=np.array([6]),
            image_grid=images.grids,
        )
        spliced = session.splice(prompts(1), given)
        return session.prefill(spliced.embeds, spliced.placement).logits.copy()

    right = logits(embeds)
    for wrong in (
        np.zeros_like(deepstack_levels),
        np.roll(deepstack_levels, width, axis=-1),
        np.roll(deepstack_levels, 1, axis=1),
    ):
        assert np.abs(logits(np.concatenate([own, wrong], axis=-1)) - right).max() > 1e-2


def test_max_pixels_bounds_tokens_and_cache(tiny_family: Families) -> None:
    tiny = tiny_family("qwen2_vl")
    wide, narrow = tiny.bundle(**USUAL), tiny.bundle(**USUAL, max_pixels=16 * 64)
    assert narrow.manifest.spec.visual_tokens < wide.manifest.spec.visual_tokens
    assert narrow.manifest.capacity < wide.manifest.capacity
    assert images_of(narrow, 2).visual_tokens.max() <= 16 < images_of(wide, 2).visual_tokens.max()
    assert_equal(*both(tiny, narrow, 2))


def test_max_pixels_below_the_smallest_images_is_refused(tiny_family: Families) -> None:
    with pytest.raises(RecipeError, match="small images are scaled up to"):
        tiny_family("qwen2_vl").bundle(**USUAL, max_pixels=10)


@pytest.mark.parametrize(
    ("name", "pruner"), [*((name, "dart") for name in NAMES), ("qwen2_5_vl", "divprune")]
)
def test_engines_are_built(tiny_family: Families, name: str, pruner: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'")
    engines = {"targets": ("onnx", "tensorrt-rtx"), "compute_capabilities": ("8.6",)}
    bundle = tiny_family(name).bundle(pruner=pruner, keep="0.1:0.3:1.0", precision="fp16", **engines)
    assert set(bundle.manifest.engines["tensorrt-rtx"]) == {"vision", "splice", "embed", "decoder"}
