"""Prompts with two images, in families that take them: graphs against the reference, and against transformers' whole model."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gap_export.errors import InputError, RecipeError
from gap_export.evaluation.controls import controls
from gap_export.inputs.batch import ImageBatch
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import Generation, generate
from gap_export.runtime.grounder import Grounder, keep_counts
from gap_export.runtime.model import Model
from gap_export.runtime.torch.staged import open_reference
from tests.unpruned import gather_ids

from .answers import NEW_TOKENS, Families, assert_equal, moved_by, whole_model
from .conftest import IMAGE_TOKEN

NAMES = ("llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SIZES = [[(40, 30), (30, 90)], [(100, 70), (36, 36)]]
PROMPTS = [[1, 5, IMAGE_TOKEN, 6, IMAGE_TOKEN, 7, 8, 9], [IMAGE_TOKEN, 12, 13, 14, IMAGE_TOKEN, 15]]
OPTIONS: dict[str, Any] = {
    "images": 2,
    "prompt": "USER : <image> and <image> where is {expression} ? ASSISTANT :",
    "keep": "0.1:0.3:1.0",
    "max_new_tokens": NEW_TOKENS,
}


def noise(width: int, height: int) -> Image.Image:
    samples = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(samples)


def images_of(bundle: Any, batch: int) -> ImageBatch:
    images = [noise(*size) for row in SIZES[:batch] for size in row]
    manifest = bundle.manifest
    return manifest.layout.prepare(images, visual_tokens=manifest.spec.visual_tokens, per_prompt=2)


def answer(session: Any, bundle: Any, batch: int, keep: float | None = None, **options: Any) -> Generation:
    images, rows = images_of(bundle, batch), PROMPTS[:batch]
    ids = np.full((batch, max(map(len, rows))), -1, np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    return generate(
        session,
        images,
        ids,
        max_new_tokens=NEW_TOKENS,
        eos_token_ids=(),
        keep_counts=keep_counts(bundle.manifest.pruning, bundle.manifest.spec, images, keep),
        keep_logits=True,
        **options,
    )


def bundle_of(tiny_family: Families, name: str, **options: Any) -> tuple[Any, Any]:
    tiny = tiny_family(name)
    pruner = "cls_attention" if name == "internvl" else "dart"
    return tiny, tiny.bundle(**{"pruner": pruner, **OPTIONS, **options})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 2])
def test_graphs_answer_as_the_reference(tiny_family: Families, name: str, batch: int) -> None:
    tiny, bundle = bundle_of(tiny_family, name)
    reference = open_reference(bundle.manifest.family, tiny.folder, bundle.manifest.pruning)
    mine, theirs = (
        answer(session, bundle, batch)
        for session in (open_session(bundle, "onnxruntime", threads=1), reference)
    )
    assert_equal(mine, theirs)
    assert mine.kept_counts is not None
    assert mine.kept_counts.shape == (batch, 2)
    assert (mine.kept_counts < images_of(bundle, batch).visual_tokens.reshape(batch, 2)).all()


def unpruned(row: int, tokens: Any) -> torch.Tensor:
    """[1, S] ids with a placeholder for every visual token."""
    counts, ids = iter(tokens), []
    for token in PROMPTS[row]:
        ids += [token] * (int(next(counts)) if token == IMAGE_TOKEN else 1)
    return torch.tensor([ids])


def inputs_of_transformers(name: str, batch: ImageBatch, row: int) -> dict[str, Any]:
    """What the whole model wants to know of a row's two images."""
    calls = batch.calls[2 * row : 2 * row + 2]
    pixels = [torch.from_numpy(call["pixel_values"]) for call in calls]
    if name == "internvl":
        return {"pixel_values": torch.cat(pixels)}
    if name == "llava_onevision":
        most = max(map(len, pixels))
        padded = [torch.nn.functional.pad(each, (0, 0, 0, 0, 0, 0, 0, most - len(each))) for each in pixels]
        sizes = [[height, width] for width, height in SIZES[row]]
        return {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes)}
    grids = [[1, *(call["patch_positions"].max(axis=(0, 1)) + 1)] for call in calls]
    return {
        "pixel_values": torch.cat([each.flatten(0, 1) for each in pixels]),
        "image_grid_thw": torch.tensor(grids),
    }


@pytest.mark.parametrize("name", NAMES)
def test_unpruned_is_the_whole_model(tiny_family: Families, name: str) -> None:
    """transformers finds the images, numbers tokens and adds deepstack_levels by itself: nothing of ours is in it."""
    tiny, bundle = bundle_of(tiny_family, name)
    mine = answer(open_session(bundle, "onnxruntime", threads=1), bundle, 2, 1.0)
    batch, model = images_of(bundle, 2), whole_model(tiny.folder)
    for row in range(2):
        ids = unpruned(row, batch.by_prompt(batch.visual_tokens)[row])
        given = inputs_of_transformers(name, batch, row)
        if "image_grid_thw" in given:
            given["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits[0, -1]
        np.testing.assert_allclose(mine.logits[0][row], logits.numpy(), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_the_unpruned_prompt(tiny_family: Families, name: str) -> None:
    tiny, bundle = bundle_of(tiny_family, name)
    run, batch = answer(open_session(bundle, "onnxruntime", threads=1), bundle, 2), images_of(bundle, 2)
    assert run.kept_counts is not None
    for row in range(2):
        tokens = batch.by_prompt(batch.visual_tokens)[row]
        ids = unpruned(row, tokens)
        whole = np.arange(ids.shape[1])[None]
        if "qwen" in name:
            grids = inputs_of_transformers(name, batch, row)["image_grid_thw"]
            types = (ids == IMAGE_TOKEN).int()
            rope, _ = whole_model(tiny.folder).model.get_rope_index(
                ids, mm_token_type_ids=types, image_grid_thw=grids
            )
            whole = rope[:, 0].numpy()
        visual = np.flatnonzero(ids[0].numpy() == IMAGE_TOKEN)
        kept = run.kept_indices[row][run.kept_indices[row] >= 0]
        first, second = np.split(kept, [run.kept_counts[row, 0]])
        surviving = np.sort(
            np.concatenate(
                [np.flatnonzero(ids[0].numpy() != IMAGE_TOKEN), visual[first], visual[tokens[0] + second]]
            )
        )
        expected, following = gather_ids(whole, surviving)
        mine = run.placement.position_ids[..., row, : len(surviving)]
        np.testing.assert_array_equal(mine, expected if "qwen" in name else expected[0])
        assert run.placement.next_position[row] == following
        assert run.placement.next_slot[row] == len(surviving) < ids.shape[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("control", controls())
def test_wrong_placements_show(tiny_family: Families, name: str, control: str) -> None:
    _, bundle = bundle_of(tiny_family, name)
    session = open_session(bundle, "onnxruntime", threads=1)
    assert moved_by(control, PROMPTS, partial(answer, session, bundle, 2)) > 1e-2


def test_boxes_are_those_of_the_last_image(tiny_family: Families) -> None:
    _, bundle = bundle_of(tiny_family, "qwen2_vl")
    session = open_session(bundle, "onnxruntime", threads=1)
    images = [noise(*size) for size in SIZES[0]]
    grounded = Grounder(bundle).ground(session, images, ["the mug"])
    last = int(grounded.batch.visual_tokens[-1])
    assert grounded.generation.kept_counts is not None
    assert len(grounded.answers[0].kept_indices) == grounded.generation.kept_counts[0, 1] == round(0.3 * last)
    model, prompt = Model(bundle, session), tuple(images)
    alone = model.ground(prompt, "the mug")
    assert (alone.text, alone.visual_tokens) == (grounded.answers[0].text, last)
    pairs = model.ground([prompt, prompt[::-1]], ["the mug", "the mug"])
    about = model.ground(prompt, ["the mug", "a cat"])
    assert [pairs[0].text, about[0].text] == [alone.text] * 2
    assert pairs[1].visual_tokens != alone.visual_tokens


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_images_is_refused(tiny_family: Families, count: int) -> None:
    _, bundle = bundle_of(tiny_family, "qwen2_vl")
    session = open_session(bundle, "onnxruntime", threads=1)
    with pytest.raises(InputError, match="not 2 for every expression"):
        Grounder(bundle).ground(session, [noise(40, 30)] * count, ["the mug"])
    with pytest.raises(InputError, match="give a tuple of 2"):
        Model(bundle, session).ground(tuple([noise(40, 30)] * count), "the mug")
    with pytest.raises(InputError, match="give a tuple of 2"):
        Model(bundle, session).ground(noise(40, 30), ["the mug"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"prompt": None, "seed": 1}, "placeholder for every image"), ({"max_text": 2}, "no space for text")],
    ids=str,
)
def test_recipes_that_cannot_work(tiny_family: Families, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        bundle_of(tiny_family, "qwen2_vl", **changes)


def test_models_of_one_image_refuse(
    tiny_checkpoint: Any, tiny_options: dict[str, Any], tmp_path: Any
) -> None:
    from gap_export.pipeline.build import build
    from gap_export.recipe.recipe import Recipe

    recipe = Recipe.model_validate({**tiny_options, "images": 2})
    with pytest.raises(RecipeError, match="one image"):
        build(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_engines_are_built(tiny_family: Families) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'")
    engines = {"targets": ("onnx", "tensorrt-rtx"), "compute_capabilities": ("8.6",), "precision": "fp16"}
    _, bundle = bundle_of(tiny_family, "qwen3_vl", **engines)
    assert set(bundle.manifest.engines["tensorrt-rtx"]) == {"vision", "splice", "embed", "decoder"}
