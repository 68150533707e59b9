"""Every field of every file of a checkpoint with values that it should not have: refused in one line that names file and field, or of
no harm. Nothing is traced: a model is opened, and its modules are made without weights where it is accepted.
"""

from __future__ import annotations

import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import pytest

from gap_export.errors import CheckpointError, CheckpointWarning, RecipeError
from gap_export.modeling import config_fields, field_values
from gap_export.modeling.config_fields import CONFIG, FAMILIES
from gap_export.modeling.field_values import Value, without_a_row
from gap_export.modeling.fields import Fields
from gap_export.plan import plan_for
from tests.modeling.hostile_values import NAMES, PROCESSOR, VALUES, Small, small

ENDS = {"accepted", "accepted, and its modules made", "refused", "too short for the recipe"}
_OTHER_NAMES = re.compile(
    # What a field is wrong about may be said by the field that it contradicts, or by the file that it is about.
    r"tokenizer|vocabulary|is not a configuration transformers accepts|adapter|quantised|rope_scaling|vision_feature_layer|image_grid_pinpoints"
    r"|size|num_attention_heads|image_seq_length|patches|has no|downsample_ratio|deepstack|mm_vision_select_layer|layers|width"
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        yield


def try_values(checkpoint: Small, chosen: Callable[[], bool], built: Callable[[], bool]) -> Counter[str]:
    """How changes of one field ended.

    Args:
        checkpoint: as it should be.
        chosen: whether a change is tried.
        built: whether the modules of what is accepted are made, too.
    """
    ends: Counter[str] = Counter()
    for file, path in checkpoint.fields():
        for value in VALUES:
            if not chosen():
                continue
            try:
                checkpoint.changed(file, path, value)
            except TypeError:  # what stands there holds no fields
                continue
            where = f"{file}: {'.'.join(path)} = {repr(value)[:60]}"
            try:
                model = checkpoint.open()
                ends["accepted"] += 1
            except CheckpointError as error:
                assert_told(error, path, where)
                ends["refused"] += 1
            except RecipeError as error:  # a context that is too short for the recipe
                ends["too short for the recipe" if "positions" in error.message else where] += 1
            else:
                if built():
                    with pytest.raises(CheckpointError, match="weight"):  # there are none
                        model.components(plan_for(model.recipe, model.spec, model.text_tower))
                    ends["accepted, and its modules made"] += 1
            finally:
                checkpoint.write(file, checkpoint.files[file])
    assert ends.keys() <= ENDS
    return ends


def assert_told(error: CheckpointError, path: tuple[str, ...], where: str) -> None:
    text = str(error)
    assert "\n" not in text, where
    assert len(text) < 1200, where
    assert any(name in text for name in path) or _OTHER_NAMES.search(error.message), f"{where}: {text}"


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_values(name: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    checkpoint, draw = small(tmp_path / name, name, tiny_checkpoint / "tokenizer.json"), random.Random(name)
    checkpoint.open()
    ends = try_values(checkpoint, lambda: draw.random() < 0.01, lambda: draw.random() < 0.1)
    print(name, dict(ends))
    assert ends["refused"] > 10


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_every_value(name: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    checkpoint, draw = small(tmp_path / name, name, tiny_checkpoint / "tokenizer.json"), random.Random(name)
    ends = try_values(checkpoint, lambda: True, lambda: draw.random() < 0.2)
    print(name, dict(ends))
    assert ends["refused"] > 2000


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 2000])
def test_what_is_no_number_in_json(name: str, number: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    checkpoint = small(tmp_path / name, name, tiny_checkpoint / "tokenizer.json")
    for file in checkpoint.files:
        (checkpoint.folder / file).write_text(f'{{"rms_norm_eps": {number}}}')
        with pytest.raises(CheckpointError) as caught:
            checkpoint.open()
        assert caught.value.subject.startswith(str(checkpoint.folder / file))
        checkpoint.write(file, checkpoint.files[file])


# The table


def test_every_field_that_is_followed_has_a_row() -> None:
    followed: set[str] = set()
    for known in FAMILIES.values():
        objects = [known.config, *known.decoders.values(), *known.towers.values(), known.generation]
        objects += [known.processor] if known.processor is not None else []
        followed |= {name for fields in objects for name in fields.followed}
    followed |= config_fields.PROCESSING.followed
    assert without_a_row(followed) == frozenset()
    assert {field.name for field in fields_of(Fields)} == {"followed", "only", "without_effect", "values"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_config": {"rms_norm_eps": 0}}, "text_config.rms_norm_eps is 0"),
        ({"text_config": {"hidden_size": "32"}}, "text_config.hidden_size is '32'"),
        ({"text_config": {"rope_scaling": "linear"}}, "text_config.rope_scaling is 'linear'"),
        ({"text_config": {"num_attention_heads": 0}}, "text_config.num_attention_heads is 0"),
        ({"vision_config": {"patch_size": "6"}}, "vision_config.patch_size is '6'"),
        ({"text_config": {"num_hidden_layers": True}}, "text_config.num_hidden_layers is True"),
        ({"text_config": {"num_attention_heads": 3}}, "text_config.num_key_value_heads is 2 (expected: a divisor of num_attention_heads, 3)"),
        ({"text_config": {"num_key_value_heads": 4, "num_attention_heads": 12}}, "text_config.num_attention_heads is 12 (expected: a divisor of hidden_size, 64)"),
        ({"text_config": {"head_dim": 7}}, "text_config.head_dim is 7 (expected: an even"),
        ({"text_config": {"pad_token_id": 64}}, "text_config.pad_token_id is not supported"),
        ({"text_config": {"vocab_size": 10**9}}, "text_config.vocab_size is 1000000000 (expected: a whole"),
        ({"vision_config": {"image_size": 37}}, "vision_config.image_size is not supported (supported: a multiple"),
        ({"vision_config": {"image_size": 60000, "patch_size": 1}}, "at most 1000000 patches"),
        ({"vision_config": {"num_attention_heads": 3}}, "vision_config.num_attention_heads is 3"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config.model_type is not supported"),
        ({"vision_feature_layer": 9}, "vision_feature_layer is not supported (supported: one of the tower's 3 layers): it is 9"),
        ({"configuration_files": ["other.json"]}, "configuration_files is ['other.json']"),
        ({"image_token_index": -1}, "image_token_index is -1"),
    ],
)  # fmt: skip
def test_what_is_said(changes: dict[str, Any], said: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    checkpoint = small(tmp_path / "x", "llava", tiny_checkpoint / "tokenizer.json")
    config = dict(checkpoint.files[CONFIG])
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    checkpoint.write(CONFIG, config)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.open()
    assert said in caught.value.message
    assert caught.value.subject == str(checkpoint.folder / CONFIG)


def test_siglips_image_is_no_multiple_of_its_patch(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """As published: 384 pixels, patches of 14, the last 6 pixels are left out."""
    checkpoint = small(tmp_path / "x", "llava_onevision", tiny_checkpoint / "tokenizer.json")
    checkpoint.changed(CONFIG, ("vision_config", "patch_size"), 5)
    assert checkpoint.open().layout.side == 7  # type: ignore[union-attr]


def test_original_layouts_name_their_tower_and_how_images_are_fitted(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    checkpoint = small(tmp_path / "x", "llava_original", tiny_checkpoint / "tokenizer.json")
    assert checkpoint.open().notes == ()
    checkpoint.write(
        CONFIG,
        {name: value for name, value in checkpoint.files[CONFIG].items() if name != "image_aspect_ratio"},
    )
    assert "image_aspect_ratio is not stated" in checkpoint.open().notes[0]
    checkpoint.write(CONFIG, checkpoint.files[CONFIG])
    sizes = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    checkpoint.write("tower/config.json", {**checkpoint.files["tower/config.json"], **sizes})
    checkpoint.write(
        "tower/preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224}
    )
    with pytest.raises(
        CheckpointError,
        match=r"mm_vision_tower is not supported \(supported: openai/clip-vit-large-patch14, ",
    ):
        checkpoint.open()


def test_without_the_table_wrong_values_come_through(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the same values, and nobody looks."""
    checkpoint = small(tmp_path / "x", "llava", tiny_checkpoint / "tokenizer.json")
    checkpoint.changed(PROCESSOR, ("size",), 0)
    with pytest.raises(CheckpointError, match="size is 0"):
        checkpoint.open()
    anything = Value("anything", lambda value: True)
    monkeypatch.setattr(field_values, "VALUES", dict.fromkeys(field_values.VALUES, anything))
    checkpoint.open()
    checkpoint.write(PROCESSOR, checkpoint.files[PROCESSOR])
    checkpoint.changed(CONFIG, ("vision_config", "patch_size"), 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.open()
