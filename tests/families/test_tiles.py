"""Families whose images become tiles, from a small checkpoint to answers: ONNX Runtime against transformers' own models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.evaluation.controls import controls
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import generate
from gap_export.runtime.grounder import keep_counts
from gap_export.runtime.torch.staged import open_reference

from .answers import (
    PROMPTS,
    SIZES,
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

BUILDS = [
    ("llava_next", {"pruner": "cls_attention", "keep": "0.1:0.3:1.0"}),
    ("llava_next", {"pruner": "tile_attention", "keep": 0.3}),
    ("llava_next", {"pruner": "visionzip", "keep": 0.3}),
    ("llava_next", {"pruner": "prumerge", "keep": 0.3}),
    ("llava_next", {"pruner": "cls_attention", "keep": 0.3, "positions": "permuted"}),
    ("llava_next_mistral", {"pruner": "cls_attention", "keep": 0.3}),
    ("llava_onevision", {"pruner": "divprune", "keep": "0.1:0.3:1.0"}),
    ("llava_onevision", {"pruner": "dart", "keep": 0.3}),
    ("internvl", {"pruner": "cls_attention", "keep": "0.1:0.3:1.0"}),
    ("internvl", {"pruner": "tile_attention", "keep": 0.3}),
    ("internvl", {"pruner": "vispruner", "keep": 0.3}),
]
NAMES = ("llava_next", "llava_onevision", "internvl")
USUAL: dict[str, dict[str, Any]] = {
    name: dict(next(options for n, options in BUILDS if n == name)) for name in NAMES
}


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
    bundle = tiny.bundle(**USUAL[name])
    mine, theirs = both(tiny, bundle, 2, keep)
    assert_equal(mine, theirs)
    images = images_of(bundle, 2)
    lines = images.visual_tokens - images.prunable
    kept = (mine.kept_indices >= 0).sum(axis=1) - lines
    assert kept.tolist() == np.floor(keep * images.prunable + 0.5).tolist()
    assert len(set(images.visual_tokens)) == 2, "images must differ, or nothing is tested"


@pytest.mark.parametrize("name", ["llava_next", "internvl"])
def test_every_tile_keeps_the_same_share(tiny_family: Families, name: str) -> None:
    """Over the whole image shares differ: the control for what a tile by itself must keep."""
    shares = {}
    for pruner, keep in (("tile_attention", 0.3), ("cls_attention", "0.1:0.3:1.0")):
        bundle = tiny_family(name).bundle(pruner=pruner, keep=keep)
        run, images = (
            answer(open_session(bundle, "onnxruntime", threads=1), bundle, 2),
            images_of(bundle, 2),
        )
        shares[pruner] = [
            share
            for row, call in enumerate(images.calls)
            for share in shares_of_tiles(call, run.kept_indices[row])
        ]
    assert max(abs(share - 0.3) * size for share, size in shares["tile_attention"]) < 1
    assert max(abs(share - 0.3) * size for share, size in shares["cls_attention"]) > 2


def shares_of_tiles(call: Any, kept: Any) -> list[tuple[float, int]]:
    """(share kept, how many tokens) of every tile of an image; 36 tokens to a tile, bars cut off."""
    tiles = len(call["pixel_values"])
    places = call.get("token_positions", np.arange(tiles * 36))
    tile_of = call.get("token_index", np.arange(tiles * 36)) // 36
    is_kept = np.isin(places, kept)
    return [(is_kept[tile_of == tile].mean(), int((tile_of == tile).sum())) for tile in np.unique(tile_of)]


@pytest.mark.parametrize("name", NAMES)
def test_unpruned_is_the_whole_model(tiny_family: Families, name: str) -> None:
    """transformers packs tiles, cuts bars and adds ends of lines by itself, and numbers tokens 0..: nothing of ours is in it."""
    import torch

    tiny = tiny_family(name)
    bundle = tiny.bundle(**USUAL[name])
    mine = answer(open_session(bundle, "onnxruntime", threads=1), bundle, 2, 1.0)
    images, model = images_of(bundle, 2), whole_model(tiny.folder)
    for row, (width, height) in enumerate(SIZES[2]):
        ids = unpruned_prompt(row, int(images.visual_tokens[row]))
        pixels = torch.from_numpy(images.calls[row]["pixel_values"])
        sizes = {} if name == "internvl" else {"image_sizes": torch.tensor([[height, width]])}
        with torch.inference_mode():
            logits = model(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                pixel_values=pixels if name == "internvl" else pixels[None],
                **sizes,
            ).logits[0, -1]
        np.testing.assert_allclose(mine.logits[0][row], logits.numpy(), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_the_unpruned_prompt(tiny_family: Families, name: str) -> None:
    """Number the unpruned prompt and cross out what was pruned."""
    bundle = tiny_family(name).bundle(**USUAL[name])
    run, images = answer(open_session(bundle, "onnxruntime", threads=1), bundle, 2), images_of(bundle, 2)
    for row, tokens in enumerate(PROMPTS):
        before, visual = tokens.index(IMAGE_TOKEN), int(images.visual_tokens[row])
        kept = run.kept_indices[row][run.kept_indices[row] >= 0]
        everything = np.arange(before + visual + len(tokens) - before - 1)
        surviving = np.concatenate(
            [everything[:before], everything[before:][kept], everything[before + visual :]]
        )
        np.testing.assert_array_equal(run.placement.position_ids[row, : len(surviving)], surviving)
        assert run.placement.next_position[row] == len(everything)
        assert run.placement.next_slot[row] == len(surviving)
        assert len(surviving) < len(everything)
        assert (np.diff(kept) > 0).all()


@pytest.mark.parametrize(("name", "keep"), [(n, k) for n in NAMES[:2] for k in (0.1, 0.3)])
def test_ends_of_lines_are_never_pruned(tiny_family: Families, name: str, keep: float) -> None:
    bundle = tiny_family(name).bundle(**USUAL[name])
    run = answer(open_session(bundle, "onnxruntime", threads=1), bundle, 2, keep)
    for row, call in enumerate(images_of(bundle, 2).calls):
        lines = call["newline_positions"]
        assert set(lines) <= set(run.kept_indices[row])
        assert 0 < len(lines) < (run.kept_indices[row] >= 0).sum()


@pytest.mark.parametrize("control", controls())
def test_wrong_placements_show(tiny_family: Families, control: str) -> None:
    bundle = tiny_family("llava_next").bundle(**USUAL["llava_next"])
    session = open_session(bundle, "onnxruntime", threads=1)
    assert moved_by(control, PROMPTS, partial(answer, session, bundle, 2)) > 1e-2


def test_a_line_that_ends_elsewhere_shows(tiny_family: Families) -> None:
    """The place of an end of a line is an id like any other: the model must see when it is wrong."""
    bundle = tiny_family("llava_next").bundle(**USUAL["llava_next"])
    session = open_session(bundle, "onnxruntime", threads=1)
    images = images_of(bundle, 1)
    (call,) = images.calls
    moved = {**call, "newline_positions": np.sort(np.r_[call["newline_positions"][:-1], 3])}
    counts = keep_counts(bundle.manifest.pruning, bundle.manifest.spec, images, None)
    right, wrong = (
        generate(
            session, replace(images, calls=(inputs,)), prompts(1),
            max_new_tokens=2, eos_token_ids=(), keep_counts=counts,
        ).logits[0]
        for inputs in (call, moved)
    )  # fmt: skip
    assert np.abs(right - wrong).max() > 1e-2


def test_the_expression_is_read_once_for_all_tiles(
    tiny_family: Families, tiny_text_tower: Path, text_ids: Any
) -> None:
    from gap_export.runtime.torch.session import TextReference

    tiny = tiny_family("llava_next")
    bundle = tiny.bundle(pruner="text_similarity", keep=0.3, text_tower=str(tiny_text_tower))
    assert bundle.manifest.text_tower is not None
    reads = TextReference(tiny_text_tower, bundle.manifest.text_tower)
    reference = open_reference("llava_next", tiny.folder, bundle.manifest.pruning, text_tower=reads)
    mine, theirs, other = (
        answer(session, bundle, 2, text_ids_BL=ids)
        for session, ids in (
            (open_session(bundle, "onnxruntime", threads=1), text_ids[:2]),
            (reference, text_ids[:2]),
            (reference, text_ids[2:4]),
        )
    )
    assert_equal(mine, theirs)
    assert not np.array_equal(mine.kept_indices, other.kept_indices)


@pytest.mark.parametrize("name", NAMES)
def test_engines_are_built(tiny_family: Families, name: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'")
    pruner = "divprune" if name == "llava_onevision" else "cls_attention"
    engines = {"targets": ("onnx", "tensorrt-rtx"), "compute_capabilities": ("8.6",)}
    bundle = tiny_family(name).bundle(pruner=pruner, keep="0.1:0.3:1.0", precision="fp16", **engines)
    assert set(bundle.manifest.engines["tensorrt-rtx"]) == {"vision", "splice", "embed", "decoder"}
