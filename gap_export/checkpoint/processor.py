"""Which file holds the settings of a checkpoint's image processor."""

from __future__ import annotations

from typing import Any

from gap_export.checkpoint import Checkpoint

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
NESTED = "image_processor"
"""Their name inside the second file."""


def stored_processor(checkpoint: Checkpoint) -> tuple[str, str, dict[str, Any]]:
    """Settings of the image processor, from where transformers looks for them first.

    Its `save_pretrained` writes them into `processor_config.json`, and leaves an older `preprocessor_config.json` in the folder as it
    was (`image_processing_base.get_image_processor_dict`).

    Returns:
        (file, prefix of names in it, settings; empty where there are none).
    """
    nested = checkpoint.json(PROCESSOR).get(NESTED)
    if isinstance(nested, dict):
        return PROCESSOR, f"{NESTED}.", nested
    return PREPROCESSOR, "", checkpoint.json(PREPROCESSOR)
