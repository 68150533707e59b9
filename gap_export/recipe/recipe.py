"""The recipe: everything a build is told, validated once, stored in the bundle.

A recipe file is YAML in `recipes/` (or any path); command-line options replace single fields. Fields left out take the
family's defaults.
"""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, field_validator

from gap_export.errors import RecipeError, first_line
from gap_export.positions import MergedId, PositionPolicy
from gap_export.precision import Thresholds, known, precision
from gap_export.records import Record

Target = Literal["onnx", "tensorrt-rtx", "tensorrt"]
Keep = float | tuple[float, float, float] | Literal["adaptive"]
"""A fraction; (smallest, default, largest) of what a request may choose; or what each image needs."""

USUAL_KEEP = 0.25
"""The default of a range that leaves it out, if it lies within."""

USUAL_DEVICES = ("8.6", "8.9", "12.0")
"""Compute capabilities of GPUs that TensorRT-RTX is for."""


_PLACES = ("checkpoint", "base", "vision_tower", "text_tower", "ranges")
"""Fields that name a file or a folder, or what is fetched in its place."""


class Recipe(Record):
    """One build.

    Attributes:
        name: of the recipe.
        family: name in the table of families; found from the checkpoint when left out.
        checkpoint: `bundled:NAME`, a folder, or a hub id. In a recipe file, relative names here, in `base`, `vision_tower`,
            `text_tower` and `ranges` are looked for beside the file first, then in the working folder.
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
        max_new_tokens: longest answer.
        max_text: longest prompt in text tokens, the placeholder counted as one.
        max_batch: most images per call.
        capacity: makes the cache static, with so many slots; by default it has as many as a request needs, and where engines are built
            (which want a static one) just enough for the longest prompt after pruning plus the longest answer.
        prompt: grounding prompt with `{expression}` and the image placeholder.
        images: images in one prompt, which then has as many placeholders; boxes are those of the last one.
        fit: how images become squares.
        max_pixels: larger images are scaled down, in families that take them at their own size; the checkpoint's own bound
            when left out. It sets how many visual tokens an image may have, and with it the cache.
        targets: what to build besides the ONNX graphs.
        compute_capabilities: GPUs that engines are built for; when left out, those of TensorRT-RTX that know the precision.
        gates: for `validate`; by default those of the precision.
    """

    name: str
    family: str | None = None
    checkpoint: str
    summary: str = ""
    keep: Keep = USUAL_KEEP
    keep_bound: float = Field(default=0.5, gt=0, le=1)
    pruner: str = "cls_attention"
    prune_layers: tuple[int, ...] = ()
    positions: PositionPolicy = PositionPolicy.GAP
    merged_id: MergedId = MergedId.LAST_VISUAL
    seed: int = Field(default=0, ge=0)
    weights: Literal["checkpoint", "random"] = "checkpoint"
    base: str | None = None
    vision_tower: str | None = None
    text_tower: str | None = None
    precision: Annotated[str, AfterValidator(known)] = "fp32"
    ranges: str | None = None
    max_new_tokens: int = Field(default=32, ge=1)
    max_text: int = Field(default=128, ge=2)
    max_batch: int = Field(default=8, ge=1)
    capacity: int | None = Field(default=None, ge=1)
    prompt: str | None = None
    images: int = Field(default=1, ge=1)
    fit: Literal["pad", "crop", "stretch"] | None = None
    max_pixels: int | None = Field(default=None, ge=1)
    targets: tuple[Target, ...] = ("onnx",)
    compute_capabilities: tuple[str, ...] | None = None
    gates: Thresholds | None = None

    @field_validator("keep", mode="before")
    @classmethod
    def _read_keep(cls, keep: Any) -> Any:
        """Text as typed (`0.1:1.0`) and two-part ranges become what is stored."""
        if keep == "adaptive":
            return keep
        parts = keep.split(":") if isinstance(keep, str) else keep
        if isinstance(parts, list | tuple):
            try:
                parts = [float(part) for part in parts]
            except (TypeError, ValueError) as error:
                raise ValueError("is a fraction, a range such as 0.1:1.0, or adaptive") from error
        else:
            parts = [parts]
        if not 1 <= len(parts) <= 3:
            raise ValueError("is a fraction, a range such as 0.1:1.0, or adaptive")
        if not all(isinstance(part, int | float) and 0 < part <= 1 for part in parts):
            raise ValueError("is the fraction of visual tokens kept and must be above 0 and at most 1")
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
    def thresholds(self) -> Thresholds:
        """The gates in force."""
        return self.gates or precision(self.precision).gates

    @classmethod
    def load(cls, model: str, **options: Any) -> Recipe:
        """A recipe by name, by file, or a default one around a checkpoint, with options of one's own.

        Args:
            model: recipe name, path of a YAML file, checkpoint folder, or hub id `owner/name`.
            options: fields to replace: `keep=0.25`, `pruner="divprune"`, ...

        Raises:
            RecipeError: nothing of that name, a file that is not a valid recipe, or an option that cannot work.
        """
        return load_recipe(model).replaced(**options)

    def replaced(self, **options: Any) -> Recipe:
        """A copy with the options that are not None replaced, validated again.

        Raises:
            RecipeError: the result is not valid.
        """
        given = {name: value for name, value in options.items() if value is not None}
        return _validated({**self.model_dump(), **given}, subject=self.name)


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
    elif model and path.is_dir():
        return Recipe(name=path.resolve().name, checkpoint=str(path.resolve()))
    elif path.suffix not in (".yaml", ".yml"):
        if model.count("/") == 1 and not model.startswith((".", "/")):
            return Recipe(name=model.rpartition("/")[2], checkpoint=model)
        near = difflib.get_close_matches(model, recipes, n=1)
        raise RecipeError(
            "is not a recipe, a folder or a hub id" + (f"; did you mean {near[0]!r}?" if near else ""),
            subject=repr(model),
            hint=f"recipes: {', '.join(recipes)}",
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError("cannot be read as YAML", subject=str(path), hint=first_line(error)) from error
    if not isinstance(content, dict):
        raise RecipeError("is not a mapping", subject=str(path), hint="see recipes/shapes.yaml")
    return _validated({"name": path.stem, **content, **_beside(path, content)}, subject=str(path))


def _beside(recipe: Path, content: dict[str, Any]) -> dict[str, str]:
    """The fields of a recipe file that name what lies beside it, relative to it; others are looked for in the working folder."""
    named = {field: content[field] for field in _PLACES if isinstance(content.get(field), str)}
    places = {
        field: recipe.parent / name for field, name in named.items() if name and not Path(name).is_absolute()
    }
    # A link itself is not followed: files of caches have their suffix in the name of the link alone.
    return {
        field: str(place.parent.resolve() / place.name) for field, place in places.items() if place.exists()
    }


def _validated(content: dict[str, Any], *, subject: str) -> Recipe:
    return Recipe.checked(
        content, subject=subject, hint="see recipes/ and `gap-export build --help`", error=RecipeError
    )
