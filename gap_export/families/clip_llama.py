"""A CLIP tower, a projector, a Llama: what LLaVA-1.5, in both layouts it is published in, and Shikra are made of.

The modules of transformers are traced unchanged. A family says which sizes they have, which projector stands between them, and
where its checkpoints keep what.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, CLIPVisionConfig, PretrainedConfig
from typing_extensions import override

from gap_export.bundle.manifest import BoxFormat, ModelSpec
from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.processor import stored_processor
from gap_export.errors import RecipeError
from gap_export.families.base import Family
from gap_export.inputs.layouts import SquareLayout
from gap_export.inputs.prompt import TextTower
from gap_export.inputs.square import mean_colour
from gap_export.modeling import config_fields, hf_config
from gap_export.modeling.attention import IMPLEMENTATION
from gap_export.modeling.clip import OPENAI_MEAN, OPENAI_STD, ClipVision
from gap_export.modeling.clip_text import fits_name, published_tower, read_text_tower, text_tower_of
from gap_export.modeling.components import ModelParts, square_images, torch_dtype
from gap_export.modeling.fake import fake, fake_mode
from gap_export.modeling.layers import LayerStack
from gap_export.modeling.selection import tower_attention
from gap_export.plan import Plan
from gap_export.recipe.recipe import Recipe

Channels = tuple[float, float, float]
"""A number for red, green and blue."""


@dataclass(frozen=True)
class ClipLlamaConfig:
    """One model.

    Attributes:
        vision_config: of the tower.
        text_config: of the decoder.
        projector: constructs the projector, from the tower's width to the decoder's.
        feature_layer: how many layers of the tower are run.
        image_token_id: id of the placeholder.
        tie_word_embeddings: whether the head is the token embedding; `text_config` may say so too.
    """

    vision_config: CLIPVisionConfig
    text_config: PretrainedConfig
    projector: Callable[[], nn.Module]
    feature_layer: int
    image_token_id: int
    tie_word_embeddings: bool = False

    @property
    def side(self) -> int:
        """Patches along a side of the image."""
        return int(self.vision_config.image_size) // int(self.vision_config.patch_size)


class ClipLlama(Family):
    """A model of these three parts."""

    config: ClipLlamaConfig

    @override
    def check_fields(self) -> tuple[str, ...]:
        beside = (
            ()
            if self._tower is None
            else config_fields.check_companion_fields(
                self._tower, config_fields.CLIP_TOWER, config_fields.SQUARE_PIXELS
            )
        )
        return super().check_fields() + beside

    @property
    def _tower(self) -> Checkpoint | None:
        """The checkpoint of the vision tower, where it lies beside the model's."""
        return self.checkpoint.companions.get("vision_tower")

    def check_named_tower(self, vision: CLIPVisionConfig) -> None:
        """Refuse a tower beside the model whose sizes are those of another published one than `mm_vision_tower` names.

        Raises:
            CheckpointError: it is.
        """
        named = self.checkpoint.config.get("mm_vision_tower")
        self.check(
            "mm_vision_tower",
            fits_name(vision, named),
            f"{published_tower(vision)}, whose sizes the given tower has",
        )

    @abstractmethod
    @override
    def read_config(self) -> ClipLlamaConfig: ...

    @override
    def spec(self, recipe: Recipe) -> ModelSpec:
        config = self.config
        return ModelSpec(
            **hf_config.decoder_sizes(config.text_config),
            visual_tokens=config.side**2,
            grid=(config.side, config.side),
            published_tower=published_tower(config.vision_config),
        )

    @override
    def layout(self, recipe: Recipe) -> SquareLayout:
        mean, std = self.normalisation
        return SquareLayout(
            size=self.config.vision_config.image_size,
            fit=recipe.fit or "pad",
            background=self.background,
            mean=mean,
            std=std,
        )

    @property
    def normalisation(self) -> tuple[Channels, Channels]:
        """(mean, standard deviation) of the channels, after scaling to 0..1; those of the tower, OpenAI's where it does not say."""
        if self._tower is None or not stored_processor(self._tower)[2]:
            return OPENAI_MEAN, OPENAI_STD
        check = hf_config.ConfigCheck(self._tower, self.row.title)
        settings = hf_config.checked_processor(self._tower, check, self.config.vision_config.image_size)
        return tuple(settings["image_mean"]), tuple(settings["image_std"])

    @property
    def background(self) -> tuple[int, int, int]:
        """Colour that images are padded with, RGB 0..255: the mean one."""
        return mean_colour(self.normalisation[0])

    @override
    def box(self, recipe: Recipe) -> BoxFormat:
        if recipe.fit == "crop":
            raise RecipeError(
                "cuts off parts of the image, and no box can be found there",
                subject="fit: crop",
                hint="use fit: pad, which is what the model was trained with for grounding",
            )
        return self.row.box.model_copy(update={"frame": "image"}) if recipe.fit == "stretch" else self.row.box

    @override
    def text_tower(self, companion: Checkpoint) -> TextTower:
        return read_text_tower(companion, tower_width=self.config.vision_config.hidden_size)

    @override
    def model_parts(self, spec: ModelSpec, plan: Plan) -> ModelParts:
        config, dtype, mode = self.config, torch_dtype(plan), fake_mode()
        text: Any = config.text_config
        attention = tower_attention(plan)
        in_tower: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
        in_decoder: dict[str, Any] = {"dtype": dtype, "attn_implementation": IMPLEMENTATION}
        tower = fake(lambda: AutoModel.from_config(config.vision_config, **in_tower), mode)
        language_model = fake(lambda: AutoModel.from_config(text, **in_decoder), mode)
        projector = fake(lambda: config.projector().to(dtype), mode)
        lm_head = fake(lambda: _linear(text.hidden_size, text.vocab_size, dtype), mode)
        modules = {
            "vision_tower": tower,
            "multi_modal_projector": projector,
            "language_model": language_model,
            "lm_head": lm_head,
        }
        self.check_weights(f"{name}.{key}" for name, module in modules.items() for key in module.state_dict())
        return ModelParts(
            vision=ClipVision(
                tower,
                projector,
                plan,
                feature_layer=config.feature_layer,
                text=text_tower_of(self.checkpoint, plan, mode),
            ),
            vision_inputs=(square_images(plan, config.vision_config.image_size),),
            language_model=language_model,
            lm_head=lm_head,
            vision_layers=LayerStack("vision_tower.encoder.layers", (range(config.feature_layer - 1),)),
        )


def _linear(width: int, outputs: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(width, outputs, bias=False, dtype=dtype)
