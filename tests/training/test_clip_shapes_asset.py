"""The bundled `clip-shapes`: transformers loads it as it is, and a text finds the patches that it names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    CLIPConfig,
    CLIPTextModelWithProjection,
    LlavaForConditionalGeneration,
)

import gap_export  # noqa: E402
from gap_export.boxes.scenes import DEV_SEED, cases, make_scene  # noqa: E402
from training.clip_shapes.data import patch_features, shows_named  # noqa: E402
from training.clip_shapes.evaluate import truth_of  # noqa: E402
from training.clip_shapes.model import load_checkpoint  # noqa: E402
from training.shapes.data import owner_map  # noqa: E402

ASSETS = Path(gap_export.__file__).parent / "checkpoint" / "assets"
CLIP, LLAVA = ASSETS / "clip-shapes", ASSETS / "llava-shapes"
SCENES = 16


@pytest.fixture(scope="module")
def llava():  # type: ignore[no-untyped-def]
    return LlavaForConditionalGeneration.from_pretrained(LLAVA, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text_tower():  # type: ignore[no-untyped-def]
    return CLIPTextModelWithProjection.from_pretrained(CLIP).eval()


@torch.no_grad()
def _cosines(llava, text_tower, expressions: list[str], pixels: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    """As a pruner sees them: transformers' text tower, the stored projection of patches."""
    tokens = AutoTokenizer.from_pretrained(CLIP)(expressions, padding=True, return_tensors="pt")
    text = text_tower(**tokens).text_embeds
    patches = (
        patch_features(llava, pixels) @ load_file(CLIP / "model.safetensors")["visual_projection.weight"].T
    )
    return torch.cosine_similarity(patches, text[:, None], dim=-1).numpy()


def test_no_weight_is_missing_and_none_is_too_many(text_tower) -> None:  # type: ignore[no-untyped-def]
    stored = load_file(CLIP / "model.safetensors")
    beside = {"visual_projection.weight", "logit_scale"}
    assert set(stored) == set(text_tower.state_dict()) | beside
    assert all(torch.equal(stored[name], value) for name, value in text_tower.state_dict().items())
    assert stored["visual_projection.weight"].shape == (64, 128)


def test_the_config_describes_both_sides(llava) -> None:  # type: ignore[no-untyped-def]
    config = CLIPConfig.from_pretrained(CLIP)
    assert config.patch_similarity == "direct"
    assert config.projection_dim == config.text_config.projection_dim == 64
    ours, theirs = config.vision_config.to_dict(), llava.config.vision_config.to_dict()
    assert {name for name in theirs if ours.get(name) != theirs[name]} == {"projection_dim"}


def test_padding_does_not_change_a_text(text_tower) -> None:  # type: ignore[no-untyped-def]
    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    expression = "the small red circle"
    short = tokenizer(expression, return_tensors="pt").input_ids
    long = tokenizer(expression, padding="max_length", return_tensors="pt").input_ids
    assert (short.shape, long.shape) == ((1, 6), (1, 24))
    with torch.no_grad():
        texts = [text_tower(ids).text_embeds for ids in (short, long)]
        ours = load_checkpoint(CLIP).texts(long)
    assert (texts[0] - texts[1]).abs().max() < 1e-5
    assert (torch.nn.functional.normalize(texts[0], dim=-1) - ours).abs().max() < 1e-5


def test_a_text_finds_the_patches_it_names(llava, text_tower) -> None:  # type: ignore[no-untyped-def]
    scenes = list(cases(SCENES, DEV_SEED))
    truth = truth_of(scenes, DEV_SEED)
    shown = shows_named(truth.owner, truth.named)
    pixels = np.stack([np.asarray(case.image) for case in scenes])
    cosines = _cosines(llava, text_tower, [case.expression for case in scenes], pixels)
    firsts = np.take_along_axis(shown, np.argsort(-cosines, axis=1)[:, :3], axis=1)
    assert firsts.mean() > 0.95
    # Another scene's expression does not find them: the order comes from the text, not from the image alone.
    strangers = _cosines(llava, text_tower, [case.expression for case in scenes[1:] + scenes[:1]], pixels)
    others = np.take_along_axis(shown, np.argsort(-strangers, axis=1)[:, :3], axis=1)
    assert others.mean() < 0.6


def test_each_object_is_found_by_its_own_name(llava, text_tower) -> None:  # type: ignore[no-untyped-def]
    scene = max(
        (make_scene(DEV_SEED, index) for index in range(20)),
        key=lambda scene: len({(item.colour, item.shape) for item in scene.objects}) / len(scene.objects),
    )
    names = [f"the {item.colour} {item.shape}" for item in scene.objects]
    best = _cosines(llava, text_tower, names, np.repeat(scene.pixels[None], len(names), axis=0)).argmax(-1)
    assert owner_map(scene.objects)[best].tolist() == list(range(len(names)))
