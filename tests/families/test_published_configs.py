"""The published configuration of every recipe, reduced in size only, goes through the contract of its family.

Most do so because the small models of `tiny_families.py`, `test_original_layouts.py` and `test_minigpt_v2.py` are made of them; LLaVA-1.5 in
the layout of transformers is asked here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gap_export.checkpoint.random_weights import published
from gap_export.errors import CheckpointError
from gap_export.families import row as family_row
from gap_export.graph.trace_cache import Tracer
from gap_export.pipeline.opened import open_model
from gap_export.recipe.recipe import Recipe, known_recipes, load_recipe
from gap_export.runtime.torch.staged import open_reference
from tests.families.answers import TEMPLATES, Tiny, answer, assert_equal
from tests.families.conftest import save_checkpoint
from tests.families.reduced import SIZES, reduced
from tests.families.tiny_families import FAMILIES, TinyFamily, fixed, tile_inputs

HERE = ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf")
ELSEWHERE = ("liuhaotian/llava-v1.5-7b", "shikras/shikra-7b-delta-v1", "meta-llama/Llama-2-7b-chat-hf")
LLAVA = TinyFamily("llava", HERE[0], *reduced(HERE[0], "llava"), tile_inputs, builds={})


def of_recipes() -> Iterator[tuple[str, str]]:
    """(Hub id, family) of every recipe's config; MiniGPT-v2 has none but its language model's."""
    for recipe in (load_recipe(name) for name in known_recipes() if name != "shapes"):
        of_base = recipe.family == "minigpt_v2"
        yield str(recipe.base if of_base else recipe.checkpoint), str(recipe.family)


def test_every_recipe_is_held_to_the_contract() -> None:
    rows = {family.published for family in FAMILIES.values()}
    assert {name for name, _ in of_recipes()} == {*rows, *HERE, *ELSEWHERE}


@pytest.mark.parametrize(("name", "family"), tuple(of_recipes()))
def test_only_sizes_are_reduced(name: str, family: str) -> None:
    """Nothing is added but sizes that the published file leaves to the default, and nothing is taken away."""
    small, whole, sizes = reduced(name, family)[0], published(name).config, SIZES[family]
    decoders = {} if "text_config" in whole else sizes.decoder
    parts = {"": {**sizes.config, **decoders}, "text_config": sizes.decoder, "vision_config": sizes.tower}
    for part, reducible in parts.items():
        mine, theirs = (config.get(part, {}) if part else config for config in (small, whole))
        inside = {"text_config", "vision_config", "vocab_size", *reducible}
        differ = {field for field in mine.keys() | theirs.keys() if mine.get(field) != theirs.get(field)}
        left = {field for field in differ - inside if not field.endswith(("_token_id", "_token_index"))}
        assert left == set()
        assert theirs.keys() <= mine.keys()


@pytest.mark.slow
def test_llava_answers_as_its_reference(tiny_checkpoint: Path, tmp_path: Path, tracer: Tracer) -> None:
    """Both sizes of it are the same model but for their sizes."""
    larger, same = reduced(HERE[1], "llava")
    assert same == LLAVA.processor
    named = {**larger["text_config"], "_name_or_path": LLAVA.config["text_config"]["_name_or_path"]}
    assert {**larger, "text_config": named} == LLAVA.config

    folder = save_checkpoint(tmp_path / "checkpoint", LLAVA, tiny_checkpoint / "tokenizer.json")
    asked = Tiny(LLAVA, folder, tmp_path, tracer).asked(**fixed("cls_attention"))
    mine, theirs = asked.answer(2), asked.true_answer(2)
    assert_equal(mine, theirs)
    assert mine.kept_indices.shape == (2, round(0.3 * 36))
    assert open_model(asked.bundle.manifest.recipe).notes == ()

    # A list of one layer is that layer, here and in transformers.
    (folder / "config.json").write_text(json.dumps({**LLAVA.config, "vision_feature_layer": [-2]}))
    again = open_reference("llava", folder, asked.bundle.manifest.pruning)
    listed = answer(again, asked.bundle, asked.batch(2))
    np.testing.assert_array_equal(listed.logits[-1], theirs.logits[-1])


@pytest.mark.parametrize("layer", [-2, [-2], 2])
@pytest.mark.parametrize("family", [LLAVA, FAMILIES["llava_next"]], ids=lambda family: family.name)
def test_a_layer_has_several_spellings(
    family: TinyFamily, layer: list[int] | int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    spelled = replace(family, config={**family.config, "vision_feature_layer": layer})
    folder = save_checkpoint(tmp_path / "checkpoint", spelled, tiny_checkpoint / "tokenizer.json")
    recipe = Recipe.model_validate({"name": "x", "checkpoint": str(folder), "prompt": TEMPLATES[1]})
    model = open_model(recipe)
    assert model.notes == ()
    assert model.spec.missing_features == family_row(model.family.row.name).missing_features


def test_a_tied_head_is_the_embedding(tiny_checkpoint: Path, tmp_path: Path, tracer: Tracer) -> None:
    """As Qwen2-VL-2B has it."""
    tied = replace(FAMILIES["qwen2_vl"], config={**FAMILIES["qwen2_vl"].config, "tie_word_embeddings": True})
    folder = save_checkpoint(tmp_path / "checkpoint", tied, tiny_checkpoint / "tokenizer.json")
    asked = Tiny(tied, folder, tmp_path, tracer).asked(**fixed("dart"))
    assert_equal(asked.answer(1), asked.true_answer(1))


def test_numbers_of_tiles_are_an_interval(tiny_checkpoint: Path, tmp_path: Path) -> None:
    internvl = FAMILIES["internvl"]
    folder = save_checkpoint(tmp_path / "checkpoint", internvl, tiny_checkpoint / "tokenizer.json")
    for fields in ({"min_patches": 20}, {"max_patches": "12"}, {"max_patches": -1}):
        (folder / "preprocessor_config.json").write_text(json.dumps({**internvl.processor, **fields}))
        with pytest.raises(CheckpointError, match=next(iter(fields))) as caught:
            open_model(Recipe(name="x", checkpoint=str(folder)))
        assert caught.value.subject == str(folder / "preprocessor_config.json")
