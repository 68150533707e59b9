"""The bundle: one folder with plain ONNX graphs, weights, tokenizer and a manifest that explains them.

Everything a runtime needs to turn a picture and an expression into a box stands in `manifest.json`; neither torch nor
transformers is needed to read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gap_export.artifact import FileRecord, verify, write_atomically
from gap_export.errors import BundleError
from gap_export.positions import MergedId, PositionPolicy
from gap_export.spec import Dim, GraphSpec

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
SLOT_STEP = 16
"""Caches are laid out in steps of so many slots, so that requests of similar length share a layout."""
_SLOT_AXIS = 2

Positive = Annotated[float, Field(gt=0)]
EngineTarget = Literal["tensorrt-rtx", "tensorrt"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "int4-fp16", "fp8", "nvfp4"]
Activations = Literal["fp32", "fp16", "bf16"]
ACTIVATIONS: dict[Precision, Activations] = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "fp32",
    "int4": "fp32",
    "int4-fp16": "fp16",
    "fp8": "fp16",
    "nvfp4": "fp16",
}
"""Precision -> that of activations, of the cache, and of weights that are not quantised."""
TowerPart = Literal["class_token", "projected_class_token", "following_layer", "grid"]
"""What a pruner may ask of a vision tower: a class token; one that the projector takes; a layer after the one whose output the
decoder gets; patches that lie on one grid, the same for all pictures."""


class Stored(BaseModel):
    """Base of everything that is written to disk: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Preprocessing(Stored):
    """How a picture becomes `pixel_values` [B, 3, size, size] float32.

    Attributes:
        layout: every picture becomes one square of one size.
        size: side in pixels.
        fit: `pad` to a square, `crop` the centre of the resized short side, or `stretch`.
        background: RGB 0..255 that padding is filled with.
        resample: Pillow's filter name.
        mean: per channel, after scaling to 0..1.
        std: per channel, after scaling to 0..1.
    """

    layout: Literal["square"] = "square"
    size: int = Field(ge=1)
    fit: Literal["pad", "crop", "stretch"]
    background: tuple[int, int, int]
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


class AnyRes(Stored):
    """How a picture becomes tiles of a grid that fits it, with the whole picture, squashed, as the first tile (LLaVA-NeXT,
    LLaVA-OneVision).

    The picture is scaled to fit one of the grids and padded with black. Rows and columns of visual tokens that see nothing but
    padding are left out; every other row of the grid ends with a token that is never pruned.

    Attributes:
        layout: tells it from other kinds.
        size: side of a tile in pixels.
        side: visual tokens along the side of a tile.
        grids: (height, width) in pixels of the grids to choose from, in the order of choice.
        most_tiles: a grid with clearly more tokens than so many tiles have is scaled down to about as many; None never.
        resample: Pillow's filter name.
        mean: per channel, after scaling to 0..1.
        std: per channel, after scaling to 0..1.
    """

    layout: Literal["anyres"] = "anyres"
    size: int = Field(ge=1)
    side: int = Field(ge=1)
    grids: tuple[tuple[int, int], ...] = Field(min_length=1)
    most_tiles: int | None = Field(default=None, ge=1)
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


class DynamicTiles(Stored):
    """How a picture becomes tiles of the grid whose shape is nearest to its own, which it is stretched to fill, with the whole
    picture, squashed, as the last tile where there is more than one (InternVL).

    Attributes:
        layout: tells it from other kinds.
        size: side of a tile in pixels.
        tokens: visual tokens of a tile.
        fewest: smallest number of tiles in a grid.
        most: largest number of tiles in a grid.
        resample: Pillow's filter name.
        mean: per channel, after scaling to 0..1.
        std: per channel, after scaling to 0..1.
    """

    layout: Literal["dynamic_tiles"] = "dynamic_tiles"
    size: int = Field(ge=1)
    tokens: int = Field(ge=1)
    fewest: int = Field(ge=1)
    most: int = Field(ge=1)
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


class Native(Stored):
    """How a picture becomes patches at nearly its own size and shape (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).

    Attributes:
        layout: tells it from other kinds.
        patch: side of a patch in pixels.
        merge: patches along the side of the square that becomes one visual token.
        frames: equal frames that a patch holds, as if the picture were a film.
        window: visual tokens along the side of the squares within which most layers attend; None where all attend to all.
        fewest_pixels: smaller pictures are scaled up.
        most_pixels: larger pictures are scaled down.
        resample: Pillow's filter name.
        mean: per channel, after scaling to 0..1.
        std: per channel, after scaling to 0..1.
    """

    layout: Literal["native"] = "native"
    patch: int = Field(ge=1)
    merge: int = Field(ge=1)
    frames: int = Field(ge=1)
    window: int | None = Field(default=None, ge=1)
    fewest_pixels: int = Field(ge=1)
    most_pixels: int = Field(ge=1)
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


AnyPreprocessing = Annotated[Preprocessing | AnyRes | DynamicTiles | Native, Field(discriminator="layout")]
"""Whatever a bundle may hold; `layout` tells which."""


class TextTower(Stored):
    """The CLIP text tower inside the vision graph, for pruners that look at the expression.

    Attributes:
        checkpoint: folder or hub id its weights came from.
        context: most tokens of an expression, those that begin and end it included. Short rows are filled with the token
            that ends them; the tower reads its answer at the first one.
        width: of the space shared by patches and text.
        aligned_inversely: see `prune.VisionFeatures`.
    """

    checkpoint: str
    context: int = Field(ge=3)
    width: int
    aligned_inversely: bool


class PromptTemplate(Stored):
    """How an expression becomes token ids.

    Attributes:
        grounding: the whole prompt with `{expression}` and an image placeholder for every picture.
        images: pictures in one prompt; boxes are those of the last one.
        image_token_id: the placeholder's id.
        add_special_tokens: whether the tokenizer adds its own (BOS) on top of the template.
        eos_token_ids: ids that end an answer.
    """

    grounding: str
    images: int = Field(default=1, ge=1)
    image_token_id: int
    add_special_tokens: bool
    eos_token_ids: tuple[int, ...]


class BoxFormat(Stored):
    """How the model writes a box, and in which frame.

    Attributes:
        codec: name in `grounding.boxes.CODECS`.
        frame: `padded_square` (0..1 of the padded square) or `image` (of the original width and height).
    """

    codec: str
    frame: Literal["padded_square", "image"]


class TokenRange(Stored):
    """How many visual tokens pictures have, where they differ.

    Attributes:
        fewest: of the smallest picture, those that are never pruned not counted.
        usual: of a usual one, the same way.
        most: of the largest one, the same way.
        never_pruned: most tokens of a picture that are never pruned (ends of lines).
    """

    fewest: int = Field(ge=1)
    usual: int = Field(ge=1)
    most: int = Field(ge=1)
    never_pruned: int = Field(default=0, ge=0)


class ModelFacts(Stored):
    """Sizes of the exported model."""

    hidden_size: int
    """H, width of the decoder."""
    planes: int = 0
    """Further features of every visual token, H wide each, that are added between the first layers (DeepStack). They travel
    with the embedding: in the graphs it is (1 + planes) * H wide, and text has zeros there."""
    layers: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    visual_tokens: int
    """N; of the largest picture, where pictures differ."""
    grid: tuple[int, int] | None
    """(rows, columns) of the visual tokens; None where pictures differ."""
    token_range: TokenRange | None = None
    """Where pictures differ in how many visual tokens they have."""
    position_rows: Literal[1, 3] = 1
    """Rows of position ids: 3 for M-RoPE (time, height, width)."""
    max_positions: int
    tower_lacks: tuple[TowerPart, ...] = ()
    """What a pruner may ask for and this tower does not have."""
    published_tower: str | None = None
    """Hub id of the published checkpoint whose vision tower has the same sizes, where there is one."""

    @property
    def embedding_width(self) -> int:
        """Width of what enters the decoder."""
        return self.hidden_size * (1 + self.planes)


Counting = Literal["fixed", "share", "chosen", "adaptive"]
"""Who says how many visual tokens a picture keeps: the build; the build, as a share of what the picture has; each request; or
what the picture shows."""


class Stage(Stored):
    """A run of decoder layers that see the same tokens. Stage 0 sees every visual token, each later one fewer.

    Attributes:
        first_layer: the layer it begins with.
        layers: how many it has.
        kept: visual tokens that its layers see, merged ones included.
        merged: how many of them were merged from several as the stage began. Each has the raster index of one of those.
        capacity: cache slots of its layers.
    """

    first_layer: int = Field(ge=0)
    layers: int = Field(ge=1)
    kept: int = Field(ge=1)
    merged: int = Field(default=0, ge=0)
    capacity: int = Field(ge=1)

    @property
    def run(self) -> range:
        """Its layers."""
        return range(self.first_layer, self.first_layer + self.layers)


class Pruning(Stored):
    """What is pruned and how survivors are numbered.

    Attributes:
        pruner: name in the table of strategies.
        keep: fraction of visual tokens kept, in (0, 1]: the default where requests choose, the bound where pictures do; what
            is left after the last stage, where there are stages.
        kept: how many enter the decoder: the count that `keep` gives, or all of them, where tokens are dropped inside it.
        counting: who says how many.
        fewest: smallest count.
        most: largest count; what cache and engines have room for.
        shares: (smallest, largest) that requests may choose; None where they have no choice.
        positions: numbering policy.
        seed: seed of strategies that draw at random.
        merged: how many of the kept tokens were merged from many and have no raster index of their own.
        merged_id: which index those stand for.
        stages: of strategies that drop tokens inside the decoder; empty for those that prune before it.
    """

    pruner: str
    keep: float
    kept: int
    counting: Counting = "fixed"
    fewest: int
    most: int
    shares: tuple[float, float] | None = None
    positions: PositionPolicy
    seed: int
    merged: int = Field(default=0, ge=0)
    merged_id: MergedId = MergedId.LAST_VISUAL
    stages: tuple[Stage, ...] = ()

    @property
    def left(self) -> int:
        """Visual tokens that are left at the end of the decoder."""
        return self.stages[-1].kept if self.stages else self.kept

    @property
    def mean_kept(self) -> float:
        """Visual tokens that a decoder layer sees, on average: what papers about dropping them inside it compare by."""
        if not self.stages:
            return float(self.kept)
        layers = sum(stage.layers for stage in self.stages)
        return sum(stage.kept * stage.layers for stage in self.stages) / layers

    @model_validator(mode="before")
    @classmethod
    def _fixed_unless_said(cls, given: Any) -> Any:
        """A fixed count is its own smallest and largest."""
        if isinstance(given, dict) and "kept" in given:
            return {"fewest": given["kept"], "most": given["kept"], **given}
        return given

    def fixed_at(self, kept: int, visual_tokens: int) -> Pruning:
        """The same with one count for all pictures."""
        changes = {
            "keep": kept / visual_tokens,
            "kept": kept,
            "fewest": kept,
            "most": kept,
            "counting": "fixed",
        }
        return self.model_copy(update=changes)


class FlopTerm(Stored):
    """A product in the formula of a graph's floating-point operations.

    Attributes:
        factor: of all extents that are numbers.
        dims: names of those that are not, one as often as it occurs.
    """

    factor: int
    dims: tuple[str, ...]


class Graph(Stored):
    """One ONNX file of the bundle.

    Attributes:
        file: its name.
        spec: what it takes and gives.
        operators: how many nodes of which operator it has.
        flops: terms of a sum, see `graph/cost.py`.
        weight_bytes: of all weights that it reads.
    """

    file: str
    spec: GraphSpec
    operators: dict[str, int]
    flops: tuple[FlopTerm, ...] = ()
    weight_bytes: int = 0


class Engine(Stored):
    """One serialized TensorRT or TensorRT-RTX engine.

    Attributes:
        file: path inside the bundle.
        target: the runtime it was built for.
        version: of the library that built it; engines load only in the same one.
        compute_capabilities: e.g. ("8.6", "8.9").
        graph_sha256: of the ONNX file it was built from.
    """

    file: str
    target: EngineTarget
    version: str
    compute_capabilities: tuple[str, ...]
    graph_sha256: str


class Manifest(Stored):
    """Everything a runtime needs, and where everything came from."""

    schema_version: int = SCHEMA_VERSION
    gap_export: str
    name: str
    family: str
    checkpoint: str
    """Folder or hub id the weights came from (`random` for random weights)."""
    precision: Precision
    model: ModelFacts
    pruning: Pruning
    capacity: int
    """Most slots of the cache: the longest prompt plus answer, in tokens that enter the decoder. Later stages need fewer
    (`Stage.capacity`)."""
    max_new_tokens: int
    preprocessing: AnyPreprocessing
    prompt: PromptTemplate
    box: BoxFormat
    text_tower: TextTower | None = None
    graphs: dict[str, Graph]
    engines: dict[EngineTarget, dict[str, Engine]] = Field(default_factory=dict)
    """target -> graph name -> engine."""
    gates: dict[str, float] = Field(default_factory=dict)
    files: dict[str, FileRecord] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)

    @property
    def capacities(self) -> tuple[int, ...]:
        """Cache slots of every stage; of the one there is, where pruning comes before the decoder."""
        return tuple(stage.capacity for stage in self.pruning.stages) or (self.capacity,)

    @property
    def capacity_dims(self) -> tuple[str, ...]:
        """Names of the dimensions that are the cache slots of every stage; empty where the cache is static."""
        decoder = self.graphs["decode" if self.pruning.stages else "decoder"].spec
        pasts = set(decoder.aliased.values())
        slots = [tensor.shape[_SLOT_AXIS] for tensor in decoder.inputs if tensor.name in pasts]
        return tuple(dict.fromkeys(dim.name for dim in slots if isinstance(dim, Dim)))

    def slots_for(self, needed: Sequence[int] | None = None) -> tuple[int, ...]:
        """Cache slots of every stage that a runtime lays out for a request: attention runs over all of them, filled or not.

        Args:
            needed: of every stage; None for all there are.

        Returns:
            What is needed, in steps of `SLOT_STEP`; where the cache is static, its capacity.
        """
        if needed is None or not self.capacity_dims:
            return self.capacities
        return tuple(
            min(in_slot_steps(slots), most) for slots, most in zip(needed, self.capacities, strict=True)
        )

    def lengths_of_stages(self, length: int) -> list[int]:
        """Tokens of a prompt of that length in every stage; of the one there is, where pruning comes before the decoder."""
        stages = self.pruning.stages
        return [length - (stages[0].kept - stage.kept) for stage in stages] or [length]

    def cache_slots(self, capacities: Sequence[int]) -> int:
        """Cache slots of all layers together.

        Args:
            capacities: of every stage.
        """
        layers = [stage.layers for stage in self.pruning.stages] or [self.model.layers]
        return sum(slots * count for slots, count in zip(capacities, layers, strict=True))


def in_slot_steps(slots: int) -> int:
    """The next multiple of `SLOT_STEP`."""
    return -(-slots // SLOT_STEP) * SLOT_STEP


class Bundle:
    """An opened bundle folder.

    Attributes:
        folder: where it lies.
        manifest: what is inside.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    def graph_path(self, name: str) -> Path:
        """Path of one ONNX graph."""
        return self.folder / self.manifest.graphs[name].file

    @property
    def tokenizer_path(self) -> Path:
        """Path of the tokenizer."""
        return self.folder / "tokenizer.json"

    @property
    def text_tokenizer_path(self) -> Path:
        """Path of the text tower's tokenizer, where there is one."""
        return self.folder / "text_tokenizer.json"

    @property
    def reports(self) -> Path:
        """Folder of the records that measuring commands leave behind; not part of the hashed content."""
        return self.folder / "reports"


def open_bundle(folder: Path, *, every_hash: bool = False) -> Bundle:
    """Read and verify a bundle.

    Args:
        folder: the bundle.
        every_hash: verify the hashes of large files too.

    Raises:
        BundleError: no bundle there, another schema, a damaged manifest, a file that does not match.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            "is not a bundle (no manifest.json)",
            subject=str(folder),
            hint="build one: gap-export build --help",
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BundleError(
            f"cannot be read: {where}: {first['msg']}",
            subject=str(path),
            hint="the bundle is damaged or was made by another version: build it again",
        ) from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise BundleError(
            f"has schema {manifest.schema_version}, this version reads {SCHEMA_VERSION}",
            subject=str(path),
            hint="build the bundle again with this version",
        )
    verify(folder, manifest.files, every_hash=every_hash)
    return Bundle(folder, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a bundle."""
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
