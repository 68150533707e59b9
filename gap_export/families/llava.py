"""LLaVA-1.5: CLIP tower, two-layer projector, Llama decoder (`model_type: llava`).

Facts: the decoder gets `hidden_states[vision_feature_layer]` (usually -2) without the class token; pictures are padded to
a square with the mean colour for grounding, and boxes are `[x1, y1, x2, y2]` in 0..1 of that square. (The processor that
Hugging Face ships with these checkpoints crops the centre instead, which cuts off what is to be found.)

The modules of transformers are traced unchanged. Tower, pruner and projector are put together in `clip.py`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from gap_export.bundle import BoxFormat, ModelFacts, Precision, Preprocessing, PromptTemplate, TextTower
from gap_export.checkpoint import Checkpoint
from gap_export.errors import CheckpointError, RecipeError
from gap_export.families import staged
from gap_export.families.clip import ClipVision
from gap_export.families.clip_text import (
    TEXT_TOWER,
    ClipText,
    hollow_text_tower,
    published_tower,
    read_text_tower,
    text_weight_key,
)
from gap_export.families.decoder import Decoder
from gap_export.families.hollow import fake_mode, hollow
from gap_export.families.splice import Embed, Splice
from gap_export.graph.attention import IMPLEMENTATION
from gap_export.plan import Plan
from gap_export.positions import PositionPolicy
from gap_export.recipe import Recipe
from gap_export.runtime.preprocess import mean_colour
from gap_export.spec import Component, Dim, DType, GraphName, GraphSpec, TensorSpec

GROUNDING_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. USER: <image>\nPlease provide the bounding box coordinate of the region this "
    "sentence describes: {expression}. ASSISTANT:"
)

DTYPES: dict[Precision, tuple[torch.dtype, DType]] = {
    "fp32": (torch.float32, "float32"),
    "fp16": (torch.float16, "float16"),
    "bf16": (torch.bfloat16, "bfloat16"),
}

# Where published checkpoints keep what the module calls by the name on the left: transformers before and after 4.52.
_PREFIXES = {
    "vision_tower.": ("vision_tower.vision_model.", "model.vision_tower.vision_model.", "vision_tower.", "model.vision_tower."),
    "multi_modal_projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
    "language_model.": ("language_model.model.", "model.language_model."),
    "lm_head.": ("language_model.lm_head.", "lm_head."),
}  # fmt: skip


def facts(checkpoint: Checkpoint) -> ModelFacts:
    """See `Family.facts`."""
    config = _config(checkpoint)
    text, vision = config.text_config, config.vision_config
    side = vision.image_size // vision.patch_size
    above = vision.num_hidden_layers - _feature_layer(config)
    return ModelFacts(
        hidden_size=text.hidden_size,
        layers=text.num_hidden_layers,
        attention_heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        visual_tokens=side * side,
        grid=(side, side),
        max_positions=text.max_position_embeddings,
        tower_lacks=() if above else ("following_layer",),
        published_tower=published_tower(vision),
    )


def text_tower(checkpoint: Checkpoint, part: Checkpoint) -> TextTower:
    """See `Family.text_tower`."""
    return read_text_tower(part, tower_width=_config(checkpoint).vision_config.hidden_size)


def preprocessing(checkpoint: Checkpoint, recipe: Recipe) -> Preprocessing:
    """See `Family.preprocessing`."""
    stored = checkpoint.json("preprocessor_config.json") or checkpoint.json("processor_config.json").get(
        "image_processor", {}
    )
    mean, std = stored.get("image_mean"), stored.get("image_std")
    if mean is None or std is None:
        raise CheckpointError(
            "has no image processor settings (preprocessor_config.json)",
            subject=str(checkpoint.folder),
            hint="download the checkpoint's preprocessor_config.json",
        )
    if not (_is_rgb(mean) and _is_rgb(std) and min(std) > 0):
        raise CheckpointError(
            "image_mean and image_std must be three numbers each, and no image_std may be 0",
            subject=str(checkpoint.folder / "preprocessor_config.json"),
            hint="fetch the checkpoint's preprocessor_config.json again",
        )
    return Preprocessing(
        size=_config(checkpoint).vision_config.image_size,
        fit=recipe.fit or "pad",
        background=mean_colour(tuple(mean)),
        mean=tuple(mean),
        std=tuple(std),
    )


def prompt(checkpoint: Checkpoint, recipe: Recipe) -> PromptTemplate:
    """See `Family.prompt`."""
    config = _config(checkpoint)
    ends = checkpoint.json("generation_config.json").get("eos_token_id")
    ends = config.text_config.eos_token_id if ends is None else ends
    ends = ends if isinstance(ends, list) else [ends]
    if not ends or not all(isinstance(end, int) for end in ends):
        raise CheckpointError(
            "names no token that ends an answer (eos_token_id)",
            subject=str(checkpoint.folder),
            hint="add eos_token_id to the checkpoint's generation_config.json",
        )
    return PromptTemplate(
        grounding=recipe.prompt or GROUNDING_PROMPT,
        image_token_id=config.image_token_id,
        add_special_tokens=True,
        eos_token_ids=tuple(ends),
    )


def box(recipe: Recipe) -> BoxFormat:
    """See `Family.box`."""
    if recipe.fit == "crop":
        raise RecipeError(
            "cuts off parts of the picture, and no box can be found there",
            subject="fit: crop",
            hint="use fit: pad, which is what the model was trained with for grounding",
        )
    return BoxFormat(codec="llava", frame="image" if recipe.fit == "stretch" else "padded_square")


def components(checkpoint: Checkpoint, plan: Plan) -> list[Component]:
    """See `Family.components`."""
    config = _config(checkpoint)
    sizes = facts(checkpoint)
    torch_dtype, dtype = DTYPES[plan.precision]
    mode = fake_mode()
    model = _hollow_model(config, torch_dtype, mode)

    batch = Dim(name="batch", minimum=1, optimum=1, maximum=plan.max_batch)
    text = Dim(name="text", minimum=2, optimum=plan.max_text, maximum=plan.max_text)
    longest, usual = plan.max_text - 1 + plan.most, plan.max_text - 1 + plan.kept
    sequence = Dim(name="sequence", minimum=1, optimum=usual, maximum=longest)
    spliced = Dim(name="spliced", minimum=plan.fewest + 1, optimum=usual, maximum=longest)

    def tensor(name: str, kind: DType, *shape: int | Dim) -> TensorSpec:
        return TensorSpec(name=name, dtype=kind, shape=shape)

    def visual(extent: int | Dim) -> tuple[TensorSpec, ...]:
        """What vision gives and splice takes, in this order."""
        counts = (tensor("kept_counts", "int64", batch),) if plan.counting == "adaptive" else ()
        return (
            tensor("visual_embeds", dtype, batch, extent, sizes.hidden_size),
            tensor("kept_indices", "int64", batch, extent),
            *counts,
        )

    tower = plan.text_tower
    expression = (
        ()
        if tower is None
        else (
            tensor(
                "text_ids",
                "int64",
                batch,
                Dim(name="expression", minimum=3, optimum=min(16, tower.context), maximum=tower.context),
            ),
        )
    )
    count = (
        (TensorSpec(name="keep_count", dtype="int64", shape=(), extent_of=plan.kept_dim),)
        if plan.counting == "chosen"
        else ()
    )
    side = config.vision_config.image_size
    cache = [
        (layer, part, (batch, sizes.kv_heads, slots, sizes.head_dim))
        for layer, slots in enumerate(plan.layer_capacities(sizes.layers))
        for part in ("key", "value")
    ]
    past = [tensor(f"past.{layer}.{part}", dtype, *shape) for layer, part, shape in cache]
    present = [tensor(f"present.{layer}.{part}", dtype, *shape) for layer, part, shape in cache]

    spliced_embeds = tensor("inputs_embeds", dtype, batch, spliced, sizes.hidden_size)
    logits = tensor("logits", "float32", batch, sizes.vocabulary)

    embedding = model.model.language_model.embed_tokens
    splicing = {"image_token_id": config.image_token_id, "visual_tokens": sizes.visual_tokens}
    specs_and_modules: list[tuple[GraphSpec, nn.Module]] = [
        (
            GraphSpec(
                name="vision",
                inputs=(tensor("pixel_values", "float32", batch, 3, side, side), *expression, *count),
                outputs=visual(plan.kept_dim if plan.counting == "chosen" else plan.most),
            ),
            ClipVision(model, plan, feature_layer=_feature_layer(config), text=_clip_text(checkpoint, plan, torch_dtype, mode)),
        ),
        (
            GraphSpec(
                name="splice",
                inputs=(
                    tensor("input_ids", "int64", batch, text),
                    *(
                        given
                        for given in visual(plan.most if plan.counting == "fixed" else plan.kept_dim)
                        # Policies that renumber do not look at which tokens were kept.
                        if given.name != "kept_indices" or plan.positions is PositionPolicy.GAP
                    ),
                ),
                outputs=(
                    spliced_embeds,
                    tensor("position_ids", "int64", batch, spliced),
                    tensor("next_position", "int64", batch),
                    tensor("next_slot", "int64", batch),
                    *(staged.splice_outputs(plan, batch) if plan.stages else ()),
                ),
            ),
            staged.StagedSplice(embedding, plan, **splicing)
            if plan.stages
            else Splice(embedding, policy=plan.positions, **splicing),
        ),
        (
            GraphSpec(
                name="embed",
                inputs=(tensor("input_ids", "int64", batch, Dim(name="text", minimum=1, optimum=1, maximum=plan.max_text)),),
                outputs=(
                    tensor(
                        "inputs_embeds",
                        dtype,
                        batch,
                        Dim(name="text", minimum=1, optimum=1, maximum=plan.max_text),
                        sizes.hidden_size,
                    ),
                ),
            ),
            Embed(embedding),
        ),
    ]  # fmt: skip
    if plan.stages:
        specs_and_modules += staged.decoder_graphs(
            model, plan, embeds=spliced_embeds, logits=logits, past=past, present=present
        )
    else:
        spec = GraphSpec(
            name="decoder",
            inputs=(
                tensor("inputs_embeds", dtype, batch, sequence, sizes.hidden_size),
                tensor("position_ids", "int64", batch, sequence),
                tensor("write_index", "int64", batch),
                tensor("last_index", "int64", batch),
                *past,
            ),
            outputs=(logits, *present),
            aliased={out.name: into.name for out, into in zip(present, past, strict=True)},
        )
        specs_and_modules.append((spec, Decoder(model)))
    return [
        Component(
            module=module.eval(),
            spec=spec,
            weight_key=lambda name: weight_key(checkpoint, name),
            settings=(checkpoint.folder, _settings(spec.name, plan)),
        )
        for spec, module in specs_and_modules
    ]


def _settings(graph: GraphName, plan: Plan) -> Hashable:
    """What of the plan a graph depends on, besides the shapes in its spec. The whole plan is always right."""
    if graph in ("embed", "decoder"):
        return None
    if graph == "splice":
        return plan.positions, tuple(stage.kept for stage in plan.stages)
    if graph == "prefill":
        return plan
    if graph == "decode":
        return plan.positions is PositionPolicy.GAP, plan.stages
    order = PositionPolicy.GAP if plan.positions.keeps_raster_order else PositionPolicy.PERMUTED
    if plan.stages:  # what drops tokens later encodes as if nothing did
        return replace(plan, positions=order, pruner="none", keep=1.0, stages=())
    return replace(plan, positions=order)


def weight_key(checkpoint: Checkpoint, parameter: str) -> str:
    """Checkpoint key of a parameter of one of the components below.

    Raises:
        CheckpointError: the checkpoint has it under none of the known names.
    """
    if parameter.startswith("embed_tokens."):
        parameter = f"language_model.{parameter}"
    if parameter.startswith(f"{TEXT_TOWER}."):
        return text_weight_key(checkpoint, parameter)
    for prefix, candidates in _PREFIXES.items():
        if parameter.startswith(prefix):
            rest = parameter.removeprefix(prefix)
            for candidate in candidates:
                if candidate + rest in checkpoint.weights:
                    return candidate + rest
            if prefix == "lm_head." and _config(checkpoint).text_config.tie_word_embeddings:
                return weight_key(checkpoint, "embed_tokens.weight")
    raise CheckpointError(
        f"has no weight for {parameter}",
        subject=str(checkpoint.folder),
        hint="a shard is missing, or the layout is not one of the published ones",
    )


def _config(checkpoint: Checkpoint) -> LlavaConfig:
    if "auto_map" in checkpoint.config:
        raise CheckpointError(
            "asks for code of its own to be run (auto_map)",
            subject=str(checkpoint.folder / "config.json"),
            hint="use a checkpoint that transformers supports without remote code",
        )
    try:
        config = cast(LlavaConfig, AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"is not a configuration transformers accepts: {str(error).splitlines()[0]}",
            subject=str(checkpoint.folder / "config.json"),
            hint="fetch the checkpoint's config.json again",
        ) from error
    _require(
        checkpoint,
        "vision_feature_layer",
        isinstance(config.vision_feature_layer, int),
        "one layer, not a list",
    )
    _require(
        checkpoint,
        "vision_feature_select_strategy",
        config.vision_feature_select_strategy == "default",
        "default",
    )
    _require(
        checkpoint, "vision_config.model_type", config.vision_config.model_type == "clip_vision_model", "CLIP"
    )
    _require(checkpoint, "text_config.model_type", config.text_config.model_type == "llama", "llama")
    return config


def _feature_layer(config: LlavaConfig) -> int:
    """How many layers of the tower are run: `vision_feature_layer` counts hidden states, the embeddings being number 0."""
    feature, layers = int(config.vision_feature_layer), int(config.vision_config.num_hidden_layers)
    return feature if feature >= 0 else layers + 1 + feature


def _clip_text(
    checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, mode: FakeTensorMode
) -> ClipText | None:
    if plan.text_tower is None:
        return None
    return hollow_text_tower(checkpoint.parts[TEXT_TOWER], dtype, mode)


def _is_rgb(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) == 3
        and all(isinstance(value, int | float) for value in values)
    )


def _require(checkpoint: Checkpoint, field: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise CheckpointError(
            f"{field} is not supported (supported: {wanted})",
            subject=str(checkpoint.folder / "config.json"),
            hint="this model is not LLaVA-1.5 as published; see `gap-export models`",
        )


def _hollow_model(
    config: LlavaConfig, dtype: torch.dtype, mode: FakeTensorMode
) -> LlavaForConditionalGeneration:
    def build() -> LlavaForConditionalGeneration:
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": IMPLEMENTATION}
        return cast(
            LlavaForConditionalGeneration, LlavaForConditionalGeneration._from_config(config, **options)
        )

    return hollow(build, mode)
