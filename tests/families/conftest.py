"""Small checkpoints with random weights of families whose images differ in size, each in its published layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gap_export.bundle.folder import Bundle
from gap_export.recipe.recipe import Recipe

if TYPE_CHECKING:
    from gap_export.graph.trace_cache import Tracer

IMAGE_TOKEN, EOS, VOCABULARY, WIDTH = 4, 2, 64, 64
TILE = 36
GRIDS = [[TILE * rows, TILE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3) if rows * columns < 7]


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


def _anyres(
    model_type: str, tower: dict[str, Any], decoder: dict[str, Any], **changes: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vision_config": tower,
        "text_config": decoder,
        "image_token_index": IMAGE_TOKEN,
        "image_grid_pinpoints": GRIDS,
        "tie_word_embeddings": False,
        **changes,
    }


def _qwen_vl(model_type: str, tower: dict[str, Any], sections: list[int], **decoder: Any) -> dict[str, Any]:
    """Patches of 4 pixels, four to a token; windows of two by two tokens; three sections of M-RoPE."""
    sizes = {"depth": 4, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": sections}
    return {
        "model_type": model_type,
        "vision_config": {"model_type": model_type, "temporal_patch_size": 2, **sizes, **tower},
        "text_config": _decoder(f"{model_type}_text", rope_parameters=rope, **decoder),
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VOCABULARY - 1,
        "vision_start_token_id": VOCABULARY - 2,
        "vision_end_token_id": VOCABULARY - 3,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": _qwen_vl(
        "qwen2_vl",
        {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2},
        [2, 3, 3],
        tie_word_embeddings=True,
    )
    | {"tie_word_embeddings": True},
    "qwen2_5_vl": _qwen_vl(
        "qwen2_5_vl",
        {"hidden_size": 32, "out_hidden_size": WIDTH, "window_size": 16, "fullatt_block_indexes": [1, 3]},
        [2, 3, 3],
    ),
    "qwen3_vl": _qwen_vl(
        "qwen3_vl",
        {
            "hidden_size": 32,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 2],
        },
        [4, 2, 2],
        head_dim=16,
        num_hidden_layers=3,
    ),
    "llava_next": _anyres(
        "llava_next",
        _tower("clip_vision_model", projection_dim=32),
        _decoder("llama"),
        vision_feature_layer=-2,
    ),
    "llava_next_mistral": _anyres(
        "llava_next",
        _tower("clip_vision_model", projection_dim=32),
        _decoder("mistral", sliding_window=None),
        vision_feature_layer=-2,
    ),
    "llava_onevision": _anyres(
        "llava_onevision",
        _tower("siglip_vision_model", vision_use_head=False),
        _decoder("qwen2"),
        vision_aspect_ratio="anyres_max_2",
        video_token_index=VOCABULARY - 1,
    ),
    "internvl": {
        "model_type": "internvl",
        "vision_config": _tower("internvl_vision", image_size=[TILE, TILE], patch_size=[3, 3]),
        "text_config": _decoder("qwen2", tie_word_embeddings=True),
        "image_token_id": IMAGE_TOKEN,
        "image_seq_length": 36,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": True,
    },
}
"""Name -> config.json."""

_NORMAL = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
_NATIVE = {**_NORMAL, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {**_NATIVE, "min_pixels": 4 * 64, "max_pixels": 48 * 64},
    "qwen2_5_vl": {**_NATIVE, "min_pixels": 4 * 64, "max_pixels": 48 * 64},
    "qwen3_vl": {**_NATIVE, "size": {"shortest_edge": 4 * 64, "longest_edge": 48 * 64}},
    "llava_next": {**_NORMAL, "image_grid_pinpoints": GRIDS},
    "llava_next_mistral": {**_NORMAL, "image_grid_pinpoints": GRIDS},
    "llava_onevision": {**_NORMAL, "image_grid_pinpoints": GRIDS},
    "internvl": {**_NORMAL, "min_patches": 1, "max_patches": 6},
}
PROMPT = "USER : <image> where is {expression} ? ASSISTANT :"


@dataclass(frozen=True)
class Tiny:
    """A checkpoint and bundles of it, built on first use.

    Attributes:
        name: key of `CONFIGS`.
        folder: of the checkpoint.
        bundle: `bundle(keep=..., pruner=..., positions=..., ...)`.
    """

    name: str
    folder: Path
    bundle: Callable[..., Bundle]


def save_checkpoint(folder: Path, name: str, tokenizer: Path) -> Path:
    """Random weights, large enough that attention is sharp: a wrong position must show in the logits."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(**CONFIGS[name])
    model = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 1.8 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
            centre = 0.0 if parameter.dim() > 1 else float(parameter.mean() > 0.5)
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name]))
    shutil.copy(tokenizer, folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def tiny_family(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, tracer: Tracer
) -> Callable[[str], Tiny]:
    """`tiny_family(name)`: a checkpoint of `CONFIGS`, made on first use."""
    made: dict[str, Tiny] = {}

    def make(name: str) -> Tiny:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            checkpoint = save_checkpoint(folder / "checkpoint", name, tiny_checkpoint / "tokenizer.json")
            made[name] = Tiny(name, checkpoint, _builder(name, checkpoint, folder, tracer))
        return made[name]

    return make


def _builder(name: str, checkpoint: Path, folder: Path, tracer: Tracer) -> Callable[..., Bundle]:
    from gap_export.pipeline.build import build

    built: dict[str, Bundle] = {}

    def bundle(**changes: Any) -> Bundle:
        key = (
            "-".join(f"{field}={changes[field]}" for field in sorted(changes) if field != "prompt")
            or "default"
        )
        if key not in built:
            options = {
                "name": name,
                "checkpoint": str(checkpoint),
                "prompt": PROMPT,
                "max_new_tokens": 20,
                "max_text": 24,
                "max_batch": 2,
                "pruner": "divprune",
                **changes,
            }
            built[key] = build(Recipe.model_validate(options), folder / key, tracer=tracer).bundle
        return built[key]

    return bundle
