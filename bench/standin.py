"""Stand-in checkpoints in a scratch folder: see `gap_export/random_weights.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gap_export.checkpoint.random_weights import Published, published, write_checkpoint
from gap_export.errors import MissingRequirementError

LLAVA_7B = published("llava-hf/llava-1.5-7b-hf").config
LLAVA_13B = published("llava-hf/llava-1.5-13b-hf").config
IMAGE_TOKEN = LLAVA_7B["image_token_index"]
LLAVA_135M = {
    **LLAVA_7B,
    "torch_dtype": "float16",
    "vision_config": {
        **LLAVA_7B["vision_config"],
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 512,
    },
    "text_config": {
        **LLAVA_7B["text_config"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
"""A tower as CLIP-B/14 at 336 pixels (576 patches) and a decoder as SmolLM-135M: what fits a laptop."""


def truncated(config: dict[str, Any], *, text_layers: int, vision_layers: int) -> dict[str, Any]:
    """The same widths with fewer layers."""
    return {
        **config,
        "text_config": {**config["text_config"], "num_hidden_layers": text_layers},
        "vision_config": {**config["vision_config"], "num_hidden_layers": vision_layers},
    }


def ensure_checkpoint(folder: Path, config: dict[str, Any]) -> tuple[Path, int]:
    """Write a checkpoint folder, or take the one that an earlier run left there.

    Returns:
        (folder, bytes of its weights).

    Raises:
        SystemExit: something else is in the way, or the disk has no room.
    """
    if folder.exists() and json.loads((folder / "config.json").read_text()) != config:
        raise SystemExit(f"{folder} holds another checkpoint; remove it or choose another --scratch")
    if not folder.exists():
        whole = published("llava-hf/llava-1.5-7b-hf")
        try:
            write_checkpoint(folder, Published(config, whole.preprocessor_config, whole.special_tokens))
        except MissingRequirementError as error:
            raise SystemExit(str(error)) from error
    return folder, sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))
