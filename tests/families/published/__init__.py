"""Published checkpoints at full size: their keys and shapes, configs and settings, and what there is to be found in them.

The lists are written out from the configurations, not from the code that reads them. Files are headers over holes: nothing of their
size is ever on the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gap_export.checkpoint import Checkpoint
from tests.families.published.native import qwen2_vl, qwen3_vl, qwen25_vl
from tests.families.published.square import llava, llava_original, minigpt_v2, shikra
from tests.families.published.tiles import internvl, llava_next, llava_onevision


@dataclass(frozen=True)
class Published:
    """A published checkpoint and what is known of it.

    Attributes:
        make: writes it into a folder that is not there yet, its companions beside it.
        tensors: how many, with those of its companions.
        decoder: how many of them the decoder is read from.
        visual_tokens: of the largest image.
        grid: rows and columns of visual tokens; None where they depend on the image.
        position_rows: position ids of a token.
        deepstack_levels: layers of the decoder that the tower adds to.
        unused: regular expression of the keys that are known, and not needed.
    """

    make: Callable[[Path], Checkpoint]
    tensors: int
    decoder: int
    visual_tokens: int
    grid: tuple[int, int] | None = None
    position_rows: int = 1
    deepstack_levels: int = 0
    unused: str = ""


REST_OF_CLIP = r"vision_tower/(text_.*|visual_projection\.weight|logit_scale|.*\.position_ids)"

PUBLISHED = {
    "llava-1.5-7b-hf, old names": Published(
        lambda folder: llava(folder, "llama-7b", new=False), 686, 291, 576, (24, 24)
    ),
    "llava-1.5-13b-hf, new names": Published(
        lambda folder: llava(folder, "llama-13b", new=True), 758, 363, 576, (24, 24)
    ),
    "liuhaotian/llava-v1.5-7b": Published(
        lambda folder: llava_original(folder, "llama-7b", tower_inside=False),
        691, 291, 576, (24, 24), unused=REST_OF_CLIP,
    ),
    "liuhaotian/llava-v1.5-13b, tower inside": Published(
        lambda folder: llava_original(folder, "llama-13b", tower_inside=True),
        1154, 363, 576, (24, 24), unused="vision_tower/.*",
    ),
    "shikra-7b-delta-v1": Published(
        shikra, 1012, 291, 256, (16, 16), unused=rf"{REST_OF_CLIP}|base/.*|.*\.inv_freq"
    ),
    "minigpt-v2": Published(
        minigpt_v2, 947, 291, 256, (32, 8), unused=r"vision_tower/(blocks\.39|norm)\..*|.*\.lora_[AB]\.weight"
    ),
    "llava-v1.6-vicuna-7b-hf, old names": Published(
        lambda folder: llava_next(folder, "llama-7b", new=False), 687, 291, 2928
    ),
    "llava-v1.6-mistral-7b-hf, new names": Published(
        lambda folder: llava_next(folder, "mistral-7b", new=True), 687, 291, 2928
    ),
    "llava-onevision-qwen2-7b-ov-hf, old names": Published(
        lambda folder: llava_onevision(folder, "qwen2-7b", new=False), 765, 339, 8829
    ),
    "llava-onevision-qwen2-0.5b-ov-hf, new names, tied": Published(
        lambda folder: llava_onevision(folder, "qwen2-0.5b", new=True), 716, 290, 8829
    ),
    "InternVL3-1B-hf, old names": Published(lambda folder: internvl(folder, new=False), 733, 291, 3328),
    "InternVL3-1B-hf, new names": Published(lambda folder: internvl(folder, new=True), 733, 291, 3328),
    "Qwen2-VL-7B-Instruct, old names": Published(
        lambda folder: qwen2_vl(folder, "qwen2-7b", new=False), 730, 339, 16384, position_rows=3
    ),
    "Qwen2-VL-2B-Instruct, new names, tied": Published(
        lambda folder: qwen2_vl(folder, "qwen2-1.5b", new=True), 729, 338, 16384, position_rows=3
    ),
    "Qwen2.5-VL-7B-Instruct, old names": Published(
        lambda folder: qwen25_vl(folder, "qwen2-7b", new=False), 729, 339, 16384, position_rows=3
    ),
    "Qwen2.5-VL-3B-Instruct, old names, tied": Published(
        lambda folder: qwen25_vl(folder, "qwen2.5-3b", new=False), 824, 434, 16384, position_rows=3
    ),
    "Qwen3-VL-8B-Instruct": Published(
        lambda folder: qwen3_vl(folder, "qwen3-8b"), 750, 399, 16384, position_rows=3, deepstack_levels=3
    ),
    "Qwen3-VL-4B-Instruct, tied": Published(
        lambda folder: qwen3_vl(folder, "qwen3-4b"), 713, 398, 16384, position_rows=3, deepstack_levels=3
    ),
}  # fmt: skip
