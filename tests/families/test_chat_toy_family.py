"""Conversations with a family from outside whose image tokens see each other, against plain torch: the mask of later turns too."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from gap_export.errors import InputError
from gap_export.pipeline.build import build
from gap_export.runtime.model import load
from tests.families import test_toy_family as toy
from tests.families.plain_models import Llama
from tests.families.plain_talks import TALL, WIDE, assert_talks_as_plain_torch
from tests.families.spoken import Speech
from tests.families.toy_reference import ToyReference

pytestmark = [pytest.mark.slow, pytest.mark.long]

registered, checkpoints = toy.registered, toy.checkpoints
"""Fixtures."""

SPEECH = Speech("llava_1_5")


@pytest.fixture(scope="module")
def spoken(registered: None, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy checkpoint with a chat template, as the family has no frame."""
    folder = tmp_path_factory.mktemp("toy") / "checkpoint"
    shutil.copytree(checkpoints["toy"], folder)
    (folder / "chat_template.jinja").write_text(SPEECH.jinja)
    return folder


@pytest.mark.parametrize("keep", [1.0, None])
@pytest.mark.parametrize("talk", ["one image", "text first", "text"])
def test_conversations_are_the_model(
    talk: str, keep: float | None, spoken: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = ToyReference(spoken, torch.float32, {})
    weights = {
        key.removeprefix("decoder."): value
        for key, value in model._state.items()
        if key.startswith("decoder.")
    }
    decoder = Llama(weights, toy.LAYERS, toy.HEADS, toy.KV_HEADS, toy.EPS, toy.THETA)
    recipe = toy.recipe_of(spoken, keep=(0.2, 0.5, 1.0))
    bundle = build(recipe, tmp_path_factory.mktemp("bundle") / "out").bundle
    assert bundle.manifest.spec.reads_image_slots

    def features(pixels: torch.Tensor) -> torch.Tensor:
        return model.project(model.tower(pixels[None]))[0]

    assert_talks_as_plain_torch(bundle, SPEECH, decoder, features, talk, 60, keep=keep, blocks=True)


def test_a_later_image_is_refused(spoken: Path, tmp_path: Path) -> None:
    bundle = build(toy.recipe_of(spoken), tmp_path / "out").bundle
    with load(bundle, threads=1) as model:
        chat = model.chat(WIDE)
        chat.ask("where is the cat ?", max_new_tokens=2)
        with pytest.raises(InputError, match=r"later turn, and the attention mask \(image_blocks\)"):
            chat.ask("and here ?", images=TALL, max_new_tokens=2)
        assert len(chat.turns) == 2
