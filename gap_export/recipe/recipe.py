"""The recipe: everything a build is told, validated once, stored in the bundle.

A recipe file is YAML in `recipes/` (or any path); command-line options replace single fields. Fields left out take the
family's defaults.
"""

from __future__ import annotations

import difflib
import os
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from gap_export import bounds
from gap_export.bounds import Bound
from gap_export.boxes import codecs
from gap_export.errors import RecipeError, shown
from gap_export.files import is_folder, kinds, read_yaml
from gap_export.positions import MergedId, PositionPolicy
from gap_export.precision import Thresholds, known, precision
from gap_export.records import Record

Target = Literal["onnx", "tensorrt-rtx", "tensorrt"]
Keep = float | tuple[float, float, float] | Literal["adaptive"]
"""A fraction; (smallest, default, largest) of what a request may choose; or what each image needs."""

_KEEP = "is the fraction of visual tokens kept, above 0 and at most 1; a range such as 0.1:1.0; or adaptive"

USUAL_KEEP = 0.25
"""The default of a range that leaves it out, if it lies within."""

USUAL_DEVICES = ("8.6", "8.9", "12.0")
"""Compute capabilities of GPUs that TensorRT-RTX is for."""


LONGEST_NAME = 100
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._+@-]{{0,{LONGEST_NAME - 1}}}")


def _plain(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"becomes the name of files: it has at most {LONGEST_NAME} letters, digits and _ . - + @, and begins with one of the first three"
        )
    return name


def _within(bound: Bound) -> BeforeValidator:
    """Of a number: not in quotes, no truth value, within bounds."""

    def checked(value: Any) -> Any:
        if not (isinstance(value, int | float) and bound.holds(value)):
            raise ValueError(f"is not {bound.range}")
        return value

    return BeforeValidator(checked)


_Text = Annotated[str, Field(max_length=4096)]
_Layer = Annotated[int, _within(bounds.LAYER)]
_Capability = Annotated[str, Field(pattern=r"^[1-9][0-9]?\.[0-9]$")]

_PLACES = ("checkpoint", "base", "vision_tower", "text_tower", "ranges", "calibration")
"""Fields that name a file or a folder, or what is fetched in its place."""


class Recipe(Record):
    """One build.

    Attributes:
        name: of the recipe: letters, digits and `_ . - + @`, as it becomes the name of files.
        family: name in the table of families; found from the checkpoint when left out.
        checkpoint: `bundled:NAME`, a folder, or a hub id. In a recipe file, relative names here, in `base`, `vision_tower`,
            `text_tower`, `ranges` and `calibration` are looked for beside the file first, then in the working folder.
        keep: fraction of visual tokens kept, in (0, 1]; or a range, written `[0.1, 1.0]` or `0.1:1.0`, in which every request
            chooses its own, with a default between them if wanted (`0.1:0.25:1.0`); or `adaptive`, as many as the image
            needs by the pruner's own rule.
        keep_bound: most that an adaptive pruner may keep of an image, as a fraction.
        pruner: name of the pruner.
        prune_layers: decoder layers before which tokens are dropped, for pruners that do so inside the decoder; empty
            leaves it to the pruner.
        positions: numbering policy.
        merged_id: which raster index tokens stand for that a pruner merged from many.
        seed: for pruners that choose at random.
        weights: those of the checkpoint, or random ones of its sizes, for latency work without it.
        base: checkpoint that a delta or a low-rank update is applied to, for models that are published so.
        vision_tower: checkpoint of the vision tower, for models that are published without it.
        text_tower: CLIP checkpoint (`bundled:NAME`, a folder, or a hub id) that pruners which look at the expression take
            the text tower and the projections from; it must be the one the vision tower comes from.
        precision: name in the table of precisions.
        ranges: file of `gap-export calibrate`, for precisions whose activations have fixed scales.
        calibration: file of prose in UTF-8, for precisions whose rounding can be compensated: errors of four-bit weights then get smaller where
            the decoder's activations on it are large (GPTQ).
        max_new_tokens: longest answer.
        max_text: longest prompt in text tokens, over all turns of a conversation, the placeholder counted as one.
        max_batch: most images per call.
        capacity: makes the cache static, with so many slots; by default it has as many as a request needs, and where engines are built
            (which want a static one) just enough for the longest prompt after pruning plus the longest answer.
        prompt: grounding prompt with `{expression}` and the image placeholder; when left out, the family's question in the checkpoint's chat
            template, or in the family's own frame where it has none.
        box_format: how the model writes boxes, a name in the table of box codecs; the family's way when left out.
        images: images in one prompt, which then has as many placeholders; boxes are those of the last one.
        fit: how images become squares.
        max_pixels: larger images are scaled down, in families that take them at their own size; the checkpoint's own bound
            when left out. It sets how many visual tokens an image may have, and with it the cache.
        targets: what to build besides the ONNX graphs.
        compute_capabilities: GPUs that engines are built for; when left out, those of TensorRT-RTX that know the precision.
        gates: for `validate`; by default those of the precision.
    """

    name: Annotated[str, AfterValidator(_plain)]
    family: _Text | None = None
    checkpoint: _Text
    summary: _Text = ""
    keep: Keep = USUAL_KEEP
    keep_bound: Annotated[float, _within(bounds.FRACTION)] = 0.5
    pruner: _Text = "cls_attention"
    prune_layers: Annotated[tuple[_Layer, ...], Field(max_length=100)] = ()
    positions: PositionPolicy = PositionPolicy.GAP
    merged_id: MergedId = MergedId.LAST_VISUAL
    seed: Annotated[int, _within(bounds.SEED)] = 0
    weights: Literal["checkpoint", "random"] = "checkpoint"
    base: _Text | None = None
    vision_tower: _Text | None = None
    text_tower: _Text | None = None
    precision: Annotated[str, AfterValidator(known)] = "fp32"
    ranges: _Text | None = None
    calibration: _Text | None = None
    max_new_tokens: Annotated[int, _within(bounds.TOKENS)] = 32
    max_text: Annotated[int, _within(bounds.TEXT)] = 128
    max_batch: Annotated[int, _within(bounds.BATCH)] = 8
    capacity: Annotated[int, _within(bounds.SLOTS)] | None = None
    prompt: Annotated[str, Field(max_length=100_000)] | None = None
    # (Left out of what is stored where it is None: bundles and sweeps without one are what they were before there was any.)
    box_format: Annotated[str, AfterValidator(codecs.known)] | None = Field(
        default=None, exclude_if=lambda name: name is None
    )
    images: Annotated[int, _within(bounds.IMAGES)] = 1
    fit: Literal["pad", "crop", "stretch"] | None = None
    max_pixels: Annotated[int, _within(bounds.PIXELS)] | None = None
    targets: Annotated[tuple[Target, ...], Field(max_length=10)] = ("onnx",)
    compute_capabilities: Annotated[tuple[_Capability, ...], Field(max_length=20)] | None = None
    gates: Thresholds | None = None

    @field_validator("keep", mode="before")
    @classmethod
    def _read_keep(cls, keep: Any) -> Any:
        """Text as typed (`0.1:1.0`) and two-part ranges become what is stored."""
        if keep == "adaptive":
            return keep
        parts = keep.split(":") if isinstance(keep, str) else keep
        parts = list(parts) if isinstance(parts, list | tuple) else [parts]
        if not 1 <= len(parts) <= 3:
            raise ValueError(_KEEP)
        try:
            parts = [bounds.FRACTION.read(part.strip()) if isinstance(part, str) else part for part in parts]
        except ValueError as error:
            raise ValueError(_KEEP) from error
        if not all(isinstance(part, int | float) and bounds.FRACTION.holds(part) for part in parts):
            raise ValueError(_KEEP)
        if len(parts) == 1:
            return parts[0]
        low, high = float(parts[0]), float(parts[-1])
        default = float(parts[1]) if len(parts) == 3 else min(max(USUAL_KEEP, low), high)
        if not low <= default <= high or low == high:
            raise ValueError("is a range and goes from the smallest to the largest, the default between them")
        return (low, default, high)

    @property
    def devices(self) -> tuple[str, ...]:
        """Compute capabilities that engines are built for."""
        smallest = precision(self.precision).min_compute_capability or 0
        return self.compute_capabilities or tuple(each for each in USUAL_DEVICES if float(each) >= smallest)

    @property
    def has_static_cache(self) -> bool:
        """Whether the cache always has all its slots, as engines want it, and not as many as a request needs."""
        return self.capacity is not None or any(target != "onnx" for target in self.targets)

    @property
    def thresholds(self) -> Thresholds:
        """The gates in force."""
        return self.gates or precision(self.precision).gates

    @classmethod
    def load(cls, model: str, **options: Any) -> Recipe:
        """A recipe by name, by file, or a default one around a checkpoint, with options of one's own.

        The prompt of a recipe by name belongs to the published checkpoint: with another one, and no prompt among the options, it is left open.

        Args:
            model: recipe name, path of a YAML file, checkpoint folder, or hub id `owner/name`.
            options: fields to replace: `keep=0.25`, `pruner="divprune"`, ...

        Raises:
            RecipeError: nothing of that name, a file that is not a valid recipe, or an option that cannot work.
        """
        recipe = load_recipe(model)
        if model in known_recipes() and _is_of_another(recipe, options.get("checkpoint")):
            recipe = recipe.model_copy(update={"prompt": None})
        return recipe.replaced(**options)

    def replaced(self, **options: Any) -> Recipe:
        """A copy with the options that are not None replaced, validated again.

        Raises:
            RecipeError: the result is not valid.
        """
        given = {name: value for name, value in options.items() if value is not None}
        return _validated({**self.model_dump(), **given}, subject=self.name)


def _is_of_another(recipe: Recipe, checkpoint: str | None) -> bool:
    """Whether the prompt of a recipe that comes with the package has nothing to say of a checkpoint that takes the place of the recipe's.

    It is what the published checkpoint is asked in: another may have a chat template of its own, and one that has none is asked in the
    same words, those of its family. A bundled checkpoint's prompt is what it was trained with, as one is that was trained like it.
    """
    return checkpoint not in (None, recipe.checkpoint) and not recipe.checkpoint.startswith("bundled:")


def plain_name(name: str) -> str:
    """A name for a recipe that has none of its own, from that of a folder, a file or a repository: other characters become `-`."""
    plain = re.sub(r"[^A-Za-z0-9._+@-]+", "-", name).lstrip(".+@-")
    return plain[:LONGEST_NAME].rstrip("-") or "model"


def known_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    folder = Path(str(resources.files("gap_export"))) / "recipes"
    if not folder.is_dir():  # an editable install keeps them beside the package
        folder = Path(__file__).resolve().parents[2] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(model: str) -> Recipe:
    """A recipe by name, by file, or a default one around a checkpoint folder or hub id.

    Args:
        model: recipe name, path of a YAML file, checkpoint folder, or hub id `owner/name`.

    Raises:
        RecipeError: nothing of that name, or a file that is not a valid recipe.
    """
    recipes = known_recipes()
    path = Path(model)
    if model in recipes:
        path = recipes[model]
    elif model and is_folder(path):
        return Recipe(name=plain_name(path.resolve().name), checkpoint=str(path.resolve()))
    elif path.suffix not in (".yaml", ".yml"):
        if model.count("/") == 1 and not model.startswith((".", "/")):
            return Recipe(name=plain_name(model.rpartition("/")[2]), checkpoint=model)
        near = difflib.get_close_matches(model[:LONGEST_NAME], recipes, n=1)
        raise RecipeError(
            "is not a recipe, a folder or a hub id" + (f"; did you mean {near[0]!r}?" if near else ""),
            subject=shown(model),
            hint=f"recipes: {', '.join(recipes)}",
        )
    content = read_yaml(path, kinds.RECIPE)
    if not isinstance(content, dict):
        raise RecipeError("is not a mapping", subject=str(path), hint="see recipes/shapes.yaml")
    return _validated({"name": plain_name(path.stem), **content, **_beside(path, content)}, subject=str(path))


def _beside(recipe: Path, content: dict[str, Any]) -> dict[str, str]:
    """The fields of a recipe file that name what lies beside it, relative to it; others are looked for in the working folder."""
    named = {field: content[field] for field in _PLACES if isinstance(content.get(field), str)}
    places = {
        field: recipe.parent / name for field, name in named.items() if name and not Path(name).is_absolute()
    }
    # A link itself is not followed: files of caches have their suffix in the name of the link alone.
    return {
        field: str(place.parent.resolve() / place.name)
        for field, place in places.items()
        if os.path.lexists(place)
    }


def _validated(content: dict[str, Any], *, subject: str) -> Recipe:
    return Recipe.checked(
        content, subject=subject, hint="see recipes/ and `gap-export build --help`", error=RecipeError
    )
