"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images at their own shape, M-RoPE, one layout of checkpoint and prompt.

Facts: squares of patches become one visual token each. Position ids have three rows (time, height, width); text after an image
continues from its longer side, and so do answers, whatever was pruned. No tower has a class token: attention that patches
receive from each other scores them. What differs:

    model        patch   tower                                          boxes
    Qwen2-VL     14      rotary positions                               `(x1,y1),(x2,y2)` in 0..1000 of the image
    Qwen2.5-VL   14      most layers attend within windows of 112       JSON, pixels of the image as preprocessing scaled it
                         pixels, four of 32 to all
    Qwen3-VL     16      learned positions too; DeepStack               JSON, 0..1000 of the image

Sources: arXiv 2409.12191, section 2.2; arXiv 2502.13923, section 2.1.1; the authors' notebooks on spatial understanding and grounding.
The towers are in `modeling/qwen_vl.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any, ClassVar

from torch import nn
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from typing_extensions import override

from gap_export.bundle.manifest import ModelSpec, VisionFeature
from gap_export.bundle.vision_inputs import native_inputs
from gap_export.checkpoint.weight_map import Prefixes
from gap_export.errors import RecipeError
from gap_export.families import frames
from gap_export.families.base import Family
from gap_export.inputs.layouts import NativeResolutionLayout
from gap_export.modeling import hf_config, sizes
from gap_export.modeling.components import ModelParts
from gap_export.modeling.decoder import DecoderHooks
from gap_export.modeling.qwen_vl import Qwen2VLVision, Qwen3VLVision, Qwen25VLVision, add_deepstack
from gap_export.plan import Plan
from gap_export.recipe.recipe import Recipe

_USER = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


class QwenVL(Family):
    """What the generations have in common."""

    placeholder = "<|image_pad|>"
    prefixes: ClassVar[Prefixes] = {
        "visual.": ("model.visual.", "visual."),
        "language_model.": ("model.language_model.", "model."),
        "lm_head.": ("lm_head.",),
    }

    @override
    def read_config(self) -> Any:
        config, check = hf_config.read_config(self.checkpoint), self.check
        text = config.text_config
        layer_types = {*(getattr(text, "layer_types", None) or ["full_attention"])}
        check("text_config.use_sliding_window", layer_types == {"full_attention"}, "false")
        check("vision_config.in_channels", config.vision_config.in_channels == 3, "3")
        sizes.check_native_tower(config.vision_config, text, check)
        return config

    @override
    def spec(self, recipe: Recipe) -> ModelSpec:
        return self.spec_of_varying_images(
            self.layout(recipe).token_range(),
            missing_features=self.missing_features,
            position_rows=3,
            deepstack_levels=self.deepstack_levels,
        )

    @override
    def layout(self, recipe: Recipe) -> NativeResolutionLayout:
        self.check_no_fit(recipe)
        native = self._native
        if recipe.max_pixels is None:
            return native
        if recipe.max_pixels < native.min_pixels:
            raise RecipeError(
                f"is less than the {native.min_pixels} pixels that small images are scaled up to",
                subject=f"max_pixels {recipe.max_pixels}",
                hint="raise it, or leave it out",
            )
        return native.model_copy(update={"max_pixels": recipe.max_pixels})

    @override
    def model_parts(self, spec: ModelSpec, plan: Plan) -> ModelParts:
        assert spec.token_range is not None
        model = self.fake_model(self.model_class, plan)
        return ModelParts(
            vision=self.vision(model, plan),
            vision_inputs=native_inputs(self._native, spec.token_range),
            language_model=model.model.language_model,
            lm_head=model.lm_head,
            hooks=self.hooks,
        )

    @property
    @abstractmethod
    def model_class(self) -> Any:
        """Class of transformers."""

    @abstractmethod
    def vision(self, model: Any, plan: Plan) -> nn.Module:
        """The module of the vision graph, from the whole model."""

    @property
    def hooks(self) -> DecoderHooks:
        """What the decoder does otherwise than others."""
        return DecoderHooks()

    @property
    def window(self) -> int | None:
        """Tokens along the side of a window; None where there are none."""
        return None

    @property
    def missing_features(self) -> tuple[VisionFeature, ...]:
        """What pruners cannot read from the tower."""
        return self.row.missing_features

    @property
    def deepstack_levels(self) -> int:
        """Features added between the decoder's first layers: see `ModelSpec.deepstack_levels`."""
        return 0

    @cached_property
    def _native(self) -> NativeResolutionLayout:
        """As the checkpoint's own processor has it."""
        vision, check = self.config.vision_config, self.check
        settings = hf_config.image_processor(self.checkpoint)
        for field, own in (
            ("patch_size", vision.patch_size),
            ("merge_size", vision.spatial_merge_size),
            ("temporal_patch_size", vision.temporal_patch_size),
        ):
            same = settings.get(field, own) == own
            check(f"{field}{hf_config.OF_PROCESSOR}", same, f"{own}, as of the vision tower")
        check(
            f"resample{hf_config.OF_PROCESSOR}",
            settings.get("resample", hf_config.BICUBIC) == hf_config.BICUBIC,
            "3, bicubic",
        )
        size = settings.get("size") or {}
        check(
            f"size{hf_config.OF_PROCESSOR}",
            isinstance(size, dict),
            "an object with shortest_edge and longest_edge",
        )
        least: Any = settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
        most: Any = settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
        bounded = isinstance(least, int) and isinstance(most, int) and 0 < least <= most
        check(
            f"size{hf_config.OF_PROCESSOR}",
            bounded,
            "a smallest and a largest number of pixels, also as min_pixels and max_pixels",
        )
        return NativeResolutionLayout(
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            frames=vision.temporal_patch_size,
            window=self.window,
            min_pixels=least,
            max_pixels=most,
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
        )


class Qwen2VL(QwenVL):
    """Qwen2-VL."""

    # Frame as the chat template has it, one `<|image_pad|>` standing for all. The question's words are ours: none are published.
    grounding_question = "Give the bounding box of <|object_ref_start|>{expression}<|object_ref_end|>."
    frame = frames.QWEN2_VL
    grounding_prompt = f"{_SYSTEM}{_USER}{grounding_question}{_ASSISTANT}"
    model_class = Qwen2VLForConditionalGeneration

    @override
    def vision(self, model: Any, plan: Plan) -> nn.Module:
        return Qwen2VLVision(model, plan)


class Qwen25VL(QwenVL):
    """Qwen2.5-VL."""

    # As the chat template and the notebook have it, one `<|image_pad|>` standing for all.
    grounding_question = "Locate {expression}, output its bbox coordinates using JSON format."
    frame = frames.QWEN2_VL
    grounding_prompt = f"{_SYSTEM}{_USER}{grounding_question}{_ASSISTANT}"
    model_class = Qwen2_5_VLForConditionalGeneration

    @override
    def read_config(self) -> Any:
        config = super().read_config()
        self.check("vision_config.window_size", _window(config.vision_config) >= 1, "at least one token")
        return config

    @property
    @override
    def window(self) -> int:
        return _window(self.config.vision_config)

    @property
    @override
    def missing_features(self) -> tuple[VisionFeature, ...]:
        # Within a window attention compares the few patches that are in it.
        shown: tuple[VisionFeature, ...] = (
            () if self.config.vision_config.fullatt_block_indexes else ("attention",)
        )
        return (*shown, *super().missing_features)

    @override
    def vision(self, model: Any, plan: Plan) -> nn.Module:
        return Qwen25VLVision(model, plan)


class Qwen3VL(QwenVL):
    """Qwen3-VL."""

    # As the chat template and the notebook have it, one `<|image_pad|>` standing for all.
    grounding_question = "Locate {expression}, report its bbox coordinates in JSON format."
    frame = frames.QWEN3_VL
    grounding_prompt = f"{_USER}{grounding_question}{_ASSISTANT}"
    model_class = Qwen3VLForConditionalGeneration

    @override
    def read_config(self) -> Any:
        config = super().read_config()
        indexes, depth = config.vision_config.deepstack_visual_indexes, config.vision_config.depth
        are_layers = sorted({*indexes}) == [*indexes] and all(0 <= index < depth for index in indexes)
        self.check(
            "vision_config.deepstack_visual_indexes",
            are_layers and len(indexes) <= config.text_config.num_hidden_layers,
            "layers of the tower, ascending, at most as many as the decoder has",
        )
        return config

    @property
    @override
    def hooks(self) -> DecoderHooks:
        return DecoderHooks(between_layers=add_deepstack)

    @property
    @override
    def deepstack_levels(self) -> int:
        return len(self.config.vision_config.deepstack_visual_indexes)

    @override
    def vision(self, model: Any, plan: Plan) -> nn.Module:
        return Qwen3VLVision(model, plan)


def _window(vision_config: Any) -> int:
    """Tokens along the side of a window."""
    return int(vision_config.window_size // vision_config.spatial_merge_size // vision_config.patch_size)
