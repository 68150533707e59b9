"""Models that see images at their own resolution: Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gap_export.checkpoint import Checkpoint, open_checkpoint
from tests.families.published import towers
from tests.families.published.decoders import SIZES, decoder_config, decoder_shapes
from tests.families.published.files import write
from tests.families.published.keys import Shapes, named, new_names

QWEN2_PROCESSOR: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
}
QWEN3_PROCESSOR: dict[str, Any] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
}
TOKENS = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}


def qwen2_vl(folder: Path, kind: str, *, new: bool) -> Checkpoint:
    vision = {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": SIZES[kind]["width"],
        "patch_size": 14,
    }
    tower = towers.qwen2(SIZES[kind]["width"])
    return _qwen2(folder, "qwen2_vl", kind, vision, tower, tied=kind == "qwen2-1.5b", new=new)


def qwen25_vl(folder: Path, kind: str, *, new: bool) -> Checkpoint:
    vision = {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": SIZES[kind]["width"],
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    tower = towers.qwen25(SIZES[kind]["width"])
    return _qwen2(folder, "qwen2_5_vl", kind, vision, tower, tied=kind == "qwen2.5-3b", new=new)


def qwen3_vl(folder: Path, kind: str) -> Checkpoint:
    tied, vocabulary, out = kind == "qwen3-4b", 151936, SIZES[kind]["width"]
    depth, width, hidden = (24, 1024, 4096) if tied else (27, 1152, 4304)
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    text = {"model_type": "qwen3_vl_text", "head_dim": 128, "rope_theta": 5000000, "rope_scaling": rope}
    config = {
        "model_type": "qwen3_vl",
        "text_config": _text_config(kind, vocabulary, **text),
        "tie_word_embeddings": tied,
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17] if tied else [8, 16, 24],
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": out,
            "patch_size": 16,
        },
    }
    decoder = decoder_shapes(kind, vocabulary, tied=tied)
    tower = towers.qwen3(depth, width, hidden, out)
    return _saved(folder, config, new_names(decoder, named("visual.", tower)), QWEN3_PROCESSOR)


def _qwen2(
    folder: Path, model: str, kind: str, vision: dict[str, Any], tower: Shapes, *, tied: bool, new: bool
) -> Checkpoint:
    """Qwen2-VL and Qwen2.5-VL; names of transformers before 4.52 begin with `model.` and `visual.`."""
    vocabulary = 151936 if tied else 152064
    text = {
        "model_type": model,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
    }
    decoder, tower = decoder_shapes(kind, vocabulary, tied=tied), named("visual.", tower)
    shapes = new_names(decoder, tower) if new else {**decoder, **tower}
    config = {**_text_config(kind, vocabulary, **text), "vision_config": vision}
    return _saved(folder, config, shapes, QWEN2_PROCESSOR)


def _text_config(kind: str, vocabulary: int, **changes: Any) -> dict[str, Any]:
    return decoder_config(kind, vocabulary, bos_token_id=151643, eos_token_id=151645, **changes)


def _saved(folder: Path, config: dict[str, Any], shapes: Shapes, processor: dict[str, Any]) -> Checkpoint:
    vision = {**config["vision_config"], "spatial_merge_size": 2, "temporal_patch_size": 2}
    processor = {**processor, "merge_size": 2, "temporal_patch_size": 2}
    config = {**config, **TOKENS, "vision_config": vision}
    return open_checkpoint(write(folder / "checkpoint", config, shapes, **processor))
