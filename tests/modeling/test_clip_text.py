"""The text tower beside a vision tower: its facts, its graph against transformers, and checkpoints that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import CLIPModel

from gap_export.bundle.folder import Bundle
from gap_export.checkpoint import Checkpoint, open_checkpoint
from gap_export.errors import CheckpointError, InputError, RecipeError
from gap_export.inputs.prompt import TextTower
from gap_export.modeling.clip_text import published_tower, read_text_tower
from gap_export.pipeline.build import build
from gap_export.positions import Ids
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.backends import open_session
from gap_export.runtime.grounder import Grounder


def part(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


@pytest.fixture
def tower_copy(tiny_text_tower: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_text_tower, tmp_path / "clip"))


def with_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_facts(tiny_text_tower: Path, tower_copy: Path) -> None:
    facts = read_text_tower(part(tiny_text_tower), tower_width=32)
    assert (facts.context, facts.width, facts.aligned_inversely) == (12, 16, True)
    direct = read_text_tower(part(with_config(tower_copy, patch_similarity="direct")), tower_width=32)
    assert not direct.aligned_inversely


@pytest.mark.parametrize(
    ("changes", "width", "message"),
    [
        ({}, 48, "projects patches of width 32, the vision tower gives 48"),
        ({"model_type": "siglip"}, 32, "where a CLIP checkpoint is needed"),
        ({"patch_similarity": "sideways"}, 32, "neither 'direct' nor 'inverse'"),
    ],
)
def test_a_tower_that_does_not_belong_here(
    changes: dict[str, Any], width: int, message: str, tower_copy: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_text_tower(part(with_config(tower_copy, **changes)), tower_width=width)


def test_a_vision_tower_alone_is_refused(tiny_checkpoint: Path, tower_copy: Path) -> None:
    shutil.copyfile(tiny_checkpoint / "model.safetensors", tower_copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no text_projection\.weight"):
        read_text_tower(part(tower_copy), tower_width=32)


def test_published_towers_are_known_by_their_sizes() -> None:
    from transformers import CLIPVisionConfig

    large = CLIPVisionConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
    assert published_tower(large) == "openai/clip-vit-large-patch14-336"
    assert published_tower(CLIPVisionConfig(hidden_size=48, num_attention_heads=4)) is None


def test_the_checkpoint_to_add_is_named(tiny_options: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.model_validate({**tiny_options, "pruner": "trim", "text_tower": None})
    with pytest.raises(RecipeError, match="no text tower to read it with") as caught:
        build(recipe, tmp_path / "out")
    assert "--text-tower" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_selection_follows_transformers_own_similarity(
    tiny_bundle: Callable[..., Bundle],
    tiny_text_tower: Path,
    tiny_checkpoint: Path,
    pixels: Any,
    text_ids: Ids,
) -> None:
    """`get_text_features` and the tower's own hidden states, against what the graph keeps: as nothing else is said of this
    tower, the patches least alike.
    """
    from transformers import LlavaForConditionalGeneration

    bundle = tiny_bundle(pruner="text_similarity")
    vision = ort.InferenceSession(str(bundle.graph_path("vision")))
    _, kept = vision.run(None, {"pixel_values": pixels, "text_ids": text_ids})
    clip = CLIPModel.from_pretrained(tiny_text_tower).eval()
    llava = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
    with torch.inference_mode():
        tower = llava.model.vision_tower
        patches = tower(torch.from_numpy(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]
        aligned = clip.visual_projection(tower.post_layernorm(patches)).numpy()
        texts = clip.get_text_features(input_ids=torch.from_numpy(text_ids)).pooler_output.numpy()
    for row in range(len(pixels)):
        cosine = aligned[row] @ texts[row] / np.linalg.norm(aligned[row], axis=1)
        assert kept[row].tolist() == sorted(np.argsort(cosine)[: kept.shape[1]].tolist())


def test_padding_after_the_end_is_never_read(
    tiny_bundle: Callable[..., Bundle], pixels: Any, text_ids: Ids
) -> None:
    vision = ort.InferenceSession(str(tiny_bundle(pruner="trim").graph_path("vision")))
    longer = np.concatenate([text_ids, text_ids[:, -1:], text_ids[:, -1:]], axis=1)
    given, padded = (
        vision.run(None, {"pixel_values": pixels, "text_ids": ids}) for ids in (text_ids, longer)
    )
    assert given[1].tolist() == padded[1].tolist()
    np.testing.assert_allclose(given[0], padded[0], atol=1e-5)


def test_other_words_keep_other_tokens(tiny_bundle: Callable[..., Bundle], image_file: Path) -> None:
    from gap_export.inputs.images import load_image

    bundle = tiny_bundle(pruner="text_similarity")
    image, grounder = load_image(image_file), Grounder(bundle)
    session = open_session(bundle, "onnxruntime", threads=1)
    answers = grounder.ground(session, [image] * 2, ["the red mug", "a cat on the left"]).answers
    assert answers[0].kept_indices.tolist() != answers[1].kept_indices.tolist()
    alone = grounder.ground(session, [image], ["the red mug"]).answers[0]
    assert alone.kept_indices.tolist() == answers[0].kept_indices.tolist()


def test_an_expression_longer_than_the_tower_reads(tiny_bundle: Callable[..., Bundle]) -> None:
    grounder = Grounder(tiny_bundle(pruner="text_similarity"))
    with pytest.raises(InputError, match="has 15 tokens, and the pruner reads 12") as caught:
        grounder.text_ids(["the red mug left of the blue cat on the left of it"])
    assert "by 3 tokens" in caught.value.hint


def test_a_tokenizer_that_does_not_end_expressions(
    tiny_options: dict[str, Any], tower_copy: Path, tmp_path: Path
) -> None:
    tokenizer = json.loads((tower_copy / "tokenizer.json").read_text())
    (tower_copy / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    recipe = Recipe.model_validate({**tiny_options, "pruner": "trim", "text_tower": str(tower_copy)})
    with pytest.raises(CheckpointError, match="does not end every expression"):
        build(recipe, tmp_path / "out")


def test_files_of_the_same_name_do_not_meet(tiny_bundle: Callable[..., Bundle]) -> None:
    """Both checkpoints have a model.safetensors."""
    files = tiny_bundle(pruner="trim").manifest.files
    weights = {name for name in files if name.endswith(".safetensors")}
    assert len(weights) == 2
    assert "text_tokenizer.json" in files
    assert isinstance(tiny_bundle(pruner="trim").manifest.text_tower, TextTower)


@pytest.mark.parametrize(
    "field", ["projection_dim", "text_config.vocab_size", "text_config.max_position_embeddings"]
)
def test_sizes_that_are_null_are_named(field: str, tower_copy: Path) -> None:
    path = tower_copy / "config.json"
    config = json.loads(path.read_text())
    place, _, name = field.rpartition(".")
    (config[place] if place else config)[name] = None
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=name):
        read_text_tower(open_checkpoint(tower_copy), tower_width=32)
