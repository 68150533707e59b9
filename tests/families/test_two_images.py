"""Prompts with two images, in families that take them: graphs against the reference, and against transformers' whole model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from gap_export.errors import InputError, RecipeError
from gap_export.graph.trace_cache import Tracer
from gap_export.runtime.grounder import Grounder
from gap_export.runtime.model import Model
from tests.families.answers import Asked, Families, Tiny, noise
from tests.families.contract import Contract
from tests.families.tiny_families import FAMILIES, ranged

pytestmark = pytest.mark.slow


def qwen2_vl(tiny_family: Families, **changes: Any) -> Asked:
    return tiny_family("qwen2_vl").asked(**{**ranged("dart"), "images": 2, **changes})


class TestTwoImages(Contract):
    families = tuple(family for family in FAMILIES.values() if 2 in family.builds)
    images = 2

    def test_boxes_are_those_of_the_last_image(self, tiny_family: Families) -> None:
        asked = qwen2_vl(tiny_family)
        bundle, session = asked.bundle, asked.session
        images = [noise(*size) for size in asked.sizes(2)[0]]
        grounded = Grounder(bundle).ground(session, images, ["the mug"])
        last = int(grounded.batch.visual_tokens[-1])
        assert grounded.generation.kept_counts is not None
        assert (
            len(grounded.answers[0].kept_indices)
            == grounded.generation.kept_counts[0, 1]
            == round(0.3 * last)
        )
        model, prompt = Model(bundle, session), tuple(images)
        alone = model.ground(prompt, "the mug")
        assert (alone.text, alone.visual_tokens) == (grounded.answers[0].text, last)
        pairs = model.ground([prompt, prompt[::-1]], ["the mug", "the mug"])
        about = model.ground(prompt, ["the mug", "a cat"])
        assert [pairs[0].text, about[0].text] == [alone.text] * 2
        assert pairs[1].visual_tokens != alone.visual_tokens

    @pytest.mark.parametrize("count", [1, 3])
    def test_another_number_of_images_is_refused(self, tiny_family: Families, count: int) -> None:
        asked = qwen2_vl(tiny_family)
        bundle, session = asked.bundle, asked.session
        with pytest.raises(InputError, match="not 2 for every expression"):
            Grounder(bundle).ground(session, [noise(40, 30)] * count, ["the mug"])
        with pytest.raises(InputError, match="give a tuple of 2"):
            Model(bundle, session).ground(tuple([noise(40, 30)] * count), "the mug")
        with pytest.raises(InputError, match="give a tuple of 2"):
            Model(bundle, session).ground(noise(40, 30), ["the mug"])


def test_no_space_for_text(tiny_family: Families) -> None:
    with pytest.raises(RecipeError, match="no space for text"):
        qwen2_vl(tiny_family, max_text=2)


def test_the_prompt_of_the_model_has_one_image(tiny_family: Families, tmp_path: Path, tracer: Tracer) -> None:
    tiny = tiny_family("qwen2_vl")
    checkpoint = Path(shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint"))
    tokenizer = checkpoint / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<image>", "<|image_pad|>"))
    with pytest.raises(RecipeError, match="placeholder for every image"):
        Tiny(tiny.family, checkpoint, tmp_path, tracer).asked(
            images=2, prompt=None, pruner="divprune", keep=0.3
        )


def test_models_of_one_image_refuse(
    tiny_checkpoint: Any, tiny_options: dict[str, Any], tmp_path: Any
) -> None:
    from gap_export.pipeline.build import build
    from gap_export.recipe.recipe import Recipe

    recipe = Recipe.model_validate({**tiny_options, "images": 2})
    with pytest.raises(RecipeError, match="one image"):
        build(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
