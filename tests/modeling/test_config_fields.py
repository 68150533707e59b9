"""Every field of a configuration is followed, refused by its name, known to change nothing, or told to the user."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.processor import PREPROCESSOR, PROCESSOR
from gap_export.checkpoint.random_weights import published
from gap_export.errors import CheckpointError
from gap_export.modeling.config_fields import (
    CLIP_TOWER,
    CONFIG,
    FAMILIES,
    GENERATION,
    LLAMA,
    check_companion_fields,
    check_fields,
    note_of,
)
from gap_export.recipe.recipe import known_recipes, load_recipe

RECIPES = {recipe.checkpoint: str(recipe.family) for recipe in map(load_recipe, known_recipes())}
PUBLISHED = {name: family for name, family in RECIPES.items() if family in FAMILIES and ":" not in name}
"""Hub id -> family."""


def opened(
    folder: Path, config: dict[str, Any], processor: dict[str, Any], generation: dict[str, Any] | None = None
) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    if generation:
        (folder / GENERATION).write_text(json.dumps(generation))
    if processor:
        (folder / PREPROCESSOR).write_text(json.dumps(processor))
    return Checkpoint(folder, "published", config, {})


def objects(name: str) -> Iterator[tuple[str, ...]]:
    """Paths of the objects in a published checkpoint's files."""
    content = published(name)
    yield (CONFIG,)
    yield from ((CONFIG, inner) for inner in ("text_config", "vision_config") if inner in content.config)
    if content.preprocessor_config:
        yield (PREPROCESSOR,)
    if content.generation_config:
        yield (GENERATION,)


def changed(folder: Path, name: str, path: tuple[str, ...], **fields: Any) -> Checkpoint:
    """A published checkpoint with other fields in one of its objects."""
    content = published(name)
    files = {
        CONFIG: content.config,
        PREPROCESSOR: content.preprocessor_config,
        GENERATION: content.generation_config,
    }
    (file, *inside) = path
    target = files[file]
    for inner in inside:
        target = target[inner]
    target.update(fields)
    return opened(folder, *files.values())


OBJECTS = [(name, path) for name in PUBLISHED for path in objects(name)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_nothing_unknown(name: str, tmp_path: Path) -> None:
    content = published(name)
    checkpoint = opened(
        tmp_path / "checkpoint", content.config, content.preprocessor_config, content.generation_config
    )
    unknown = check_fields(checkpoint, FAMILIES[PUBLISHED[name]])
    assert unknown == ()
    assert note_of(unknown) == ()


@pytest.mark.parametrize(("name", "path"), OBJECTS, ids=str)
def test_one_field_more_is_told_once(name: str, path: tuple[str, ...], tmp_path: Path) -> None:
    checkpoint = changed(tmp_path / "checkpoint", name, path, sharpen_first=True, and_then=None)
    unknown = check_fields(checkpoint, FAMILIES[PUBLISHED[name]])
    prefix = ("" if path[0] == CONFIG else f"{path[0]}: ") + "".join(f"{p}." for p in path[1:])
    assert unknown == (f"{prefix}sharpen_first",)
    (note,) = note_of(unknown)
    assert note.startswith(f"{prefix}sharpen_first: a field that is not known here")


@pytest.mark.parametrize(("name", "path"), OBJECTS, ids=str)
def test_values_that_are_not_supported_are_refused_by_name(
    name: str, path: tuple[str, ...], tmp_path: Path
) -> None:
    known = FAMILIES[PUBLISHED[name]]
    content = published(name)
    if path[0] == GENERATION:
        fields = known.generation
    elif path[0] == PREPROCESSOR:
        assert known.processor is not None
        fields = known.processor
    elif len(path) == 1:
        fields = known.config
    else:
        kinds = {"text_config": known.decoders, "vision_config": known.towers}[path[1]]
        fields = kinds[content.config[path[1]].get("model_type", "")]
    assert fields.only
    for field in fields.only:
        checkpoint = changed(tmp_path / "checkpoint", name, path, **{field: "another"})
        with pytest.raises(CheckpointError, match=rf"{field} is 'another' \(supported: ") as caught:
            check_fields(checkpoint, known)
        assert path[0] in str(caught.value)


def test_two_fields_are_told_in_one_sentence(tmp_path: Path) -> None:
    name = "llava-hf/llava-1.5-7b-hf"
    checkpoint = changed(tmp_path / "checkpoint", name, (CONFIG,), one=1, two=2)
    (note,) = note_of(check_fields(checkpoint, FAMILIES["llava"]))
    assert note.startswith("one, two: fields that are not known here")


def test_what_training_programs_write_is_known(tmp_path: Path) -> None:
    fields = {"unsloth_fixed": True, "unsloth_version": "2026.3.3", "_attn_implementation_autoset": True}
    checkpoint = changed(tmp_path / "checkpoint", "Qwen/Qwen2.5-VL-7B-Instruct", (CONFIG,), **fields)
    assert check_fields(checkpoint, FAMILIES["qwen2_5_vl"]) == ()


def test_a_scale_with_fewer_digits_is_the_same(tmp_path: Path) -> None:
    name = "llava-hf/llava-1.5-7b-hf"
    known = FAMILIES["llava"]
    assert (
        check_fields(changed(tmp_path / "a", name, (PREPROCESSOR,), rescale_factor=0.00392157), known) == ()
    )
    with pytest.raises(CheckpointError, match=r"rescale_factor is 0\.005"):
        check_fields(changed(tmp_path / "b", name, (PREPROCESSOR,), rescale_factor=0.005), known)


@pytest.mark.parametrize("name", [name for name, family in PUBLISHED.items() if published(name).stand_in])
def test_what_transformers_writes_of_it_is_known_too(name: str, tmp_path: Path) -> None:
    """A checkpoint that was saved again: fields have other names, and defaults are written out."""
    from transformers import AutoConfig, AutoImageProcessor

    content = published(name)
    (tmp_path / CONFIG).write_text(json.dumps(content.config))
    (tmp_path / PREPROCESSOR).write_text(json.dumps(content.preprocessor_config))
    config = AutoConfig.from_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    again = tmp_path / "again"
    config.save_pretrained(again)
    processor.save_pretrained(again)
    checkpoint = Checkpoint(again, "again", json.loads((again / CONFIG).read_text()), {})
    assert check_fields(checkpoint, FAMILIES[PUBLISHED[name]]) == ()


def test_processing_beside_the_image_processor_is_looked_at(tmp_path: Path) -> None:
    """As published with LLaVA-1.5, as transformers writes it for OneVision and InternVL, and with a field more."""
    content, known = published("llava-hf/llava-1.5-7b-hf"), FAMILIES["llava"]
    checkpoint = opened(tmp_path, content.config, content.preprocessor_config)
    beside = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 14,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    more = {"num_image_tokens": 729, "video_token": "<video>", "vision_aspect_ratio": "anyres_max_9"}
    for fields in (
        beside,
        {**beside, **more},
        {"image_seq_length": 256, "processor_class": "InternVLProcessor"},
    ):
        (tmp_path / PROCESSOR).write_text(json.dumps(fields))
        assert check_fields(checkpoint, known) == ()
    (tmp_path / PROCESSOR).write_text(json.dumps({**beside, "sharpen_first": True}))
    assert check_fields(checkpoint, known) == (f"{PROCESSOR}: sharpen_first",)


def test_fields_of_a_stale_image_processor_are_not_looked_at(tmp_path: Path) -> None:
    """transformers saves what it read into processor_config.json, and leaves the older file as it is."""
    content, known = published("llava-hf/llava-1.5-7b-hf"), FAMILIES["llava"]
    stale = {**content.preprocessor_config, "do_normalize": False, "sharpen_first": True}
    checkpoint = opened(tmp_path, content.config, stale)
    nested = {"image_processor": content.preprocessor_config}
    (tmp_path / PROCESSOR).write_text(json.dumps(nested))
    assert check_fields(checkpoint, known) == ()
    nested["image_processor"]["do_rescale"] = False
    (tmp_path / PROCESSOR).write_text(json.dumps(nested))
    with pytest.raises(CheckpointError, match=r"image_processor\.do_rescale is False") as caught:
        check_fields(checkpoint, known)
    assert caught.value.subject.endswith(PROCESSOR)


def test_what_transformers_writes_of_generation_is_known(tmp_path: Path) -> None:
    """Every setting that there is, at its default, and those of Qwen's sampling."""
    from transformers import GenerationConfig

    known, content = FAMILIES["qwen2_5_vl"], published("Qwen/Qwen2.5-VL-7B-Instruct")
    settings = GenerationConfig(
        do_sample=True, temperature=1e-6, repetition_penalty=1.05, top_p=0.001, top_k=1
    ).to_dict()
    assert check_fields(opened(tmp_path / "a", content.config, {}, settings), known) == ()
    for name, value in {"suppress_tokens": [13], "min_new_tokens": 4, "forced_eos_token_id": 2}.items():
        with pytest.raises(CheckpointError, match=f"{name} is ") as caught:
            check_fields(opened(tmp_path / "a", content.config, {}, {**settings, name: value}), known)
        assert GENERATION in str(caught.value)


def test_companions_are_looked_at_too(tmp_path: Path) -> None:
    """A CLIP checkpoint is whole, or its vision tower alone; a language model's fields stand outermost."""
    tower = {"model_type": "clip_vision_model", "num_channels": 3, "dropout": 0.0}
    whole = {"model_type": "clip", "text_config": {"anything": 1}, "logit_scale_init_value": 2.6592}
    for config in (tower, {**whole, "vision_config": tower}):
        assert check_companion_fields(Checkpoint(tmp_path, "clip", config, {}), CLIP_TOWER) == ()
    more = Checkpoint(tmp_path, "clip", {**whole, "vision_config": {**tower, "registers": 4}}, {})
    assert check_companion_fields(more, CLIP_TOWER) == ("clip: vision_config.registers",)
    with pytest.raises(CheckpointError, match="num_channels is 4"):
        check_companion_fields(Checkpoint(tmp_path, "clip", {**tower, "num_channels": 4}, {}), CLIP_TOWER)
    base = published("meta-llama/Llama-2-7b-chat-hf").config
    assert check_companion_fields(Checkpoint(tmp_path, "llama", base, {}), LLAMA) == ()


def test_a_penalty_on_repetition_is_qwens_alone(tmp_path: Path) -> None:
    """There it belongs to the sampling as published; elsewhere it changes greedy answers."""
    for name, family in PUBLISHED.items():
        checkpoint = opened(tmp_path, published(name).config, {}, {"repetition_penalty": 1.2})
        if family.startswith("qwen"):
            assert check_fields(checkpoint, FAMILIES[family]) == ()
        else:
            with pytest.raises(
                CheckpointError, match=r"repetition_penalty is 1\.2 \(supported: 1\.0, None\)"
            ):
                check_fields(checkpoint, FAMILIES[family])
