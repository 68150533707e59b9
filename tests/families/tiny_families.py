"""The table of families that transformers knows: a published config of each, reduced in size, and how its whole model is asked. One row
is one family.

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
from tests.families.reduced import IMAGE_TOKEN, reduced

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
        published: hub id of the checkpoint whose config it has.
        config: content of config.json.
        processor: content of preprocessor_config.json.
        inputs: (inputs of the vision graph, size) of every image of one prompt, [1, S] ids of the unpruned prompt -> what
            transformers' model takes beside the ids.
        builds: images in a prompt -> recipes whose graphs are compared with the reference. The first keeps a range; every
            other part of the contract is asked of it.
        more: recipes of prompts with one image, compared in the long tests alone.
        engines: images in a prompt -> pruners of bundles of which engines are built.
        number: transformers' model, its inputs, [1, S] ids -> [R, S] position ids of the unpruned prompt.
    """

    name: str
    published: str
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    inputs: Callable[[Sequence[PixelInputs], Sequence[Size], torch.Tensor], Inputs]
    builds: Mapping[int, tuple[Options, ...]]
    engines: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    number: Callable[[Any, Inputs, torch.Tensor], Ids] = counted_ids
    more: tuple[Options, ...] = ()


def ranged(pruner: str) -> Options:
    """Requests choose how much is kept."""
    return {"pruner": pruner, "keep": "0.1:0.3:1.0"}


def adaptive(pruner: str, **changes: Any) -> Options:
    """Every image finds its own count."""
    return {"pruner": pruner, "keep": "adaptive", "keep_bound": 0.9, **changes}


def fixed(pruner: str, **changes: Any) -> Options:
    return {"pruner": pruner, "keep": 0.3, **changes}


def _family(
    name: str,
    published: str,
    inputs: Callable[[Sequence[PixelInputs], Sequence[Size], torch.Tensor], Inputs],
    builds: Mapping[int, tuple[Options, ...]],
    engines: Mapping[int, tuple[str, ...]] = MappingProxyType({}),
    number: Callable[[Any, Inputs, torch.Tensor], Ids] = counted_ids,
    more: tuple[Options, ...] = (),
) -> TinyFamily:
    config, processor = reduced(published, name.removesuffix("_mistral"))
    return TinyFamily(name, published, config, processor, inputs, builds, engines, number, more)


def _qwen_vl(
    name: str,
    published: str,
    other: Options,
    of_two: Options,
    engines: Mapping[int, tuple[str, ...]],
    more: Options,
) -> TinyFamily:
    """Patches of 4 pixels, four to a token; windows of two by two tokens; three sections of M-RoPE."""
    builds = {1: (ranged("divprune"), fixed("dart"), other), 2: (of_two,)}
    return _family(
        name,
        published,
        native_inputs,
        builds,
        engines,
        mrope_ids,
        (more, adaptive("prumerge", merged_id="centroid"), ranged("spatial"), *by_attention()),
    )


BY_ATTENTION = ("cls_attention", "tile_attention", "prumerge", "prumerge_plus", "visionzip", "vispruner")
"""Pruners that go by attention of the tower."""


def by_attention() -> tuple[Options, ...]:
    """A bundle of each."""
    return tuple(fixed(pruner) for pruner in BY_ATTENTION)


# The table

NATIVE = (
    _qwen_vl(
        "qwen2_vl",
        "Qwen/Qwen2-VL-7B-Instruct",
        fixed("visionzip", positions="permuted"),
        ranged("dart"),
        {1: ("dart", "visionzip", "spatial")},
        fixed("random", positions="permuted"),
    ),
    _qwen_vl(
        "qwen2_5_vl",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        fixed("prumerge", positions="shifted"),
        ranged("cls_attention"),
        {1: ("dart", "divprune", "cdpruner", "prumerge_plus")},
        fixed("divprune", positions="shifted"),
    ),
    _qwen_vl(
        "qwen3_vl",
        "Qwen/Qwen3-VL-8B-Instruct",
        fixed("prumerge_plus", positions="permuted"),
        ranged("visionzip"),
        {1: ("dart", "cls_attention"), 2: ("dart",)},
        fixed("divprune", positions="permuted"),
    ),
)
"""Families that take images at their own shape."""

TILES = (
    _family(
        "llava_next",
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        anyres_inputs,
        {
            1: (
                ranged("cls_attention"),
                fixed("tile_attention"),
                fixed("visionzip"),
                fixed("prumerge", merged_id="centroid"),
                fixed("cls_attention", positions="permuted"),
            )
        },
        {1: ("cls_attention", "spatial", "divprune")},
        more=(adaptive("prumerge"), adaptive("prumerge_plus", positions="shifted")),
    ),
    _family(
        "llava_next_mistral",
        "llava-hf/llava-v1.6-mistral-7b-hf",
        anyres_inputs,
        {1: (ranged("spatial"),)},
    ),
    _family(
        "llava_onevision",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        anyres_inputs,
        {1: (ranged("divprune"), fixed("tile_attention")), 2: (ranged("tile_attention"),)},
        {1: ("divprune", "tile_attention", "prumerge")},
        more=(
            fixed("dart"),
            adaptive("prumerge_plus", merged_id="centroid"),
            ranged("spatial"),
            *by_attention(),
        ),
    ),
    _family(
        "internvl",
        "OpenGVLab/InternVL3-8B-hf",
        tile_inputs,
        {
            1: (ranged("cls_attention"), fixed("tile_attention"), fixed("vispruner")),
            2: (ranged("cls_attention"),),
        },
        {1: ("cls_attention", "spatial", "cdpruner")},
        more=(
            adaptive("prumerge", merged_id="centroid"),
            ranged("spatial"),
            *(fixed(pruner) for pruner in ("visionzip", "prumerge", "prumerge_plus")),
        ),
    ),
)
"""Families whose images become tiles: a whole image and up to six tiles, an end of line after every row of tokens in LLaVA's."""

FAMILIES = {family.name: family for family in (*NATIVE, *TILES)}
