"""Published checkpoints at full size: each family finds all of its weights there, and none is left over."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gap_export import prune
from gap_export.bundle.manifest import ModelSpec
from gap_export.checkpoint import Checkpoint, open_checkpoint
from gap_export.errors import CheckpointError, RecipeError
from gap_export.families import open_family
from gap_export.modeling.components import Component
from gap_export.plan import plan_for
from gap_export.recipe.recipe import Recipe
from tests.families.published import PUBLISHED

DECODER = re.compile(
    r"(base/)?(model\.)?(language_model\.)?(model\.)?(lm_head|embed_tokens|norm|layers\.(\d+))\."
)


def components(
    checkpoint: Checkpoint, pruner: str = "dart", **options: Any
) -> tuple[ModelSpec, list[Component], Checkpoint]:
    family = open_family(checkpoint)
    recipe = Recipe(name="x", checkpoint="x", precision="fp16", pruner=pruner, **options)
    spec = family.spec(recipe)
    return spec, family.components(spec, plan_for(recipe, spec)), family.checkpoint


def changed(checkpoint: Checkpoint, file: str, **changes: Any) -> Checkpoint:
    path = checkpoint.folder / file
    stored = json.loads(path.read_text())
    for field, value in changes.items():
        inner = stored.get(field)
        stored[field] = inner | value if isinstance(inner, dict) and isinstance(value, dict) else value
    path.write_text(json.dumps(stored))
    return open_checkpoint(checkpoint.folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_everything_is_found_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]
    given = published.make(tmp_path)
    assert len(given.weights) == published.tensors
    spec, parts, checkpoint = components(given, pruner="cls_attention" if published.grid else "dart")
    assert (spec.visual_tokens, spec.grid) == (published.visual_tokens, published.grid)
    assert (spec.position_rows, spec.deepstack_levels) == (
        published.position_rows,
        published.deepstack_levels,
    )
    found = set()
    for part in parts:
        for parameter, value in part.module.named_parameters(remove_duplicate=False):
            key = part.weight_key(parameter)
            assert checkpoint.weights[key].shape == tuple(value.shape), key
            found.add(key)
    assert found == {key for key in given.weights if not re.fullmatch(published.unused, key)}
    decoder = [match for match in map(DECODER.match, found) if match]
    assert len(decoder) == published.decoder
    assert {int(match[6]) for match in decoder if match[6]} == set(range(spec.layers))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llava-1.5-7b-hf, old names", "model.layers.0.self_attn.q_norm.weight"),
        ("minigpt-v2", "model.layers.0.self_attn.q_norm.weight"),
        ("llava-v1.6-vicuna-7b-hf, old names", "model.resampler.weight"),
        ("InternVL3-1B-hf, new names", "model.resampler.weight"),
        ("Qwen3-VL-8B-Instruct", "model.visual.merger.ln_q.weight"),
    ],
)
def test_a_key_that_is_not_known_is_named(name: str, key: str, tmp_path: Path) -> None:
    checkpoint = PUBLISHED[name].make(tmp_path)
    any_weight = next(iter(checkpoint.weights.values()))
    with pytest.raises(CheckpointError, match=f"no place for: {re.escape(key)}"):
        components(checkpoint.with_weights({key: any_weight}))


def test_a_key_that_is_missing_is_named(tmp_path: Path) -> None:
    checkpoint = PUBLISHED["llava-1.5-7b-hf, old names"].make(tmp_path)
    del checkpoint.weights["language_model.model.layers.7.mlp.up_proj.weight"]
    _, parts, _ = components(checkpoint)
    decoder = next(part for part in parts if part.spec.name == "decoder")
    with pytest.raises(
        CheckpointError, match=r"has no weight for language_model\.layers\.7\.mlp\.up_proj\.weight"
    ):
        decoder.weight_key("language_model.layers.7.mlp.up_proj.weight")


def test_sizes_of_the_decoder(tmp_path: Path) -> None:
    """Heads of Qwen3 are wider than their share of the hidden size."""
    spec, _, _ = components(PUBLISHED["Qwen3-VL-4B-Instruct, tied"].make(tmp_path))
    assert (spec.hidden_size, spec.attention_heads, spec.kv_heads, spec.head_dim) == (2560, 32, 8, 128)
    assert spec.embedding_width == 4 * 2560


@pytest.mark.parametrize(("pixels", "tokens"), [(1003520, 1280), (200704, 256), (None, 16384)])
def test_pixels_bound_the_cache(pixels: int | None, tokens: int, tmp_path: Path) -> None:
    checkpoint = PUBLISHED["Qwen2.5-VL-7B-Instruct, old names"].make(tmp_path)
    spec, parts, _ = components(checkpoint, max_pixels=pixels)
    assert spec.visual_tokens == tokens
    decoder = next(part for part in parts if part.spec.name == "decoder")
    past = next(each for each in decoder.spec.inputs if each.name == "past.0.key")
    slots = past.extents("maximum")[2]
    assert 0 <= slots - (127 + round(0.25 * tokens) + 32) <= 16


# What does not work


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava-v1.6-vicuna-7b-hf, old names", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ("llava-v1.6-vicuna-7b-hf, old names", {"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
        ("llava-v1.6-vicuna-7b-hf, old names", {"image_grid_pinpoints": [[336, 500]]}, "image_grid_pinpoints"),
        ("llava-v1.6-vicuna-7b-hf, old names", {"image_grid_pinpoints": [[336, 672]]}, "image_grid_pinpoints"),
        ("llava-v1.6-vicuna-7b-hf, old names", {"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ("llava-v1.6-vicuna-7b-hf, old names", {"text_config": {"model_type": "gpt2"}}, "text_config.model_type"),
        ("llava-onevision-qwen2-0.5b-ov-hf, new names, tied", {"vision_aspect_ratio": "pad"}, "vision_aspect_ratio"),
        ("llava-onevision-qwen2-0.5b-ov-hf, new names, tied", {"vision_feature_layer": -2}, "vision_feature_layer"),
        ("InternVL3-1B-hf, old names", {"vision_feature_layer": -2}, "vision_feature_layer"),
        ("InternVL3-1B-hf, old names", {"downsample_ratio": 0.7}, "downsample_ratio"),
        ("Qwen2-VL-7B-Instruct, old names", {"use_sliding_window": True, "max_window_layers": 9}, "use_sliding_window"),
        ("Qwen2.5-VL-7B-Instruct, old names", {"rope_scaling": {"type": "su", "factor": 4.0}}, r"'su'"),
        ("Qwen2.5-VL-7B-Instruct, old names", {"vision_config": {"window_size": 14}}, "window_size"),
        ("Qwen3-VL-8B-Instruct", {"vision_config": {"deepstack_visual_indexes": [8, 40]}}, "deepstack_visual_indexes"),
        ("Qwen3-VL-8B-Instruct", {"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_supported_is_named(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = changed(PUBLISHED[name].make(tmp_path), "config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_family(checkpoint).spec(Recipe(name="x", checkpoint="x"))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava-v1.6-vicuna-7b-hf, old names", {"resample": 2}, "resample of the image processor"),
        ("llava-v1.6-vicuna-7b-hf, old names", {"size": {"shortest_edge": 224}}, "size of the image processor"),
        ("llava-v1.6-vicuna-7b-hf, old names", {"crop_size": {"width": 224}}, "size of the image processor"),
        ("llava-v1.6-vicuna-7b-hf, old names", {"image_mean": None}, "no image processor settings"),
        ("Qwen2-VL-7B-Instruct, old names", {"patch_size": 16}, "patch_size of the image processor"),
        ("Qwen2-VL-7B-Instruct, old names", {"merge_size": 4}, "merge_size of the image processor"),
        ("Qwen2-VL-7B-Instruct, old names", {"resample": 2}, "resample of the image processor"),
        ("Qwen2-VL-7B-Instruct, old names", {"min_pixels": None}, "size of the image processor"),
        ("Qwen2-VL-7B-Instruct, old names", {"min_pixels": 20000000}, "size of the image processor"),
        ("Qwen2-VL-7B-Instruct, old names", {"image_std": [0, 1, 1]}, "image_std"),
    ],
    ids=str,
)  # fmt: skip
def test_a_processor_of_another_kind_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = PUBLISHED[name].make(tmp_path)
    assert open_family(checkpoint).layout(Recipe(name="x", checkpoint="x"))
    checkpoint = changed(checkpoint, "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_family(checkpoint).layout(Recipe(name="x", checkpoint="x"))


@pytest.mark.parametrize(
    "name",
    [
        "llava-onevision-qwen2-0.5b-ov-hf, new names, tied",
        "InternVL3-1B-hf, old names",
        "llava-v1.6-vicuna-7b-hf, old names",
        "Qwen2.5-VL-7B-Instruct, old names",
    ],
)
def test_every_pruner_before_the_decoder_works_without_text(name: str, tmp_path: Path) -> None:
    spec = open_family(PUBLISHED[name].make(tmp_path)).spec(Recipe(name="x", checkpoint="x"))
    for row in prune.PRUNERS.values():
        if not row.needs_text and not row.in_decoder:
            keep = 1.0 if row.name == "none" else 0.25
            recipe = Recipe(name="x", checkpoint="x", pruner=row.name, keep=keep)
            assert plan_for(recipe, spec).pruning.pruner == row.name


@pytest.mark.parametrize(
    "changes", [{"pruner": "text_similarity"}, {"pruner": "fastv", "prune_layers": (99,)}], ids=str
)
def test_pruners_that_ask_for_more_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    """A text tower, or a deeper decoder: other reasons, other hints."""
    recipe = Recipe(name="x", checkpoint="x", **changes)
    spec = open_family(PUBLISHED["Qwen2.5-VL-7B-Instruct, old names"].make(tmp_path)).spec(recipe)
    with pytest.raises(RecipeError) as caught:
        plan_for(recipe, spec)
    assert ("dart" if "prune_layers" not in changes else "the pruner's own: 2") in caught.value.hint


def test_squares_are_not_asked_for(tmp_path: Path) -> None:
    checkpoint = PUBLISHED["llava-v1.6-vicuna-7b-hf, old names"].make(tmp_path)
    with pytest.raises(RecipeError, match="tiles"):
        open_family(checkpoint).layout(Recipe(name="x", checkpoint="x", fit="pad"))
