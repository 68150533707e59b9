"""The fields of published configurations, and what becomes of each: followed, fixed to the values that are supported, or without
an effect on tokens, pixels and answers.

A field with another value than the supported ones is refused by its name, and so is one whose value is of another kind or out of all bounds
(`field_values.py`). A field that stands in no list here may change tokens or pixels, and the
user is told so. `null` is the same as no field, but for fields whose supported values are listed.

Sources: the configuration classes and image processors of transformers; `llava/model/llava_arch.py`, `llava/mm_utils.py` and
`llava/train/train.py` of haotian-liu/LLaVA; `mllm/models/builder/build_shikra.py` of shikras/shikra.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.processor import NESTED, PROCESSOR, stored_processor
from gap_export.errors import CheckpointError, named, shown
from gap_export.modeling.field_values import PATCH, SIDE, division_fault, fault, is_number, several
from gap_export.modeling.fields import Fields, names
from gap_export.modeling.generation_fields import GENERATED, OTHER_TOKENS, QWEN_GENERATED

CONFIG, GENERATION = "config.json", "generation_config.json"
_PARTS = ("text_config", "vision_config")
_MOST_TOLD = 10
_NOT_AS_PUBLISHED = "this is not how models of this family are published; see `gap-export models`"


@dataclass(frozen=True)
class KnownFields:
    """Of the files of a family's checkpoints.

    Attributes:
        config: of `config.json`, outermost.
        decoders: `model_type` -> of its `text_config`, "" where it names none; others are refused.
        towers: `model_type` -> of its `vision_config`, "" where it names none; others are refused.
        processor: of the image processor; None where the family reads none.
        generation: of `generation_config.json`.
    """

    config: Fields
    decoders: Mapping[str, Fields] = field(default_factory=dict)
    towers: Mapping[str, Fields] = field(default_factory=dict)
    processor: Fields | None = None
    generation: Fields = field(default_factory=lambda: GENERATED)


def check_fields(checkpoint: Checkpoint, known: KnownFields) -> tuple[str, ...]:
    """Go through every field of a checkpoint's configuration.

    Args:
        checkpoint: whose files are read.
        known: of its family.

    Returns:
        names of the fields that are not known and not null, e.g. `text_config.attention_sink`, `processor_config.json: do_sharpen`.

    Raises:
        CheckpointError: a value that is not supported.
    """
    unknown: list[str] = []
    for file, prefix, content, fields in _objects(checkpoint, known):
        unknown += _unknown(checkpoint, file, prefix, content, fields)
    return tuple(unknown)


def check_companion_fields(
    companion: Checkpoint, known: Fields, processor: Fields | None = None
) -> tuple[str, ...]:
    """Go through the fields of a decoder or a vision tower in a checkpoint of its own, the tower perhaps with a text tower beside it.

    Args:
        companion: the checkpoint.
        known: its fields.
        processor: those of its image processor, where it is read.

    Returns:
        as of `check_fields`, with the name of the checkpoint in front.

    Raises:
        CheckpointError: a value that is not supported.
    """
    inner = companion.config.get("vision_config")
    prefix, content = ("vision_config.", inner) if isinstance(inner, dict) else ("", companion.config)
    unknown = _unknown(companion, CONFIG, prefix, content, known)
    if processor is not None:
        file, prefix, stored = stored_processor(companion)
        unknown += _unknown(companion, file, prefix, stored, processor)
    return tuple(f"{companion.name}: {name}" for name in unknown)


def check_values(companion: Checkpoint) -> None:
    """Refuse values of another kind or out of all bounds in the configuration of a checkpoint whose fields are not known one by one.

    Args:
        companion: whose `config.json` it is; `text_config` and `vision_config` in it are gone through too.

    Raises:
        CheckpointError: names the field.
    """
    for name in ("", *_PARTS):
        content = companion.config.get(name) if name else companion.config
        if content is not None:
            _unknown(companion, CONFIG, f"{name}." if name else "", content, Fields())


def note_of(unknown: Iterable[str]) -> tuple[str, ...]:
    """What the user is told of fields that are not known: one sentence, or none."""
    names = tuple(map(named, unknown))
    if not names:
        return ()
    one, more = len(names) == 1, len(names) - _MOST_TOLD
    listed = ", ".join(names[:_MOST_TOLD]) + (f" and {more} more" if more > 0 else "")
    return (
        f"{listed}: {'a field that is' if one else 'fields that are'} not known here and not followed; where "
        f"{'it changes' if one else 'they change'} tokens or pixels, answers are not the model's",
    )


def _objects(checkpoint: Checkpoint, known: KnownFields) -> Iterator[tuple[str, str, dict[str, Any], Fields]]:
    """(File, prefix of names, content, its fields) of every object whose fields are known."""
    config = checkpoint.config
    yield CONFIG, "", config, known.config
    for name, kinds in zip(_PARTS, (known.decoders, known.towers), strict=True):
        inner = config.get(name)
        if not isinstance(inner, dict) or not kinds:
            continue
        model_type = inner.get("model_type") or ""
        if not isinstance(model_type, str) or model_type not in kinds:
            raise CheckpointError(
                f"{name}.model_type is not supported (supported: {', '.join(filter(None, kinds))}): it is {shown(model_type)}",
                subject=str(checkpoint.folder / CONFIG),
                hint=_NOT_AS_PUBLISHED,
            )
        yield CONFIG, f"{name}.", inner, kinds[model_type]
    yield GENERATION, "", checkpoint.json(GENERATION), known.generation
    if known.processor is None:
        return
    yield PROCESSOR, "", checkpoint.json(PROCESSOR), PROCESSING
    yield *stored_processor(checkpoint), known.processor


def _unknown(
    checkpoint: Checkpoint, file: str, prefix: str, content: Mapping[str, Any], fields: Fields
) -> list[str]:
    """Names of one object's fields that are not known; refuses values that are not supported."""
    unknown = []
    for name, value in content.items():
        supported = fields.only.get(name)
        if supported is not None and not any(_same(value, other) for other in supported):
            raise CheckpointError(
                f"{prefix}{name} is {shown(value)} (supported: {', '.join(map(repr, supported))})",
                subject=str(checkpoint.folder / file),
                hint=_NOT_AS_PUBLISHED,
            )
        wanted = fault(name, value, fields.values)
        if wanted is not None:
            raise _wrong(checkpoint, file, f"{prefix}{name}", value, wanted)
        if value is not None and not fields.knows(name):
            unknown.append(f"{prefix}{name}" if file == CONFIG else f"{file}: {prefix}{name}")
    uneven = division_fault(content)
    if uneven is not None:
        raise _wrong(checkpoint, file, f"{prefix}{uneven[0]}", content[uneven[0]], uneven[1])
    return unknown


def _wrong(checkpoint: Checkpoint, file: str, name: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{name} is {shown(value)} (expected: {wanted})",
        subject=str(checkpoint.folder / file),
        hint="fetch the file again, or compare it with the model as published",
    )


def _same(value: Any, supported: Any) -> bool:
    if isinstance(value, bool) or isinstance(supported, bool):
        return value is supported  # True is no 1
    if isinstance(supported, float) and is_number(value):
        return math.isclose(value, supported, rel_tol=1e-6)  # written with fewer digits
    return bool(value == supported)


# What transformers writes into any configuration


HOUSEKEEPING = Fields(
    followed=names("model_type auto_map quantization_config tie_word_embeddings eos_token_id"),
    # In configs of older versions.
    only={
        **OTHER_TOKENS,
        "repetition_penalty": (1.0,),
        "is_decoder": (False,),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "pruned_heads": ({},),
        "configuration_files": ([], None),  # transformers would read another file in the place of this one
    },
    # Names, element types, training and its programs, sampling (answers are greedy), and other tasks than generation.
    without_effect=names(
        """_name_or_path _commit_hash _attn_implementation _attn_implementation_autoset attn_implementation architectures
        transformers_version transformers.js_config torch_dtype dtype torchscript use_bfloat16 tf_legacy_loss use_cache
        return_dict output_attentions output_hidden_states output_scores return_dict_in_generate chunk_size_feed_forward
        bos_token_id pad_token_id sep_token_id decoder_start_token_id ignore_index initializer_range initializer_factor
        attention_dropout dropout hidden_dropout_prob projection_dropout finetuning_task task_specific_params problem_type
        id2label label2id num_labels prefix tokenizer_class cross_attention_hidden_size tie_encoder_decoder do_sample
        early_stopping max_length temperature top_k top_p typical_p num_beams num_beam_groups diversity_penalty length_penalty
        num_return_sequences exponential_decay_length_penalty remove_invalid_values unsloth_fixed unsloth_version"""
    ),
)

# Decoders, by `model_type`

_DECODER = HOUSEKEEPING | Fields(
    names(
        """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
        hidden_act max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters partial_rotary_factor
        original_max_position_embeddings"""
    )
)
_WINDOW = Fields(names("sliding_window use_sliding_window layer_types"), {}, names("max_window_layers"))
LLAMA = _DECODER | Fields(names("attention_bias mlp_bias"), {}, names("pretraining_tp max_sequence_length"))
MISTRAL = _DECODER | Fields(names("sliding_window"))
QWEN2 = _DECODER | _WINDOW | Fields(only={"use_mrope": (False,)})
QWEN3 = _DECODER | _WINDOW | Fields(names("attention_bias"))

# Towers, by `model_type`

_TOWER = HOUSEKEEPING | Fields(
    names(
        """hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size hidden_act layer_norm_eps"""
    ),
    {"num_channels": (3,)},
)
# The projection and the vocabulary are those of the text tower's side.
CLIP_TOWER = _TOWER | Fields(without_effect=names("projection_dim vocab_size"))
SIGLIP_TOWER = _TOWER | Fields(names("vision_use_head"))
INTERN_TOWER = _TOWER | Fields(
    names("attention_bias use_qk_norm norm_type use_absolute_position_embeddings use_mean_pooling"),
    {"use_mask_token": (False,)},
    names("layer_scale_init_value"),
    {"image_size": SIDE | several(SIDE, 2, 2), "patch_size": PATCH | several(PATCH, 2, 2)},
)
# `spatial_patch_size` and `in_chans` are what transformers' classes do not read.
QWEN_TOWER = HOUSEKEEPING | Fields(
    names(
        """depth embed_dim hidden_size hidden_act intermediate_size mlp_ratio num_heads in_channels patch_size spatial_merge_size
        temporal_patch_size out_hidden_size window_size fullatt_block_indexes num_position_embeddings deepstack_visual_indexes
        rope_parameters"""
    ),
    {"in_chans": (3,)},
    names("spatial_patch_size tokens_per_second"),
)

# Image processors

_PIXELS = Fields(
    names("image_mean image_std resample size"),
    {
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "rescale_factor": (1 / 255,),
        "do_convert_rgb": (True, None),
    },
    # What transformers' classes write of themselves, and of how arrays are handed over.
    names(
        """image_processor_type feature_extractor_type processor_class _valid_processor_keys _processor_class data_format
        default_to_square disable_grouping return_tensors"""
    ),
)
# Whether images are cropped, padded or stretched is the recipe's `fit`; published ones crop, which cuts off what is to be found.
SQUARE_PIXELS = _PIXELS | Fields(names("crop_size"), {}, names("do_center_crop do_pad"))
# Tiles are as large as the crop, and whether a batch of them is padded changes none of them.
_ANYRES_PIXELS = _PIXELS | Fields(
    names("crop_size image_grid_pinpoints"),
    {"aspect_ratio_setting": ("anyres",)},
    names("do_center_crop do_pad"),
)
# transformers' processor crops to tiles whatever `crop_to_patches` says (`processing_internvl.py`).
_INTERN_PIXELS = _PIXELS | Fields(
    names("crop_size min_patches max_patches"), {}, names("crop_to_patches do_center_crop do_pad")
)
_NATIVE_PIXELS = _PIXELS | Fields(
    names("min_pixels max_pixels patch_size merge_size temporal_patch_size"), {}, names("do_center_crop")
)

# Of `processor_config.json` beside the image processor's: how many placeholders stand for an image, which follows from `config.json`.
PROCESSING = Fields(
    frozenset({NESTED}),
    {},
    names(
        """processor_class auto_map tokenizer video_processor feature_extractor chat_template image_token video_token patch_size
        image_seq_length num_image_tokens num_additional_image_tokens vision_feature_select_strategy vision_aspect_ratio"""
    ),
)

# Families

_COMPOSED = HOUSEKEEPING | Fields(
    names(
        """text_config vision_config image_token_index image_token_id projector_hidden_act multimodal_projector_bias
        vision_feature_layer vision_feature_select_strategy"""
    ),
    {},
    # The table's rows, and the number of tokens, follow from other fields.
    names("vocab_size hidden_size image_seq_length"),
)
_ANYRES = _COMPOSED | Fields(names("image_grid_pinpoints"), {"use_image_newline_parameter": (True,)})
# Videos are not read; their tokens are no part of a prompt.
_VIDEO = Fields(without_effect=names("video_token_index video_token_id"))
_QWEN_TOKENS = Fields(
    names("image_token_id"),
    {},
    names("video_token_id vision_start_token_id vision_end_token_id vision_token_id"),
)
_TRAINING = names(
    """freeze_backbone freeze_mm_mlp_adapter freeze_mm_vision_resampler tune_mm_mlp_adapter tune_mm_vision_resampler
    unfreeze_mm_vision_tower mm_projector_lr mm_vision_tower_lr pretrain_mm_mlp_adapter mm_hidden_size tokenizer_padding_side
    tokenizer_model_max_length"""
)


def _qwen_vl(tower: str) -> KnownFields:
    """Decoder's fields stand outermost in what Qwen publishes, in `text_config` in what transformers writes."""
    decoder = QWEN2 | QWEN3 | _QWEN_TOKENS
    outermost = decoder | Fields(names("text_config vision_config"))
    return KnownFields(
        outermost, {f"{tower}_text": decoder, "": decoder}, {tower: QWEN_TOWER, f"{tower}_vision": QWEN_TOWER, "": QWEN_TOWER},
        _NATIVE_PIXELS, QWEN_GENERATED,
    )  # fmt: skip


_CLIP_TOWERS = {"clip_vision_model": CLIP_TOWER, "": CLIP_TOWER}

FAMILIES: dict[str, KnownFields] = {
    "llava": KnownFields(_COMPOSED, {"llama": LLAMA, "": LLAMA}, _CLIP_TOWERS, SQUARE_PIXELS),
    "llava_next": KnownFields(
        _ANYRES, {"llama": LLAMA, "mistral": MISTRAL, "": LLAMA}, _CLIP_TOWERS, _ANYRES_PIXELS
    ),
    "llava_onevision": KnownFields(
        _ANYRES | _VIDEO | Fields(names("vision_aspect_ratio")),
        {"qwen2": QWEN2, "": QWEN2},
        {"siglip_vision_model": SIGLIP_TOWER, "": SIGLIP_TOWER},
        _ANYRES_PIXELS,
    ),
    "internvl": KnownFields(
        _COMPOSED | _VIDEO | Fields(names("downsample_ratio image_seq_length")),
        {"qwen2": QWEN2, "qwen3": QWEN3, "llama": LLAMA, "": QWEN2},
        {"internvl_vision": INTERN_TOWER, "": INTERN_TOWER},
        _INTERN_PIXELS,
    ),
    "qwen2_vl": _qwen_vl("qwen2_vl"),
    "qwen2_5_vl": _qwen_vl("qwen2_5_vl"),
    "qwen3_vl": _qwen_vl("qwen3_vl"),
    "llava_original": KnownFields(
        LLAMA
        | Fields(
            names("mm_vision_tower mm_vision_select_layer"),
            {
                "mm_projector_type": ("mlp2x_gelu",),
                "mm_vision_select_feature": ("patch",),
                "mm_use_im_start_end": (False,),
                "mm_use_im_patch_token": (False,),
                "image_aspect_ratio": ("pad",),
                "mm_patch_merge_type": ("flat",),
                "mm_resampler_type": (None,),
                "use_mm_proj": (True,),
                "s2": (False,),
            },
            # Grids belong to `image_aspect_ratio: anyres`.
            _TRAINING | names("image_grid_pinpoints image_crop_resolution image_split_resolution"),
        )
    ),
    "shikra": KnownFields(
        LLAMA
        | Fields(
            names("mm_vision_tower mm_vision_select_layer"),
            {"mm_use_im_start_end": (True,), "use_mm_proj": (True,)},
            _TRAINING,
        )
    ),
}
"""Family -> fields of its checkpoints. (MiniGPT-v2 has no config.json; that of its language model is a Llama's.)"""
