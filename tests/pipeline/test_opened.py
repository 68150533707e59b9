"""Checkpoints that cannot become a bundle are refused from their headers, before anything is traced; what was assumed is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from gap_export.checkpoint import Checkpoint
from gap_export.errors import CheckpointError, CheckpointWarning, RecipeError
from gap_export.modeling.hf_config import llama_config
from gap_export.pipeline.build import build
from gap_export.pipeline.opened import OpenedModel, open_model
from gap_export.recipe.recipe import Recipe

Weights = dict[str, NDArray[Any]]
HEAD, TABLE = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def never(*_: Any) -> Any:
    raise AssertionError("was traced")


@pytest.fixture
def refused(
    checkpoint_copy: Path, tiny_options: dict[str, Any], tmp_path: Path
) -> Callable[[], CheckpointError]:
    """Build the changed checkpoint, and get what it is refused with."""

    def attempt() -> CheckpointError:
        recipe = Recipe.model_validate({**tiny_options, "checkpoint": str(checkpoint_copy)})
        with pytest.raises(CheckpointError) as caught:
            build(recipe, tmp_path / "out", tracer=never)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()
        return caught.value

    return attempt


def test_a_name_that_is_no_pruner_is_told_before_anything_is_fetched(tiny_options: dict[str, Any]) -> None:
    recipe = Recipe.model_validate({**tiny_options, "checkpoint": "nobody/nothing", "pruner": "fastvv"})
    with pytest.raises(RecipeError, match="did you mean 'fastv'"):
        open_model(recipe)


@pytest.fixture
def opened(checkpoint_copy: Path, tiny_options: dict[str, Any]) -> Callable[[], OpenedModel]:
    return lambda: open_model(Recipe.model_validate({**tiny_options, "checkpoint": str(checkpoint_copy)}))


@pytest.mark.parametrize(
    ("options", "box"),
    [
        ({}, ("llava", "padded_square")),
        ({"box_format": "bbox_1000"}, ("bbox_1000", "padded_square")),
        ({"box_format": "list_pixels"}, ("list_pixels", "padded_square")),
        ({"box_format": "list_pixels", "fit": "stretch"}, ("list_pixels", "image")),
    ],
    ids=str,
)
def test_boxes_are_written_as_the_recipe_says(
    options: dict[str, Any], box: tuple[str, str], tiny_options: dict[str, Any]
) -> None:
    model = open_model(Recipe.model_validate({**tiny_options, **options}))
    assert (model.box.codec, model.box.frame) == box


def change_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)


def change_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# Numbers


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_std": [float("inf")] * 3}, "Infinity|std"),
        ({"image_std": [1e999, 1, 1]}, "Infinity|std"),
        ({"image_std": [0, 0, 0]}, "std"),
        ({"image_std": [1e-30, 1, 1]}, r"layout\.std\.0 is 1e-30, and is from 0\.001 to 1000\.0"),
        ({"image_std": [-1, 1, 1]}, "std"),
        ({"image_mean": [127.5, 127.5, 127.5]}, "a number from 0 to 1"),
    ],
)
def test_images_that_no_model_takes(
    fields: dict[str, Any], words: str, checkpoint_copy: Path, refused: Callable[[], CheckpointError]
) -> None:
    change_json(checkpoint_copy / "preprocessor_config.json", **fields)
    error = refused()
    assert re.search(words, str(error)), error
    assert str(error).isprintable()


# Weights


def without(*beginnings: str) -> Callable[[Weights], Weights]:
    return lambda weights: {
        key: value for key, value in weights.items() if not any(each in key for each in beginnings)
    }


def as_integers(weights: Weights) -> Weights:
    return {
        key: value.astype(np.int8) if "layers.1.mlp.up_proj" in key else value
        for key, value in weights.items()
    }


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (without("lm_head"), r"has no weight for lm_head\.weight", "tie_word_embeddings"),
        (without("embed_tokens"), r"has no weight for embed_tokens\.weight", "a shard is missing"),
        (without("model.layers.1."), r"has no weight for language_model\.layers\.1\.", "a shard is missing"),
        (without("vision_tower"), r"has no weight for vision_tower\.", "a shard is missing"),
        (without("multi_modal_projector"), r"has no weight for multi_modal_projector\.", "a shard is missing"),
        (as_integers, r"layers\.1\.mlp\.up_proj\.weight is stored as I8", "fp32, fp16 or bf16"),
        (lambda weights: {**weights, _key(weights, "lm_head"): np.zeros((9, 32), np.float32)},
         r"lm_head\.weight has shape \[9, 32\] where config\.json implies \[64, 32\]", "do not belong together"),
    ],
)  # fmt: skip
def test_weights_that_are_missing_or_others(
    change: Callable[[Weights], Weights],
    message: str,
    hint: str,
    checkpoint_copy: Path,
    refused: Callable[[], CheckpointError],
) -> None:
    import re

    change_weights(checkpoint_copy, change)
    error = refused()
    assert re.search(message, error.message)
    assert hint in error.hint


def _key(weights: Weights, part: str) -> str:
    return next(key for key in weights if part in key)


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key.replace(old, new, 1): value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (renamed("", "module."), "wrapper"),
        (renamed("", "_orig_mod."), "wrapper"),
        (renamed("", "base_model.model."), "wrapper"),
        (renamed("q_proj.weight", "q_proj.base_layer.weight"), "merge_and_unload"),
        (lambda weights: {**weights, "language_model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((2, 32), np.float32)},
         "merge_and_unload"),
        (renamed("mlp.up_proj", "mlp.more"), "do not belong together"),
    ],
)  # fmt: skip
def test_weights_that_were_saved_from_inside_a_wrapper(
    change: Callable[[Weights], Weights],
    hint: str,
    checkpoint_copy: Path,
    refused: Callable[[], CheckpointError],
) -> None:
    change_weights(checkpoint_copy, change)
    error = refused()
    assert "has weights that the model has no place for" in error.message
    assert hint in error.hint


def test_weights_that_no_graph_uses_may_be_missing(
    checkpoint_copy: Path, tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    """The tower is read before its last layer, and checkpoints leave out what comes after."""
    change_weights(checkpoint_copy, without("post_layernorm"))
    build(
        Recipe.model_validate({**tiny_options, "checkpoint": str(checkpoint_copy)}),
        tmp_path / "out",
        golden=False,
    )


# Tokenizers


def tokenizer_with(folder: Path, *added: str, words: tuple[str, ...] = ()) -> None:
    """Words of the prompt without a placeholder, and tokens added to them."""
    vocabulary = {
        word: id_ for id_, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words, "where", "is"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("added", "words", "message"),
    [
        ((), (), r"tokenizer has no token <image>, which config.json gives the id 4 ('where' in this tokenizer)"),
        (("<image>",), (), r"gives <image> the id 6, config.json gives it 4 ('where' in this tokenizer)"),
        (("<s>", "<picture>"), (), r"has no token <image>, which config.json gives the id 4"),
        ((), ("<image>",), r"has <image> (id 4) as a word that text is split into"),
    ],
)  # fmt: skip
def test_tokenizers_of_another_checkpoint(
    added: tuple[str, ...],
    words: tuple[str, ...],
    message: str,
    checkpoint_copy: Path,
    refused: Callable[[], CheckpointError],
) -> None:
    tokenizer_with(checkpoint_copy, *added, words=words)
    error = refused()
    assert message in error.message
    assert error.subject.endswith("tokenizer.json")
    assert "published with" in error.hint


@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True, "rstrip": True}], ids=str)
@pytest.mark.parametrize("added", [(), ("<image>",)], ids=["missing", "without flags"])
def test_added_tokens_are_as_tokenizer_config_describes_them(
    added: tuple[str, ...], flags: dict[str, bool], checkpoint_copy: Path, opened: Callable[[], OpenedModel]
) -> None:
    """transformers adds those that tokenizer.json lacks, or has with other flags."""
    from transformers import AutoTokenizer

    tokenizer_with(checkpoint_copy, *added)
    change_json(checkpoint_copy / "config.json", image_token_index=6)
    described = {"content": "<image>", "normalized": False, "special": True, **flags}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"6": described}}
    (checkpoint_copy / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = opened().tokenizer, AutoTokenizer.from_pretrained(checkpoint_copy)
    for text in ("where <image> is", "<image>is", "<image>  <image>where"):
        assert ours.encode(text).ids == theirs(text).input_ids
    (mine,) = [token for token in ours.get_added_tokens_decoder().values() if token.content == "<image>"]
    assert (mine.lstrip, mine.rstrip) == (bool(flags.get("lstrip")), bool(flags.get("rstrip")))


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [((), r"has no tokenizer \(tokenizer\.json or tokenizer\.model\)", "download"),
     (("vocab.json", "merges.txt"), r"has vocab\.json and merges\.txt, and no tokenizer\.json", "save_pretrained")],
)  # fmt: skip
def test_a_checkpoint_without_a_tokenizer(
    files: tuple[str, ...],
    message: str,
    hint: str,
    checkpoint_copy: Path,
    refused: Callable[[], CheckpointError],
) -> None:
    import re

    (checkpoint_copy / "tokenizer.json").unlink()
    for name in files:
        (checkpoint_copy / name).write_text("{}")
    error = refused()
    assert re.search(message, error.message)
    assert hint in error.hint


def test_a_config_with_another_id(checkpoint_copy: Path, refused: Callable[[], CheckpointError]) -> None:
    change_json(checkpoint_copy / "config.json", image_token_index=1000)
    assert "gives <image> the id 4, config.json gives it 1000" in refused().message


def test_a_recipe_may_call_the_placeholder_otherwise(
    checkpoint_copy: Path, tiny_options: dict[str, Any]
) -> None:
    tokenizer_with(checkpoint_copy, "<s>", "<here>", words=())
    change_json(checkpoint_copy / "config.json", image_token_index=6)
    options = {**tiny_options, "checkpoint": str(checkpoint_copy), "prompt": "<here> where is {expression}"}
    assert open_model(Recipe.model_validate(options)).prompt.image_token_id == 6


# What was assumed


def test_end_tokens_that_config_json_names_are_said(
    checkpoint_copy: Path, opened: Callable[[], OpenedModel]
) -> None:
    file = checkpoint_copy / "generation_config.json"
    assert file.is_file()
    assert opened().assumptions == ()
    change_json(file, eos_token_id=None, bos_token_id=1)
    assert opened().assumptions == (
        "no eos_token_id in generation_config.json: answers end at </s> (2), as config.json says",
    )
    file.unlink()
    assert opened().assumptions == (
        "no generation_config.json: answers end at </s> (2), as config.json says",
    )
    config = json.loads((checkpoint_copy / "config.json").read_text())
    change_json(
        checkpoint_copy / "config.json", text_config={**config["text_config"], "eos_token_id": [2, 63]}
    )
    assert "answers end at </s> (2), token (63)" in opened().assumptions[0]


def test_a_field_that_is_not_followed_is_a_warning(
    checkpoint_copy: Path, opened: Callable[[], OpenedModel]
) -> None:
    change_json(checkpoint_copy / "config.json", sinks=4)
    with pytest.warns(CheckpointWarning, match="^sinks: a field that is not known here") as told:
        model = opened()
    assert [str(warning.message) for warning in told] == list(model.notes)


# The configuration


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        (("text_config",), {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": None}},
         "'int' and 'NoneType'"),
        (("text_config",), {"hidden_act": None}, "Field 'hidden_act'"),
        ((), {"vision_feature_layer": None}, "Field 'vision_feature_layer' with value None"),
    ],
)  # fmt: skip
def test_a_config_that_transformers_does_not_accept(
    path: tuple[str, ...],
    fields: dict[str, Any],
    message: str,
    checkpoint_copy: Path,
    opened: Callable[[], OpenedModel],
) -> None:
    file = checkpoint_copy / "config.json"
    config = json.loads(file.read_text())
    inner = config
    for name in path:
        inner = inner[name]
    inner.update(fields)
    inner.pop("rope_parameters", None)
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is not a configuration transformers accepts: ") as caught:
        opened()
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.subject == str(file)


def test_the_length_that_a_decoder_was_first_trained_for_may_stand_beside_its_settings(
    checkpoint_copy: Path, opened: Callable[[], OpenedModel]
) -> None:
    """As Phi-3's config.json has it; transformers reads it there."""
    config = json.loads((checkpoint_copy / "config.json").read_text())
    text = {**config["text_config"], "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}
    text["rope_scaling"] = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    text.pop("rope_parameters")
    change_json(checkpoint_copy / "config.json", text_config=text)
    model = opened()
    assert model.notes == ()
    assert model.family.config.text_config.rope_parameters["original_max_position_embeddings"] == 64


def test_settings_in_both_spellings(checkpoint_copy: Path, opened: Callable[[], OpenedModel]) -> None:
    """A model card's advice for long contexts, entered into a file that transformers 5 saved."""
    file = checkpoint_copy / "config.json"
    text = json.loads(file.read_text())["text_config"]
    assert text["rope_parameters"]["rope_theta"] == 100.0
    change_json(file, text_config={**text, "rope_scaling": {"type": "linear", "factor": 2.0}})
    with pytest.raises(CheckpointError, match=r"rope_parameters and rope_scaling.* 10000\.0 and not 100\.0"):
        opened()
    for fields in (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 100.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 100.0},
        {"rope_scaling": None},
    ):
        change_json(file, text_config={**text, **fields})
        assert opened().family.config.text_config.rope_parameters["rope_theta"] == 100.0


def test_a_llama_whose_fields_stand_outermost_is_held_to_the_same(tmp_path: Path) -> None:
    """As in LLaVA's own layout, in Shikra's, and in the language model of MiniGPT-v2. What is made of the config leaves it alone."""
    scaling = {"type": "linear", "factor": 2.0}
    checkpoint = Checkpoint(tmp_path, "llama", {"hidden_size": 64, "rope_scaling": scaling}, {})
    assert llama_config(checkpoint, bos_token_id=1).rope_parameters["rope_type"] == "linear"
    assert checkpoint.config["rope_scaling"] == {"type": "linear", "factor": 2.0}
    with pytest.raises(CheckpointError, match="Field 'hidden_size' expected int") as caught:
        llama_config(Checkpoint(tmp_path, "llama", {"hidden_size": "64"}, {}))
    assert caught.value.subject == str(tmp_path / "config.json")


# The image processor


def test_the_image_processor_is_read_where_transformers_reads_it(
    checkpoint_copy: Path, opened: Callable[[], OpenedModel]
) -> None:
    """A processor that was saved again stands in processor_config.json; the older file beside it is stale."""
    from transformers import CLIPImageProcessorPil

    nested = json.loads((checkpoint_copy / "preprocessor_config.json").read_text()) | {
        "image_mean": [0.1, 0.2, 0.3]
    }
    (checkpoint_copy / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    theirs = CLIPImageProcessorPil.from_pretrained(checkpoint_copy)
    assert opened().layout.mean == tuple(theirs.image_mean) == (0.1, 0.2, 0.3)
    change_json(
        checkpoint_copy / "processor_config.json",
        image_processor={**nested, "size": {"height": 36, "width": 37}},
    )
    with pytest.raises(CheckpointError, match="size of the image processor is not supported") as caught:
        opened()
    assert caught.value.subject == str(checkpoint_copy / "processor_config.json")


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"projector_hidden_act": "nosuch"}, "projector_hidden_act is 'nosuch'"),
        ("generation_config.json", {"eos_token_id": [9999, -1]}, "eos_token_id is 9999, -1, and the vocabulary ends at 63"),
    ],
)  # fmt: skip
def test_names_and_ids_that_there_are_not(
    file: str,
    fields: dict[str, Any],
    message: str,
    checkpoint_copy: Path,
    opened: Callable[[], OpenedModel],
) -> None:
    (checkpoint_copy / file).touch()
    (checkpoint_copy / file).write_text(
        json.dumps({**json.loads((checkpoint_copy / file).read_text() or "{}"), **fields})
    )
    with pytest.raises(CheckpointError) as caught:
        opened()
    assert caught.value.message.startswith(message)
    assert caught.value.subject.endswith(file)
