"""MiniGPT-v2: transformers' Llama with the updates added, and EVA-CLIP's tower run operation by operation from its weights.

There is no class for the tower in transformers. Attention maps are whole ones, as in BLIP-2's own code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, linear
from transformers import LlamaForCausalLM

from gap_export.families.reference import ImageFeatures
from gap_export.families.reference.clip import chosen_features
from gap_export.inputs.batch import PixelInputs
from gap_export.inputs.tokenizer import load_tokenizer
from gap_export.positions import Ids
from gap_export.prune import VisionFeatures
from gap_export.prune.reference import Choice

HEAD_WIDTH, GROUP, EPS = 88, 4, 1e-6


class MiniGptReference:
    """MiniGPT-v2 in plain torch, as a `ReferenceModel`."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype, companions: Mapping[str, Path]) -> None:
        own, self._tower = _archive(checkpoint), _archive(companions["vision_tower"])
        model: Any = LlamaForCausalLM.from_pretrained(
            companions["base"], dtype=dtype, attn_implementation="eager", local_files_only=True
        ).eval()
        for key, a_RI in own.items():
            found = re.search(r"model\.layers\.(\d+)\.self_attn\.([qv]_proj)\.lora_A", key)
            if found:
                attention = model.model.layers[int(found[1])].self_attn
                b_OR = own[key.replace("lora_A", "lora_B")].float()
                weight = getattr(attention, found[2]).weight
                weight.data = (weight.float() + 16 / 64 * (b_OR @ a_RI.float())).to(dtype)
        self.dtype = dtype
        # The first id after those of the tokenizer: see `families/minigpt_v2.py`.
        self.image_token_id = load_tokenizer(companions["base"] / "tokenizer.json").get_vocab_size()
        self.embedding = model.get_input_embeddings()
        self.language_model, self.lm_head = model.model, model.lm_head
        self._own = {key: value.to(dtype) for key, value in own.items()}
        self._tower = {key: value.to(dtype) for key, value in self._tower.items()}
        self.grid = self._grid()

    def extract_features(self, pixels: PixelInputs) -> list[ImageFeatures]:
        """What the tower gives of every image of a call."""
        return [self._features(torch.from_numpy(image).to(self.dtype)) for image in pixels["pixel_values"]]

    def tokens(self, image: ImageFeatures, choice: Choice) -> tuple[Tensor, Ids]:
        """Embeddings [K, H] that enter the decoder, and their places [K] int64 in the unpruned prompt."""
        chosen_KE = chosen_features(image, choice)
        return chosen_KE if choice.patches_KE is not None else self._projected(chosen_KE), choice.indices_K

    def _features(self, pixels_CHW: Tensor) -> ImageFeatures:
        w = self._tower
        weight = w["patch_embed.proj.weight"]
        patches = conv2d(pixels_CHW[None], weight, w["patch_embed.proj.bias"], stride=weight.shape[-1])
        side = patches.shape[-1]
        x_TE = torch.cat([w["cls_token"][0], patches[0].flatten(1).T]) + self._positions(side)
        attention_T, query_TE, keys_TE = torch.empty(0), torch.empty(0), torch.empty(0)
        for number in range(self._blocks()):
            x_TE, attention_T, query_TE, keys_TE = self._block(number, x_TE)
        scale, shift = self._own.get("ln_vision.weight"), self._own.get("ln_vision.bias")
        normed = layer_norm(
            x_TE.float(),
            x_TE.shape[-1:],
            None if scale is None else scale.float(),
            None if shift is None else shift.float(),
        ).to(self.dtype)
        tokens_NE = normed[1:].reshape(-1, GROUP * normed.shape[-1])
        keys_ND = keys_TE[1:].float().unflatten(-1, (-1, HEAD_WIDTH)).mean(dim=1)
        whole_T = (keys_TE.double() @ query_TE[0].double() / keys_TE.shape[-1] ** 0.5).softmax(dim=0)
        projected_NH = self._projected(tokens_NE)
        features = VisionFeatures(
            tokens_NE,
            grid=self.grid,
            attention=attention_T[1:].reshape(-1, GROUP).mean(dim=1),
            mean_keys=keys_ND.reshape(-1, GROUP, HEAD_WIDTH).mean(dim=1),
            full_width_attention=whole_T[1:].reshape(-1, GROUP).sum(dim=1),
            full_width_keys=keys_TE[1:].float().reshape(-1, GROUP, keys_TE.shape[-1]).mean(dim=1),
            projected=projected_NH,
            embeds=projected_NH,
        )
        return ImageFeatures(features)

    def _block(self, number: int, x_TE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w = {
            key.removeprefix(f"blocks.{number}."): value
            for key, value in self._tower.items()
            if key.startswith(f"blocks.{number}.")
        }
        normed = layer_norm(x_TE, x_TE.shape[-1:], w["norm1.weight"], w["norm1.bias"], EPS)
        bias = torch.cat([w["attn.q_bias"], torch.zeros_like(w["attn.v_bias"]), w["attn.v_bias"]])
        q, k, v = linear(normed, w["attn.qkv.weight"], bias).chunk(3, dim=-1)
        heads = [part.unflatten(-1, (-1, HEAD_WIDTH)).transpose(0, 1) for part in (q, k, v)]
        map_ATT = (heads[0] @ heads[1].transpose(1, 2) * HEAD_WIDTH**-0.5).float().softmax(dim=-1)
        mixed = (map_ATT.to(v.dtype) @ heads[2]).transpose(0, 1).flatten(1)
        x_TE = x_TE + linear(mixed, w["attn.proj.weight"], w["attn.proj.bias"])
        normed = layer_norm(x_TE, x_TE.shape[-1:], w["norm2.weight"], w["norm2.bias"], EPS)
        hidden = gelu(linear(normed, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
        return x_TE + linear(hidden, w["mlp.fc2.weight"], w["mlp.fc2.bias"]), map_ATT.mean(dim=0)[0], q, k

    def _positions(self, side: int) -> Tensor:
        table_1TE = self._tower["pos_embed"]
        if table_1TE.shape[1] == 1 + side * side:
            return table_1TE[0]
        own = round((table_1TE.shape[1] - 1) ** 0.5)
        grid = table_1TE[:, 1:].float().reshape(1, own, own, -1).permute(0, 3, 1, 2)
        grid = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        return torch.cat([table_1TE[0, :1], grid[0].flatten(1).T.to(self.dtype)])

    def _projected(self, tokens_NE: Tensor) -> Tensor:
        return linear(tokens_NE, self._own["llama_proj.weight"], self._own["llama_proj.bias"])

    def _blocks(self) -> int:
        numbers = {key.split(".")[1] for key in self._tower if key.startswith("blocks.")}
        return min(len(numbers), 39)

    def _grid(self) -> tuple[int, int]:
        side = 448 // self._tower["patch_embed.proj.weight"].shape[-1]
        return side, side // GROUP


def _archive(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.pth`, or of the only one in a folder."""
    file = path if path.is_file() else next(path.glob("*.pth"))
    content = torch.load(file, weights_only=True)
    return dict(content.get("model", content))
