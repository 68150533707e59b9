"""What the generations of Qwen-VL have in common: images at their own shape, M-RoPE, one layout of checkpoint and prompt.

Facts: squares of patches become one visual token each. Position ids have three rows (time, height, width); text after an image
goes on from its longer side, and so do answers, whatever was pruned. No tower has a class token. A family is a `QwenVL` with a
vision module of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from gap_export.bundle.manifest import BoxFormat, ModelSpec, VisionFeature
from gap_export.bundle.spec import Component
from gap_export.checkpoint import Checkpoint
from gap_export.errors import RecipeError
from gap_export.families.llava_next import check_fit
from gap_export.inputs.layouts import NativeResolutionLayout
from gap_export.inputs.native_resolution import native_range
from gap_export.inputs.prompt import PromptTemplate, TextTower
from gap_export.modeling import assembly, hf_config, selection
from gap_export.modeling.attention import IMPLEMENTATION
from gap_export.modeling.fake import fake_mode, hollow
from gap_export.modeling.native import native_inputs
from gap_export.plan import Plan
from gap_export.recipe.recipe import Recipe

PREFIXES = {
    "visual.": ("model.visual.", "visual."),
    "language_model.": ("model.language_model.", "model."),
    "lm_head.": ("lm_head.",),
}
"""Where published checkpoints keep what modules call by the name on the left: transformers since and before 4.52."""

TOWER_LACKS: tuple[VisionFeature, ...] = ("class_token", "projected_class_token", "following_layer", "grid")


@dataclass(frozen=True)
class QwenVL:
    """One generation. Its methods are those of the family contract.

    Attributes:
        name: e.g. `Qwen2.5-VL`.
        model: class of transformers.
        vision: module of the vision graph, from the hollow model and the plan.
        grounding: prompt, as the chat template of the published checkpoints frames it.
        codec: of boxes.
        window: tokens along the side of a window, from the configuration; None where there are none.
        deepstack_levels: see `ModelSpec.deepstack_levels`, from the configuration.
        supported: checks of the configuration that only this generation needs: (field, what it must be, whether it is).
    """

    name: str
    model: Any
    vision: Callable[[Any, Plan], nn.Module]
    grounding: str
    codec: str
    window: Callable[[Any], int | None] = lambda config: None
    deepstack_levels: Callable[[Any], int] = lambda config: 0
    supported: Callable[[Any], tuple[tuple[str, str, bool], ...]] = lambda config: ()

    def facts(self, checkpoint: Checkpoint, recipe: Recipe) -> ModelSpec:
        """See `Family.facts`."""
        config = self._config(checkpoint)
        tokens, most = native_range(self.preprocessing(checkpoint, recipe))
        return ModelSpec(
            **hf_config.decoder_sizes(config.text_config),
            visual_tokens=most,
            grid=None,
            token_range=tokens,
            position_rows=3,
            deepstack_levels=self.deepstack_levels(config),
            missing_features=TOWER_LACKS,
        )

    def text_tower(self, checkpoint: Checkpoint, part: Checkpoint) -> TextTower:
        """See `Family.text_tower`.

        Raises:
            CheckpointError: always: CLIP's text tower shares no space with this model's vision tower.
        """
        raise hf_config.no_text_tower(part, f"vision tower of {self.name}")

    def preprocessing(self, checkpoint: Checkpoint, recipe: Recipe) -> NativeResolutionLayout:
        """See `Family.preprocessing`.

        Raises:
            CheckpointError: settings of another processor.
            RecipeError: `fit`, or fewer pixels than the smallest images have.
        """
        check_fit(recipe, self.name)
        native = self._native(checkpoint)
        if recipe.max_pixels is None:
            return native
        if recipe.max_pixels < native.min_pixels:
            raise RecipeError(
                f"is less than the {native.min_pixels} pixels that small images are scaled up to",
                subject=f"max_pixels {recipe.max_pixels}",
                hint="raise it, or leave it out",
            )
        return native.model_copy(update={"max_pixels": recipe.max_pixels})

    def prompt(self, checkpoint: Checkpoint, recipe: Recipe) -> PromptTemplate:
        """See `Family.prompt`."""
        config = self._config(checkpoint)
        return PromptTemplate(
            grounding=recipe.prompt or self.grounding,
            image_token_id=config.image_token_id,
            add_special_tokens=True,
            eos_token_ids=hf_config.end_tokens(checkpoint, config.text_config),
        )

    def box(self, recipe: Recipe) -> BoxFormat:
        """See `Family.box`."""
        check_fit(recipe, self.name)
        return BoxFormat(codec=self.codec, frame="image")

    def components(self, checkpoint: Checkpoint, sizes: ModelSpec, plan: Plan) -> list[Component]:
        """See `Family.components`."""
        config = self._config(checkpoint)
        torch_dtype = assembly.torch_dtype(plan)

        def build() -> Any:
            attention = {"": IMPLEMENTATION, "vision_config": selection.tower_attention(plan)}
            options: dict[str, Any] = {"dtype": torch_dtype, "attn_implementation": attention}
            return self.model._from_config(config, **options)

        model = hollow(build, fake_mode())
        tied = hf_config.is_tied(config)
        hf_config.check_unknown_weights(
            checkpoint, model, tied=tied, ignored=hf_config.NOTHING, prefixes=PREFIXES
        )
        assert sizes.token_range is not None
        pieces = assembly.Pieces(
            vision=self.vision(model, plan),
            vision_inputs=native_inputs(self._native(checkpoint), sizes.token_range),
            language_model=model.model.language_model,
            lm_head=model.lm_head,
            image_token_id=config.image_token_id,
            weight_key=lambda name: hf_config.weight_key(checkpoint, name, tied=tied, prefixes=PREFIXES),
        )
        return assembly.components(checkpoint.folder, sizes, plan, pieces)

    def _native(self, checkpoint: Checkpoint) -> NativeResolutionLayout:
        """As the checkpoint's own processor has it."""
        config = self._config(checkpoint)
        vision, require = config.vision_config, hf_config.Requirements(checkpoint, self.name)
        settings = hf_config.image_processor(checkpoint)
        for field, own in (
            ("patch_size", vision.patch_size),
            ("merge_size", vision.spatial_merge_size),
            ("temporal_patch_size", vision.temporal_patch_size),
        ):
            same = settings.get(field, own) == own
            require(f"{field} of the image processor", same, f"{own}, as of the vision tower")
        require(
            "resample of the image processor",
            settings.get("resample", hf_config.BICUBIC) == hf_config.BICUBIC,
            "3, bicubic",
        )
        size = settings.get("size") or {}
        fewest: Any = settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
        most: Any = settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
        bounded = isinstance(fewest, int) and isinstance(most, int) and 0 < fewest <= most
        require("size of the image processor", bounded, "a smallest and a largest number of pixels")
        return NativeResolutionLayout(
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            frames=vision.temporal_patch_size,
            window=self.window(config),
            min_pixels=fewest,
            max_pixels=most,
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
        )

    def _config(self, checkpoint: Checkpoint) -> Any:
        config, require = hf_config.read_config(checkpoint), hf_config.Requirements(checkpoint, self.name)
        text, rope = config.text_config, config.text_config.rope_parameters
        layer_types = {*(getattr(text, "layer_types", None) or ["full_attention"])}
        require("text_config.use_sliding_window", layer_types == {"full_attention"}, "false")
        require("text_config.rope_scaling.type", rope["rope_type"] == "default", "mrope, or default")
        require("vision_config.in_channels", config.vision_config.in_channels == 3, "3")
        for field, wanted, holds in self.supported(config):
            require(field, holds, wanted)
        return config
