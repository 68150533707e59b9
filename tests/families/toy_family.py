"""A family from outside the package: a prefix decoder, whose image tokens see each other (as PaliGemma's do, arXiv 2407.07726).

A tower without a class token, one linear projector, a Llama. Its checkpoints hold `tower.*`, `projector.*` and `decoder.*`, and what
no published family has: a config.json that transformers does not know, and boxes in tenths of a percent, `<x1 y1 x2 y2>`.

Places: this file (class, row, box codec), `toy_reference.py`, `toy.yaml`. There is nothing published, so no config for random weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig
from typing_extensions import override

from gap_export import prune
from gap_export.boxes.codecs import Box, BoxCodec
from gap_export.bundle.manifest import BoxFormat, ModelSpec
from gap_export.checkpoint.weight_map import Prefixes
from gap_export.families import FamilyRow
from gap_export.families.base import Family
from gap_export.inputs.square import SquareLayout
from gap_export.modeling import hf_config, selection
from gap_export.modeling.attention import IMPLEMENTATION, CallSlots, causal
from gap_export.modeling.components import ModelParts, square_images, torch_dtype
from gap_export.modeling.decoder import DecoderHooks
from gap_export.modeling.fake import fake, fake_mode
from gap_export.modeling.text_embedding import embedding_for, with_text
from gap_export.plan import Plan
from gap_export.recipe.recipe import Recipe

HALVES = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ToyConfig:
    """What config.json says."""

    text_config: LlamaConfig
    image_token_id: int
    size: int
    patch: int
    width: int
    tie_word_embeddings: bool = False


class ToyTower(nn.Module):
    """Patches, learned positions, one residual layer, a norm."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        tokens = (config.size // config.patch) ** 2
        self.patch = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.positions = nn.Parameter(torch.empty(tokens, config.width))
        self.hidden = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, N, E]."""
        patches_BNE = self.patch(pixels_BCHW.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        x_BNE = patches_BNE + self.positions
        features_BNE: Tensor = self.norm(x_BNE + nn.functional.gelu(self.hidden(x_BNE)))
        return features_BNE


class ToyVision(nn.Module):
    """Tower, pruner, projector."""

    def __init__(
        self, tower: ToyTower, projector: nn.Linear, embedding: nn.Module, plan: Plan, side: int
    ) -> None:
        super().__init__()
        self.embed_tokens = embedding_for(plan, embedding)
        self.vision_tower, self.multi_modal_projector = tower, projector
        self._plan, self._side = plan, side

    def forward(
        self, pixel_values: Tensor, text_ids: Tensor | None = None, keep_count: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, 3, size, size] -> visual_embeds [B, K, H], kept_indices [B, K]."""
        patches_BNE = self.vision_tower(pixel_values)
        features = prune.VisionFeatures(
            patches_BNE, (self._side, self._side), projected=self.multi_modal_projector(patches_BNE)
        )
        features = with_text(features, self.embed_tokens, text_ids)
        embeds_BKH, selected = selection.select_and_project(
            self._plan, features, keep_count, self.multi_modal_projector
        )
        return embeds_BKH, selected.indices_BK


def image_blocks(slots: CallSlots) -> Tensor:
    """The causal mask, and all tokens of one image see each other: bool [B, 1, S, C]."""
    assert slots.image_slots_BI2 is not None
    first_BI1, end_BI1 = slots.image_slots_BI2[..., :1], slots.image_slots_BI2[..., 1:]

    def inside(slots_B1S: Tensor) -> Tensor:
        return ((slots_B1S >= first_BI1) & (slots_B1S < end_BI1)).to(torch.int64)

    query_BIS = inside((slots.write_index_B[:, None] + torch.arange(slots.queries))[:, None])
    key_BIC = inside(torch.arange(slots.capacity)[None, None])
    together_BSC = (query_BIS[..., None] * key_BIC[:, :, None]).sum(1) > 0
    return causal(slots) | together_BSC[:, None]


class Toy(Family):
    """The prefix decoder."""

    grounding_prompt = "<image> where is {expression} ?"
    prefixes: ClassVar[Prefixes] = {
        "vision_tower.": ("tower.",),
        "multi_modal_projector.": ("projector.",),
        "language_model.": ("decoder.model.",),
        "lm_head.": ("decoder.lm_head.",),
    }
    hooks = DecoderHooks(mask=image_blocks)

    @override
    def read_config(self) -> ToyConfig:
        stored = self.checkpoint.config
        text = LlamaConfig.from_dict(stored["text_config"])
        return ToyConfig(text, stored["image_token_id"], **stored["vision"])

    @override
    def spec(self, recipe: Recipe) -> ModelSpec:
        side = self.config.size // self.config.patch
        return ModelSpec(
            **hf_config.decoder_sizes(self.config.text_config),
            visual_tokens=side**2,
            grid=(side, side),
            missing_features=self.row.missing_features,
            attention_mask=self.row.attention_mask,
        )

    @override
    def layout(self, recipe: Recipe) -> SquareLayout:
        self.check_no_fit(recipe)
        return SquareLayout(
            size=self.config.size, fit="stretch", background=(0, 0, 0), mean=HALVES, std=HALVES
        )

    @override
    def model_parts(self, spec: ModelSpec, plan: Plan) -> ModelParts:
        config, mode, dtype = self.config, fake_mode(), torch_dtype(plan)
        text, side = config.text_config, config.size // config.patch
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": IMPLEMENTATION}
        tower = fake(lambda: ToyTower(config).to(dtype), mode)
        projector = fake(lambda: nn.Linear(config.width, text.hidden_size, dtype=dtype), mode)
        language_model = fake(lambda: AutoModel.from_config(text, **options), mode)
        lm_head = fake(lambda: nn.Linear(text.hidden_size, text.vocab_size, bias=False, dtype=dtype), mode)
        modules = {
            "vision_tower": tower,
            "multi_modal_projector": projector,
            "language_model": language_model,
            "lm_head": lm_head,
        }
        self.check_weights(f"{name}.{key}" for name, module in modules.items() for key in module.state_dict())
        return ModelParts(
            vision=ToyVision(tower, projector, language_model.get_input_embeddings(), plan, side),
            vision_inputs=(square_images(plan, config.size),),
            language_model=language_model,
            lm_head=lm_head,
            hooks=self.hooks,
        )


class CausalToy(Toy):
    """The same weights under the causal mask."""

    hooks = DecoderHooks()


def _write(box: Box) -> str:
    return "<" + " ".join(str(round(value)) for value in box) + ">"


CODEC = BoxCodec("toy", re.compile(r"<\d{1,4}(?: \d{1,4}){3}>"), 1000.0, _write, "first")

ROW = FamilyRow(
    name="toy",
    title="Toy",
    implementation="tests.families.toy_family:Toy",
    reference="tests.families.toy_reference:ToyReference",
    model_types=("toy",),
    box=BoxFormat(codec="toy", frame="image"),
    missing_features=("attention", "projected_class_token"),
    attention_mask="image_blocks",
    text_by="embeddings",
)
