"""A CLIP checkpoint beside a model that is published without its vision tower."""

from __future__ import annotations

from transformers import CLIPConfig, CLIPVisionConfig

from gap_export.checkpoint import Checkpoint
from gap_export.errors import CheckpointError, first_line

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the images that OpenAI's CLIP was trained on; every tower that comes from it is fed with these."""

CLIP_LEFT_OUT = r"vision_tower/(text_model\.|text_projection\.|visual_projection\.|logit_scale)"
"""Keys of a whole CLIP checkpoint that a vision tower does not need."""


def vision_config(part: Checkpoint) -> CLIPVisionConfig:
    """Config of the vision tower in a CLIP checkpoint, whole or the tower alone.

    Raises:
        CheckpointError: it holds another kind of model, or a config that transformers does not accept.
    """
    kinds = {"clip": CLIPConfig, "clip_vision_model": CLIPVisionConfig}
    if part.model_type not in kinds:
        raise CheckpointError(
            f"has model_type {part.model_type!r} where a CLIP checkpoint is needed",
            subject=str(part.folder / "config.json"),
            hint="--vision-tower names the CLIP checkpoint that the model was trained on",
        )
    try:
        config = kinds[part.model_type].from_pretrained(part.folder, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"is not a configuration transformers accepts: {first_line(error)}",
            subject=str(part.folder / "config.json"),
            hint="fetch the checkpoint's config.json again",
        ) from error
    return config.vision_config if isinstance(config, CLIPConfig) else config
