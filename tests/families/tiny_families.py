"""The table of families that transformers knows: a small config of each, and how its whole model is asked. One row is one family.

Tests in `contract.py` run on every row; see `TinyFamily` for what a row says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from gap_export.inputs.batch import PixelInputs, Size
from gap_export.positions import Ids

IMAGE_TOKEN, EOS, VOCABULARY, WIDTH = 4, 2, 64, 64
TILE = 36
GRIDS = [[TILE * rows, TILE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3) if rows * columns < 7]

Options = dict[str, Any]
"""Fields of a recipe."""

Inputs = dict[str, torch.Tensor]
"""What transformers' model takes beside the ids."""

# What transformers' models are given


def pixels_of(calls: Sequence[PixelInputs]) -> list[torch.Tensor]:
    return [torch.from_numpy(call["pixel_values"]) for call in calls]


def native_inputs(calls: Sequence[PixelInputs], sizes: Sequence[Size], ids_1S: torch.Tensor) -> Inputs:
    """The patches of all images one after another, and their grids."""
    grids = [[1, *(call["patch_positions"].max(axis=(0, 1)) + 1)] for call in calls]
    return {
        "pixel_values": torch.cat([each.flatten(0, 1) for each in pixels_of(calls)]),
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": (ids_1S == IMAGE_TOKEN).int(),
    }


def anyres_inputs(calls: Sequence[PixelInputs], sizes: Sequence[Size], ids_1S: torch.Tensor) -> Inputs:
    """Every image's tiles, filled up to the most that one has, and the sizes of the images."""
    pixels = pixels_of(calls)
    most = max(map(len, pixels))
    padded = [torch.nn.functional.pad(each, (0, 0, 0, 0, 0, 0, 0, most - len(each))) for each in pixels]
    return {
        "pixel_values": torch.stack(padded),
        "image_sizes": torch.tensor([[height, width] for width, height in sizes]),
    }


def tile_inputs(calls: Sequence[PixelInputs], sizes: Sequence[Size], ids_1S: torch.Tensor) -> Inputs:
    """The tiles of all images one after another."""
    return {"pixel_values": torch.cat(pixels_of(calls))}


def mrope_ids(model: Any, inputs: Inputs, ids_1S: torch.Tensor) -> Ids:
    """[3, S], numbered by transformers."""
    known = {name: inputs[name] for name in ("image_grid_thw", "mm_token_type_ids")}
    ids: Ids = model.model.get_rope_index(ids_1S, **known)[0][:, 0].numpy()
    return ids


def counted_ids(model: Any, inputs: Inputs, ids_1S: torch.Tensor) -> Ids:
    """[1, S]: 0, 1, 2, ..."""
    return np.arange(ids_1S.shape[1])[None]


# What a row says


@dataclass(frozen=True)
class TinyFamily:
    """A family, as the contract of all families needs it.

    Attributes:
        name: of the checkpoint; the family's, but for a second decoder of the same family.
        config: content of config.json.
        processor: content of preprocessor_config.json.
        inputs: (inputs of the vision graph, size) of every image of one prompt, [1, S] ids of the unpruned prompt -> what
            transformers' model takes beside the ids.
        builds: images in a prompt -> recipes whose graphs are compared with the reference. The first keeps a range; every
            other part of the contract is asked of it.
        engines: images in a prompt -> pruners of bundles of which engines are built.
        number: transformers' model, its inputs, [1, S] ids -> [R, S] position ids of the unpruned prompt.
    """

    name: str
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    inputs: Callable[[Sequence[PixelInputs], Sequence[Size], torch.Tensor], Inputs]
    builds: Mapping[int, tuple[Options, ...]]
    engines: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    number: Callable[[Any, Inputs, torch.Tensor], Ids] = counted_ids


def ranged(pruner: str) -> Options:
    """Requests choose how much is kept."""
    return {"pruner": pruner, "keep": "0.1:0.3:1.0"}


def fixed(pruner: str, **changes: Any) -> Options:
    return {"pruner": pruner, "keep": 0.3, **changes}


# Configs


def _decoder(kind: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        **changes,
    }


def _tower(kind: str, **changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return {"model_type": kind, **sizes, "image_size": TILE, "patch_size": 6, **changes}


_NORMAL = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
_PIXELS = {"min_pixels": 4 * 64, "max_pixels": 48 * 64}


def _qwen_vl(
    name: str,
    tower: dict[str, Any],
    decoder: dict[str, Any],
    bounds: dict[str, Any],
    other: Options,
    engines: Mapping[int, tuple[str, ...]],
    **config: Any,
) -> TinyFamily:
    """Patches of 4 pixels, four to a token; windows of two by two tokens; three sections of M-RoPE."""
    sizes = {"depth": 4, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}
    return TinyFamily(
        name,
        {
            "model_type": name,
            "vision_config": {"model_type": name, "temporal_patch_size": 2, **sizes, **tower},
            "text_config": _decoder(f"{name}_text", **{"rope_parameters": rope, **decoder}),
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": VOCABULARY - 1,
            "vision_start_token_id": VOCABULARY - 2,
            "vision_end_token_id": VOCABULARY - 3,
            **config,
        },
        {**_NORMAL, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, **bounds},
        native_inputs,
        builds={1: (ranged("divprune"), fixed("dart"), other), 2: (ranged("dart"),)},
        engines=engines,
        number=mrope_ids,
    )


def _anyres(
    name: str,
    model_type: str,
    tower: dict[str, Any],
    decoder: dict[str, Any],
    builds: Mapping[int, tuple[Options, ...]],
    engines: Mapping[int, tuple[str, ...]] = MappingProxyType({}),
    **config: Any,
) -> TinyFamily:
    """A thumbnail and up to six tiles, and an end of line after every row of tokens."""
    config = {
        "model_type": model_type,
        "vision_config": tower,
        "text_config": decoder,
        "image_token_index": IMAGE_TOKEN,
        "image_grid_pinpoints": GRIDS,
        "tie_word_embeddings": False,
        **config,
    }
    processor = {**_NORMAL, "image_grid_pinpoints": GRIDS}
    return TinyFamily(name, config, processor, anyres_inputs, builds, engines)


# The table

NATIVE = (
    _qwen_vl(
        "qwen2_vl",
        {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2},
        {"tie_word_embeddings": True},
        _PIXELS,
        fixed("random", positions="permuted"),
        {1: ("dart",)},
        tie_word_embeddings=True,
    ),
    _qwen_vl(
        "qwen2_5_vl",
        {"hidden_size": 32, "out_hidden_size": WIDTH, "window_size": 16, "fullatt_block_indexes": [1, 3]},
        {},
        _PIXELS,
        fixed("divprune", positions="shifted"),
        {1: ("dart", "divprune")},
    ),
    _qwen_vl(
        "qwen3_vl",
        {
            "hidden_size": 32,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 2],
        },
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 2, 2]},
        },
        {"size": {"shortest_edge": 4 * 64, "longest_edge": 48 * 64}},
        fixed("divprune", positions="permuted"),
        {1: ("dart",), 2: ("dart",)},
    ),
)
"""Families that take images at their own shape."""

TILES = (
    _anyres(
        "llava_next",
        "llava_next",
        _tower("clip_vision_model", projection_dim=32),
        _decoder("llama"),
        {
            1: (
                ranged("cls_attention"),
                fixed("tile_attention"),
                fixed("visionzip"),
                fixed("prumerge"),
                fixed("cls_attention", positions="permuted"),
            )
        },
        {1: ("cls_attention",)},
        vision_feature_layer=-2,
    ),
    _anyres(
        "llava_next_mistral",
        "llava_next",
        _tower("clip_vision_model", projection_dim=32),
        _decoder("mistral", sliding_window=None),
        {1: (ranged("cls_attention"),)},
        vision_feature_layer=-2,
    ),
    _anyres(
        "llava_onevision",
        "llava_onevision",
        _tower("siglip_vision_model", vision_use_head=False),
        _decoder("qwen2"),
        {1: (ranged("divprune"), fixed("dart")), 2: (ranged("dart"),)},
        {1: ("divprune",)},
        vision_aspect_ratio="anyres_max_2",
        video_token_index=VOCABULARY - 1,
    ),
    TinyFamily(
        "internvl",
        {
            "model_type": "internvl",
            "vision_config": _tower("internvl_vision", image_size=[TILE, TILE], patch_size=[3, 3]),
            "text_config": _decoder("qwen2", tie_word_embeddings=True),
            "image_token_id": IMAGE_TOKEN,
            "image_seq_length": 36,
            "downsample_ratio": 0.5,
            "tie_word_embeddings": True,
        },
        {**_NORMAL, "min_patches": 1, "max_patches": 6},
        tile_inputs,
        {
            1: (ranged("cls_attention"), fixed("tile_attention"), fixed("vispruner")),
            2: (ranged("cls_attention"),),
        },
        {1: ("cls_attention",)},
    ),
)
"""Families whose images become tiles."""

FAMILIES = {family.name: family for family in (*NATIVE, *TILES)}
