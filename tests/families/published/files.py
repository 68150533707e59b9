"""Checkpoints of any size on the disk: files of weights are headers over holes."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from tests.families.published.keys import Shapes


def write(folder: Path, config: dict[str, Any], shapes: Shapes, **processor: Any) -> Path:
    """A new folder: the config, the settings of the image processor where some are given, and weights in fp16 that take no room."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)
    return folder
