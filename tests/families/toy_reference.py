"""The toy family's model as `validate` runs it: transformers' Llama, and the tower from its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear
from transformers import LlamaConfig, LlamaForCausalLM

from gap_export.families.reference import ImageFeatures
from gap_export.families.reference.clip import chosen_features
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids
from gap_export.prune import VisionFeatures
from gap_export.prune.reference import Choice


class ToyReference:
    """See `ReferenceModel`."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype, parts: Mapping[str, Path]) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        state = {key: value.to(dtype) for key, value in load_file(checkpoint / "model.safetensors").items()}
        text = LlamaConfig.from_dict(config["text_config"])
        text._attn_implementation = "eager"
        model: Any = LlamaForCausalLM(text).to(dtype).eval()
        own = {
            key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.")
        }
        model.load_state_dict(own)
        side = config["vision"]["size"] // config["vision"]["patch"]
        self.dtype, self.image_token_id, self.grid = dtype, config["image_token_id"], (side, side)
        self.embedding, self.language_model, self.lm_head = (
            model.get_input_embeddings(),
            model.model,
            model.lm_head,
        )
        self._state, self._patch = state, config["vision"]["patch"]

    def tower(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N, E]."""
        w = self._state
        patches = conv2d(pixels_BCHW, w["tower.patch.weight"], w["tower.patch.bias"], stride=self._patch)
        x = patches.flatten(2).transpose(1, 2) + w["tower.positions"]
        x = x + gelu(linear(x, w["tower.hidden.weight"], w["tower.hidden.bias"]))
        return layer_norm(x, x.shape[-1:], w["tower.norm.weight"], w["tower.norm.bias"])

    def project(self, tokens_KE: Tensor) -> Tensor:
        """[K, H]."""
        return linear(tokens_KE, self._state["projector.weight"], self._state["projector.bias"])

    def extract_features(self, pixels: PixelInputs) -> list[ImageFeatures]:
        """See `ReferenceModel.extract_features`."""
        batch = self.tower(torch.from_numpy(pixels["pixel_values"]).to(self.dtype))
        return [
            ImageFeatures(VisionFeatures(patches, self.grid, projected=self.project(patches)))
            for patches in batch
        ]

    def tokens(self, image: ImageFeatures, choice: Choice) -> tuple[Tensor, Ids]:
        """See `ReferenceModel.tokens`."""
        return self.project(chosen_features(image, choice)), choice.indices_K
