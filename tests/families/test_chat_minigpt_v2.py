"""Conversations with MiniGPT-v2 in its published layout and frame, against plain torch."""

from __future__ import annotations

import pytest
import torch

from gap_export.families import frames
from tests.families import test_minigpt_v2 as minigpt
from tests.families.plain_answers import Bundles
from tests.families.plain_models import EvaTower, Llama
from tests.families.plain_talks import SCRIPTS, assert_talks_as_plain_torch
from tests.families.spoken import Speech

pytestmark = pytest.mark.slow

folder, weights, places = minigpt.folder, minigpt.weights, minigpt.places
options, build = minigpt.options, minigpt.build
"""Fixtures."""

SPEECH = Speech("", frames.MINIGPT_V2, "<ImageHere>", "<Img><ImageHere></Img>")


@pytest.mark.long
@pytest.mark.parametrize("keep", [1.0, None])
@pytest.mark.parametrize("talk", SCRIPTS)
def test_conversations_are_the_model(
    talk: str, keep: float | None, build: Bundles, weights: dict[str, dict[str, torch.Tensor]]
) -> None:
    base = dict(weights["base"])
    for name, a in weights["low_rank"].items():
        if "lora_A" in name:
            own = name.removeprefix("llama_model.base_model.model.").replace("lora_A.", "")
            base[own] = base[own] + 16 / 64 * weights["low_rank"][name.replace("lora_A", "lora_B")] @ a
    decoder = Llama(
        base, minigpt.LAYERS, minigpt.HEADS, minigpt.HEADS, minigpt.CONFIG["rms_norm_eps"], 10000.0
    )
    position = minigpt.positions_by_hand(weights["eva"]["pos_embed"])
    eva = EvaTower({**weights["eva"], "pos_embed": position}, 2, minigpt.PATCH, minigpt.BLOCKS)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        hidden, _ = eva.run(pixels)
        hidden = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])[1:]
        return (
            hidden.view(len(hidden) // 4, -1) @ weights["own"]["llama_proj.weight"].T
            + weights["own"]["llama_proj.bias"]
        )

    bundle = build(pruner="divprune", keep="0.2:0.3:1.0")
    assert_talks_as_plain_torch(bundle, SPEECH, decoder, features, talk, 200, keep=keep)
