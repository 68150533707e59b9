"""The table of model families: one row each, light to import, and what can be said of a family without a checkpoint at hand.

A family is a row here, a class (`base.Family`) and a reference (`reference.ReferenceModel`). Row and class may come from outside the
package: see `register`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from gap_export import prune
from gap_export.boxes.codecs import CODECS
from gap_export.bundle.manifest import BoxFormat, VisionFeature
from gap_export.checkpoint import Checkpoint
from gap_export.errors import CheckpointError, InputError
from gap_export.positions import AttentionMask
from gap_export.recipe.recipe import known_recipes, load_recipe

if TYPE_CHECKING:
    from gap_export.families.base import Family

_BESIDE = ("base", "vision_tower", "text_tower")
"""Fields of a recipe that name further checkpoints."""


@dataclass(frozen=True)
class FamilyRow:
    """One family.

    Attributes:
        name: what `--family` takes and manifests store.
        title: for people.
        implementation: `module:class` of its `base.Family`.
        reference: `module:class` of the model that its graphs are held against.
        model_types: values of `model_type` in config.json; "" stands for a checkpoint without a config.json.
        box: how boxes are written, by models as published and recipes that leave `fit` open.
        published: hub ids, and in which form.
        visual_tokens: how many an image has, as text.
        position_rows: rows of position ids: 3 for M-RoPE (time, height, width).
        missing_features: what pruners cannot read from the tower (`ModelSpec.missing_features`), of models as published.
        attention_mask: which tokens see which in the decoder; see `ModelSpec.attention_mask`.
        text_by: what reads the expression for pruners that look at it: CLIP's text tower, put beside the vision tower, or the decoder's own token
            embedding, where no text tower shares a space with the vision tower.
        recognises: tells its checkpoints from others of the same `model_type`; rows that have it are asked before those that have
            not.
    """

    name: str
    title: str
    implementation: str
    reference: str
    model_types: tuple[str, ...]
    box: BoxFormat
    published: str = ""
    visual_tokens: str = ""
    position_rows: int = 1
    missing_features: tuple[VisionFeature, ...] = ()
    attention_mask: AttentionMask = "causal"
    text_by: Literal["clip", "embeddings"] = "clip"
    recognises: Callable[[Checkpoint], bool] | None = None

    @property
    def pruners(self) -> tuple[str, ...]:
        """Names of the pruners that work."""
        return tuple(row.name for row in prune.PRUNERS.values() if not self.lacks(row))

    def lacks(self, pruner: prune.Pruner) -> str:
        """What a pruner needs and models of this family do not have, as text; "" where it works."""
        missing = [prune.NEEDED[part] for part in pruner.needs if part in self.missing_features]
        if pruner.in_decoder and self.attention_mask != "causal":
            missing.append("a causal mask")
        return " and ".join(missing)

    def load(self) -> type[Family]:
        """The class of the family; imports torch and transformers."""
        kind: type[Family] = _load(self.implementation)
        return kind

    def load_reference(self) -> Any:
        """The class of the reference; imports torch and transformers."""
        return _load(self.reference)


def _load(path: str) -> Any:
    """What `module:name` leads to."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


_ROWS: dict[str, FamilyRow] = {}


def register(new: FamilyRow) -> None:
    """Add a family to the table.

    Raises:
        ValueError: there is one of that name.
    """
    if new.name in _ROWS:
        raise ValueError(f"a family named {new.name!r} is in the table already")
    _ROWS[new.name] = new


def names() -> tuple[str, ...]:
    """Names of all families, in alphabetical order."""
    return tuple(sorted(_ROWS))


def row(name: str) -> FamilyRow:
    """The row of that name.

    Raises:
        InputError: there is none.
    """
    if name not in _ROWS:
        raise InputError("is not a family", subject=name, hint=f"known: {', '.join(names())}")
    return _ROWS[name]


def overview() -> dict[str, Any]:
    """What can be built, as one record that can be written as JSON.

    Returns:
        `recipes`, those that come with the package, with family, box format, pruners that work, checkpoint and what lies beside it;
        `box_formats`, the names that `--box-format` takes, each with a box as it is written, the number of the far edge (None for pixels as the
        model sees them), and what the numbers are of where nothing else tells it;
        `pruners`, the rows of their table.
    """
    recipes = [load_recipe(name) for name in known_recipes()]
    return {
        "recipes": [
            {
                "name": recipe.name,
                "family": recipe.family,
                "box_format": row(recipe.family).box.model_dump(),
                "pruners": list(row(recipe.family).pruners),
                "checkpoint": recipe.checkpoint,
                "needs": {part: getattr(recipe, part) for part in _BESIDE if getattr(recipe, part)},
                "summary": recipe.summary,
            }
            for recipe in recipes
            if recipe.family in _ROWS
        ],
        "box_formats": [
            {"name": codec.name, "example": codec.example, "unit": codec.unit, "frame": codec.frame}
            for codec in CODECS.values()
        ],
        "pruners": [asdict(pruner) for pruner in prune.PRUNERS.values()],
    }


def row_of(checkpoint: Checkpoint) -> FamilyRow:
    """The family that knows a checkpoint, by its `model_type` or by what it holds.

    Raises:
        CheckpointError: none does.
    """
    if checkpoint.config.get("auto_map"):
        raise CheckpointError(
            "requires remote code (auto_map), which is not supported",
            subject=str(checkpoint.folder / "config.json"),
            hint="use a checkpoint that transformers supports without remote code",
        )
    of_its_type = [each for each in _ROWS.values() if checkpoint.model_type in each.model_types]
    for each in sorted(of_its_type, key=lambda each: each.recognises is None):
        if each.recognises is None or each.recognises(checkpoint):
            return each
    raise CheckpointError(
        f"has model_type {checkpoint.model_type!r}, which is not supported",
        subject=str(checkpoint.folder / "config.json"),
        hint=f"supported: {', '.join(names())}",
    )


_NO_CLASS_TOKEN: tuple[VisionFeature, ...] = ("projected_class_token",)
"""There is none, or none that the decoder could take."""
_PADDED_SQUARE = BoxFormat(codec="llava", frame="padded_square")
_REFERENCES = "gap_export.families.reference"


def _qwen_vl(name: str, title: str, published: str, visual_tokens: str) -> FamilyRow:
    """A generation of Qwen-VL: images at their own shape, M-RoPE, no class token."""
    kind = title.replace("-", "").replace(".", "")
    return FamilyRow(
        name=name,
        title=title,
        implementation=f"gap_export.families.qwen_vl:{kind}",
        reference=f"{_REFERENCES}.qwen_vl:{kind}Reference",
        model_types=(name,),
        box=BoxFormat(codec=name, frame="image"),
        published=published,
        visual_tokens=visual_tokens,
        position_rows=3,
        missing_features=_NO_CLASS_TOKEN,
        text_by="embeddings",
    )


for _row in (
    FamilyRow(
        name="llava",
        title="LLaVA-1.5",
        implementation="gap_export.families.llava:Llava",
        reference=f"{_REFERENCES}.llava:LlavaReference",
        model_types=("llava",),
        box=_PADDED_SQUARE,
        published="`llava-hf/llava-1.5-7b-hf`, `-13b-hf`; key names before and after transformers 4.52, sharded or not",
        visual_tokens="576",
    ),
    FamilyRow(
        name="llava_original",
        title="LLaVA-1.5",
        implementation="gap_export.families.llava_original:LlavaOriginal",
        reference=f"{_REFERENCES}.original:LlavaOriginalReference",
        # LLaVA's own code and transformers' have used the name `llava` for two layouts.
        model_types=("llava_llama", "llava"),
        recognises=lambda checkpoint: (
            checkpoint.model_type == "llava_llama" or "mm_vision_tower" in checkpoint.config
        ),
        box=_PADDED_SQUARE,
        published="`liuhaotian/llava-v1.5-7b`, `-13b`: `.bin` shards, the tower beside them or inside",
        visual_tokens="576",
    ),
    FamilyRow(
        name="shikra",
        title="Shikra",
        implementation="gap_export.families.shikra:Shikra",
        reference=f"{_REFERENCES}.original:ShikraReference",
        model_types=("shikra",),
        box=BoxFormat(codec="shikra", frame="padded_square"),
        published="`shikras/shikra-7b-delta-v1`: a delta over LLaMA-7B, or merged; the tower beside it",
        visual_tokens="256",
    ),
    FamilyRow(
        name="minigpt_v2",
        title="MiniGPT-v2",
        implementation="gap_export.families.minigpt_v2:MiniGpt",
        reference=f"{_REFERENCES}.minigpt_v2:MiniGptReference",
        model_types=("",),
        recognises=lambda checkpoint: not checkpoint.config and "llama_proj.weight" in checkpoint.weights,
        box=BoxFormat(codec="minigpt_v2", frame="image"),
        published="a `.pth` with low-rank updates; EVA-CLIP (`eva_vit_g.pth`) and Llama-2-7b-chat beside it",
        visual_tokens="256, four patches each",
        missing_features=("projected_class_token",),
        text_by="embeddings",
    ),
    FamilyRow(
        name="llava_next",
        title="LLaVA-NeXT",
        implementation="gap_export.families.llava_next:LlavaNext",
        reference=f"{_REFERENCES}.llava_next:LlavaNextReference",
        model_types=("llava_next",),
        box=_PADDED_SQUARE,
        published="`llava-hf/llava-v1.6-vicuna-7b-hf`, `-mistral-7b-hf`",
        visual_tokens="by the image: tiles, and ends of lines that are never pruned",
    ),
    FamilyRow(
        name="llava_onevision",
        title="LLaVA-OneVision",
        implementation="gap_export.families.llava_onevision:LlavaOnevision",
        reference=f"{_REFERENCES}.llava_onevision:LlavaOnevisionReference",
        model_types=("llava_onevision",),
        box=BoxFormat(codec="llava", frame="image"),
        published="`llava-hf/llava-onevision-qwen2-7b-ov-hf`; no class token",
        visual_tokens="by the image",
        missing_features=_NO_CLASS_TOKEN,
        text_by="embeddings",
    ),
    FamilyRow(
        name="internvl",
        title="InternVL",
        implementation="gap_export.families.internvl:InternVL",
        reference=f"{_REFERENCES}.internvl:InternVLReference",
        model_types=("internvl",),
        box=BoxFormat(codec="internvl", frame="image"),
        published="`OpenGVLab/InternVL3-*-hf`",
        visual_tokens="by the image: 256 per tile",
        missing_features=_NO_CLASS_TOKEN,
        text_by="embeddings",
    ),
    _qwen_vl(
        "qwen2_vl",
        "Qwen2-VL",
        "`Qwen/Qwen2-VL-*-Instruct`; key names before and after transformers 4.52",
        "by the image: one per 28 by 28 pixels",
    ),
    _qwen_vl(
        "qwen2_5_vl",
        "Qwen2.5-VL",
        "`Qwen/Qwen2.5-VL-*-Instruct`",
        "by the image: one per 28 by 28 pixels",
    ),
    _qwen_vl(
        "qwen3_vl",
        "Qwen3-VL",
        "`Qwen/Qwen3-VL-*-Instruct`, dense",
        "by the image: one per 32 by 32 pixels",
    ),
):
    register(_row)
