"""LLaVA-1.5 in its authors' layout, and Shikra: transformers' Llama and CLIP, put together from files as they are published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from gap_export.families.reference import ImageFeatures
from gap_export.families.reference.clip import chosen_features, clip_features
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids
from gap_export.prune.reference import Choice

State = dict[str, Tensor]


def stored_state(folder: Path) -> State:
    """Every tensor in a folder's weight files."""
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    for file in sorted(folder.glob("*.bin")):
        state.update(torch.load(file, weights_only=True))
    return state


class ClipLlamaReference:
    """CLIP and Llama of the authors' own layout, as a `ReferenceModel`.

    Args:
        state: merged, `model.*` and `lm_head.*`.
        config: of the Llama.
        tower: CLIP, with eager attention.
        projector: loaded.
        feature_layer: counting hidden states.
        image_token_id: of the placeholder.
        dtype: of weights and activations.
    """

    def __init__(
        self,
        state: State,
        config: LlamaConfig,
        tower: Any,
        projector: nn.Module,
        *,
        feature_layer: int | list[int],
        image_token_id: int,
        dtype: torch.dtype,
    ) -> None:
        config._attn_implementation = "eager"
        model: Any = LlamaForCausalLM(config).to(dtype).eval()
        own = {key: value for key, value in state.items() if key in model.state_dict()}
        model.load_state_dict({key: value.to(dtype) for key, value in own.items()})
        side = tower.config.image_size // tower.config.patch_size
        self.dtype, self.image_token_id, self.grid = dtype, image_token_id, (side, side)
        self.embedding, self.language_model, self.lm_head = (
            model.get_input_embeddings(),
            model.model,
            model.lm_head,
        )
        self._tower, self._projector = tower.to(dtype).eval(), projector.to(dtype).eval()
        self._feature_layer = feature_layer

    def extract_features(self, pixels: PixelInputs) -> list[ImageFeatures]:
        """What the tower gives of every image of a call."""
        values_BCHW = torch.from_numpy(pixels["pixel_values"]).to(self.dtype)
        return clip_features(
            self._tower, values_BCHW, self._feature_layer, grid=self.grid, projector=self._projector
        )

    def tokens(self, image: ImageFeatures, choice: Choice) -> tuple[Tensor, Ids]:
        """Embeddings [K, H] that enter the decoder, and their places [K] int64 in the unpruned prompt."""
        chosen_KE = chosen_features(image, choice)
        return self._projector(chosen_KE), choice.indices_K


class LlavaOriginalReference(ClipLlamaReference):
    """LLaVA-1.5; a tower that was trained along lies in the checkpoint, otherwise it is OpenAI's."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype, companions: Mapping[str, Path]) -> None:
        config, state = _config(checkpoint), stored_state(checkpoint)
        width = config.hidden_size
        tower: Any = CLIPVisionModel.from_pretrained(companions["vision_tower"], attn_implementation="eager")
        inside = "model.vision_tower.vision_tower.vision_model."
        if any(key.startswith(inside) for key in state):
            own = {key.removeprefix(inside): value for key, value in state.items() if key.startswith(inside)}
            tower.load_state_dict(own, strict=False)
        projector = nn.Sequential(
            nn.Linear(tower.config.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
        projector.load_state_dict(_under(state, "model.mm_projector."))
        super().__init__(
            state,
            config,
            tower,
            projector,
            feature_layer=_raw(checkpoint).get("mm_vision_select_layer", -2),
            # The first id after those of the tokenizer: see `families/llava_original.py`.
            image_token_id=len(json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]),
            dtype=dtype,
        )


class ShikraReference(ClipLlamaReference):
    """Shikra, its delta added to LLaMA's weights where it is one."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype, companions: Mapping[str, Path]) -> None:
        config, state = _config(checkpoint), stored_state(checkpoint)
        tower: Any = CLIPVisionModel.from_pretrained(companions["vision_tower"], attn_implementation="eager")
        if "base" in companions:
            for key, base in stored_state(companions["base"]).items():
                if not key.endswith("inv_freq"):
                    merged = state[key].float()
                    merged[: len(base)] += base.float()
                    state[key] = merged
        projector = nn.Linear(tower.config.hidden_size, config.hidden_size)
        projector.load_state_dict(_under(state, "model.mm_projector."))
        added = json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"]
        super().__init__(
            state,
            config,
            tower,
            projector,
            feature_layer=_raw(checkpoint).get("mm_vision_select_layer", -2),
            image_token_id=next(token["id"] for token in added if token["content"] == "<im_patch>"),
            dtype=dtype,
        )


def _raw(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return content


def _config(checkpoint: Path) -> LlamaConfig:
    return LlamaConfig.from_dict({**_raw(checkpoint), "model_type": "llama"})


def _under(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
