"""Conversations with LLaVA-1.5 as its authors publish it and with Shikra, in their frames, against plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gap_export.families import frames
from tests.families import test_original_layouts as layouts
from tests.families.plain_models import ClipTower, Llama
from tests.families.plain_talks import SCRIPTS, Features, assert_talks_as_plain_torch
from tests.families.small_llama import HEADS, LAYERS
from tests.families.spoken import Speech
from tests.families.talks import at_the_slot, one_further

pytestmark = pytest.mark.slow

folder, original, shikra, options = layouts.folder, layouts.original, layouts.shikra, layouts.options
build = layouts.build
"""Fixtures."""

LONG = 200
RANGED = {"pruner": "cls_attention", "keep": "0.1:0.25:1.0"}
SPEECH = {
    "llava_original": Speech("", frames.LLAVA),
    "shikra": Speech("", frames.SHIKRA, "<im_patch>", "<im_start><im_patch><im_end>"),
}


def plain(which: str, options: dict[str, dict[str, Any]], tower: Path) -> tuple[Llama, Features]:
    """Decoder, and tower with projector."""
    weights = layouts.merged_weights(which, options)
    decoder = Llama(weights, LAYERS, HEADS, HEADS, layouts.CONFIGS[which]["rms_norm_eps"], 10000.0)
    clip = ClipTower(load_file(tower / "model.safetensors"), heads=2, patch=6)

    def linear(tokens: torch.Tensor, name: str) -> torch.Tensor:
        name = f"model.mm_projector{name}"
        return tokens @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def features(pixels: torch.Tensor) -> torch.Tensor:
        tokens = clip.run(pixels, layers=2)[0][1:]  # of three: hidden state -2
        if which == "shikra":
            return linear(tokens, "")
        return linear(torch.nn.functional.gelu(linear(tokens, ".0")), ".2")

    return decoder, features


@pytest.mark.long
@pytest.mark.parametrize("keep", [1.0, None])
@pytest.mark.parametrize("talk", SCRIPTS)
@pytest.mark.parametrize("which", SPEECH)
def test_conversations_are_the_model(
    which: str,
    talk: str,
    keep: float | None,
    build: layouts.Build,
    options: dict[str, dict[str, Any]],
    tiny_text_tower: Path,
) -> None:
    parts = plain(which, options, tiny_text_tower)
    assert_talks_as_plain_torch(build(which, **RANGED), SPEECH[which], *parts, talk, LONG, keep=keep)


@pytest.mark.long
@pytest.mark.parametrize("wrong", [at_the_slot, one_further])
def test_wrong_positions_show(
    wrong: Any, build: layouts.Build, options: dict[str, dict[str, Any]], tiny_text_tower: Path
) -> None:
    parts = plain("shikra", options, tiny_text_tower)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_talks_as_plain_torch(
            build("shikra", **RANGED), SPEECH["shikra"], *parts, "one image", 24, mislead=wrong
        )
