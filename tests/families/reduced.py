"""Published configurations with nothing changed but sizes: how wide, deep and long a model is, and with that its token ids.

The fields are those of `gap_export/checkpoint/configs`. A size that a published file leaves to the default is written down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gap_export.checkpoint.random_weights import published

Json = dict[str, Any]

VOCABULARY, WIDTH, HIDDEN, HEADS, KV_HEADS = 64, 64, 96, 4, 2
IMAGE_TOKEN, BOS, EOS, PAD = 4, 1, 2, 0
TILE, PATCH = 36, 6
GRIDS = [[TILE * rows, TILE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3) if rows * columns < 7]
NATIVE_PATCH = 4
_TOKEN = (2 * NATIVE_PATCH) ** 2
"""Pixels of a visual token of models that take images at their own shape."""

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": PATCH,
}
_NATIVE_TOWER = {"depth": 2, "num_heads": 2, "patch_size": NATIVE_PATCH}
_IDS = {
    "image_token_index": IMAGE_TOKEN,
    "image_token_id": IMAGE_TOKEN,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "video_token_index": VOCABULARY - 1,
    "video_token_id": VOCABULARY - 1,
    "vision_start_token_id": VOCABULARY - 2,
    "vision_end_token_id": VOCABULARY - 3,
    "vision_token_id": VOCABULARY - 4,
}
_SQUARE = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
_NATIVE_PIXELS = {"patch_size": NATIVE_PATCH}


@dataclass(frozen=True)
class Sizes:
    """What takes the place of a family's published sizes.

    Attributes:
        decoder: of `text_config`, or of the outermost object where the decoder's fields stand there.
        tower: of `vision_config`.
        config: of the outermost object, besides.
        processor: of the image processor.
    """

    decoder: Json
    tower: Json
    config: Json
    processor: Json


def _mrope(sections: list[int]) -> Json:
    """Sections of M-RoPE for heads of 16."""
    return {"mrope_section": sections}


SIZES: dict[str, Sizes] = {
    "llava": Sizes(_DECODER, _TOWER | {"projection_dim": 32}, {}, _SQUARE),
    "llava_next": Sizes(
        _DECODER,
        _TOWER | {"projection_dim": 32},
        {"image_grid_pinpoints": GRIDS},
        {**_SQUARE, "image_grid_pinpoints": GRIDS},
    ),
    "llava_onevision": Sizes(
        _DECODER,
        _TOWER,
        {"image_grid_pinpoints": GRIDS, "vision_aspect_ratio": "anyres_max_2"},
        {"image_grid_pinpoints": GRIDS, "size": {"height": TILE, "width": TILE}},
    ),
    "internvl": Sizes(
        _DECODER,
        _TOWER | {"image_size": [TILE, TILE], "patch_size": [3, 3]},
        {"image_seq_length": 36},
        {"size": {"height": TILE, "width": TILE}, "max_patches": 6},
    ),
    "qwen2_vl": Sizes(
        _DECODER | {"rope_scaling": _mrope([2, 3, 3])},
        {**_NATIVE_TOWER, "embed_dim": 32, "hidden_size": WIDTH},
        {},
        {**_NATIVE_PIXELS, "min_pixels": 4 * _TOKEN, "max_pixels": 48 * _TOKEN},
    ),
    "qwen2_5_vl": Sizes(
        _DECODER | {"rope_scaling": _mrope([2, 3, 3])},
        {
            **_NATIVE_TOWER,
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": WIDTH,
            "window_size": 4 * NATIVE_PATCH,
            "fullatt_block_indexes": [1],
        },
        {},
        {**_NATIVE_PIXELS, "min_pixels": 4 * _TOKEN, "max_pixels": 48 * _TOKEN},
    ),
    "qwen3_vl": Sizes(
        _DECODER | {"rope_scaling": _mrope([4, 2, 2]), "head_dim": 16, "num_hidden_layers": 3},
        {
            **_NATIVE_TOWER,
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 1],
        },
        {},
        {**_NATIVE_PIXELS, "size": {"shortest_edge": 4 * _TOKEN, "longest_edge": 48 * _TOKEN}},
    ),
    # Heads of 16, as many for keys.
    "llava_original": Sizes(_DECODER | {"num_key_value_heads": HEADS}, {}, {"mm_hidden_size": 32}, {}),
    "shikra": Sizes(_DECODER | {"num_key_value_heads": HEADS}, {}, {"mm_hidden_size": 32}, {}),
    "minigpt_v2": Sizes(_DECODER | {"num_key_value_heads": HEADS}, {}, {}, {}),
}
"""By family."""


def reduced(repository: str, family: str) -> tuple[Json, Json]:
    """(config.json, preprocessor_config.json) of a published checkpoint, small.

    Args:
        repository: hub id.
        family: whose sizes they get.
    """
    stored, sizes = published(repository), SIZES[family]
    config = _with_ids({**stored.config, **sizes.config})
    if "text_config" in config:
        config["text_config"] = _smaller(config["text_config"], sizes.decoder)
    else:
        config = _smaller(config, sizes.decoder)
    if "vocab_size" in config:
        config["vocab_size"] = VOCABULARY
    if "vision_config" in config:
        config["vision_config"] = {**config["vision_config"], **sizes.tower}
    return config, {**stored.preprocessor_config, **sizes.processor} if stored.preprocessor_config else {}


def _smaller(decoder: Json, sizes: Json) -> Json:
    rope = {**(decoder.get("rope_scaling") or {}), **sizes.get("rope_scaling", {})}
    return _with_ids({**decoder, **sizes, **({"rope_scaling": rope} if rope else {})})


def _with_ids(content: Json) -> Json:
    """Token ids that the small table has; those that the published file leaves to the default stay away."""
    return {name: _IDS.get(name, value) for name, value in content.items()}
