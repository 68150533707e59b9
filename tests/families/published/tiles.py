"""Models whose images become tiles: LLaVA-NeXT, LLaVA-OneVision, InternVL3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gap_export.checkpoint import Checkpoint, open_checkpoint
from tests.families.published import towers
from tests.families.published.decoders import SIZES, decoder_config, decoder_shapes
from tests.families.published.files import write
from tests.families.published.keys import Shapes, linear, named, new_names, norm

NORMAL = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
NEXT_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_GRIDS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]


def llava_next(folder: Path, kind: str, *, new: bool) -> Checkpoint:
    config = {
        "model_type": "llava_next",
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_grid_pinpoints": NEXT_GRIDS,
        "text_config": decoder_config(
            kind, 32064, **({"sliding_window": None} if kind == "mistral-7b" else {})
        ),
        "vision_config": {**towers.CLIP_CONFIG, "image_size": 336},
        "tie_word_embeddings": False,
    }
    others = {
        **named("vision_tower.vision_model.", towers.clip(336)),
        "image_newline": (4096,),
        **_projector(1024, 4096),
    }
    processor = {
        "image_grid_pinpoints": NEXT_GRIDS,
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
        "resample": 3,
    }
    return _saved(folder, config, decoder_shapes(kind, 32064), others, new=new, **processor)


def llava_onevision(folder: Path, kind: str, *, new: bool) -> Checkpoint:
    width, tied = SIZES[kind]["width"], kind == "qwen2-0.5b"
    config = {
        "model_type": "llava_onevision",
        "image_token_index": 151646,
        "video_token_index": 151647,
        "image_grid_pinpoints": ONEVISION_GRIDS,
        "vision_aspect_ratio": "anyres_max_9",
        "text_config": decoder_config(kind, 152000, tie_word_embeddings=tied),
        "vision_config": towers.SIGLIP_CONFIG,
        "tie_word_embeddings": tied,
    }
    others = {
        **named("vision_tower.vision_model.", towers.siglip()),
        "image_newline": (width,),
        **_projector(1152, width),
    }
    decoder = decoder_shapes(kind, 152000, tied=tied)
    return _saved(folder, config, decoder, others, new=new, image_grid_pinpoints=ONEVISION_GRIDS)


def internvl(folder: Path, *, new: bool) -> Checkpoint:
    config = {
        "model_type": "internvl",
        "image_token_id": 151667,
        "downsample_ratio": 0.5,
        "text_config": decoder_config("qwen2-0.5b", 151674, tie_word_embeddings=False),
        "vision_config": {"model_type": "internvl_vision", "attention_bias": True},
        "tie_word_embeddings": False,
    }
    others = {
        **named("vision_tower.", towers.intern_vit()),
        **norm("multi_modal_projector.layer_norm", 4096),
        **_projector(4096, SIZES["qwen2-0.5b"]["width"]),
    }
    decoder = decoder_shapes("qwen2-0.5b", 151674)
    return _saved(folder, config, decoder, others, new=new, min_patches=1, max_patches=12)


def _projector(inner: int, width: int) -> Shapes:
    return {
        **linear("multi_modal_projector.linear_1", width, inner),
        **linear("multi_modal_projector.linear_2", width, width),
    }


def _saved(
    folder: Path, config: dict[str, Any], decoder: Shapes, others: Shapes, *, new: bool, **processor: Any
) -> Checkpoint:
    shapes = new_names(decoder, others) if new else {**named("language_model.", decoder), **others}
    return open_checkpoint(write(folder / "checkpoint", config, shapes, **NORMAL, **processor))
