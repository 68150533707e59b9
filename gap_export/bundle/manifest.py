"""The bundle: one folder with plain ONNX graphs, weights, tokenizer and a manifest that explains them.

Everything a runtime needs to turn an image and an expression into a box stands in `manifest.json`; neither torch nor
transformers is needed to read it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gap_export.boxes.codecs import CODECS, Frame, box_codec
from gap_export.bundle.cache_layout import CacheLayout, CacheRun
from gap_export.bundle.hashes import FileRecord
from gap_export.bundle.spec import Dim, GraphSpec
from gap_export.errors import GapExportError, InputError
from gap_export.inputs.chat.format import ChatFormat
from gap_export.inputs.layouts import ImageLayout, Layout, TokenRange
from gap_export.inputs.prompt import PromptTemplate, TextTower
from gap_export.positions import AttentionMask, MergedId, PositionPolicy
from gap_export.precision import Thresholds, known
from gap_export.recipe.recipe import Recipe
from gap_export.records import Record

SCHEMA_VERSION = 6
"""Raised once for every change of what a manifest says; bundles of another number are built again."""
_SLOT_AXIS = 2

EngineTarget = Literal["tensorrt-rtx", "tensorrt"]
VisionFeature = Literal["attention", "projected_class_token"]
"""What a pruner may ask of a vision tower: attention, of its class token or of all patches, with the keys; a class token that the
decoder can take."""


class BoxFormat(Record):
    """How the model writes a box, and in which frame.

    Attributes:
        codec: name in `boxes.codecs.CODECS`.
        frame: `padded_square` (0..1 of the padded square) or `image` (of the original width and height).
    """

    codec: str
    frame: Frame

    def written_as(
        self,
        name: str | None,
        layout: ImageLayout | None = None,
        *,
        error: type[GapExportError] = InputError,
    ) -> BoxFormat:
        """The format of the same model where it writes boxes in another way.

        What the numbers are of stays, for it is what the model was shown. Pixels are of what it sees as one grid of pixels: the layout
        tells what that is, and where it is none (tiles, a part of the image) no box can be read from them.

        Args:
            name: of a codec; None changes nothing.
            layout: of the model's images; None where it is not known, as for answers from a file.
            error: what is raised where name and layout do not go together.

        Raises:
            InputError: there is no codec of that name.
            GapExportError: of the type `error`: the codec writes pixels, and the layout makes no one grid of them.
        """
        if name is None:
            return self
        codec = box_codec(name)
        frame = self.frame if layout is None or not codec.pixels else layout.pixels_of
        if frame is None:
            raise error(
                "is in pixels of the image as the model sees it, and this one sees tiles or a part of it",
                subject=f"box format {name}",
                hint=f"use one that is not: {', '.join(row.name for row in CODECS.values() if not row.pixels)}",
            )
        return BoxFormat(codec=name, frame=frame)


class ModelSpec(Record):
    """Sizes of the exported model."""

    hidden_size: int
    """H, width of the decoder."""
    deepstack_levels: int = 0
    """Further features of every visual token, H wide each, that are added between the first layers (DeepStack). They travel
    with the embedding: in the graphs it is (1 + deepstack_levels) * H wide, and text has zeros there."""
    layers: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    visual_tokens: int
    """N; of the largest image, where images differ."""
    grid: tuple[int, int] | None
    """(rows, columns) of the visual tokens; None where images differ."""
    token_range: TokenRange | None = None
    """Where images differ in how many visual tokens they have."""
    position_rows: Literal[1, 3] = 1
    """Rows of position ids: 3 for M-RoPE (time, height, width)."""
    attention_mask: AttentionMask = "causal"
    """Which tokens see which, by slot. Where that depends on the images, splice gives and the decoder takes `image_slots`."""
    max_positions: int
    scaled_beyond: int | None = None
    """Where frequencies of the rotation follow the length of what is read: from which position on."""
    missing_features: tuple[VisionFeature, ...] = ()
    """What a pruner may ask for and this tower does not have."""
    published_tower: str | None = None
    """Hub id of the published checkpoint whose vision tower has the same sizes, where there is one."""

    @property
    def reads_image_slots(self) -> bool:
        """Whether the attention mask depends on where the images are."""
        return self.attention_mask != "causal"

    @property
    def embedding_width(self) -> int:
        """Width of what enters the decoder."""
        return self.hidden_size * (1 + self.deepstack_levels)


KeepMode = Literal["fixed", "ratio", "dynamic", "adaptive", "bounded"]
"""Who says how many visual tokens an image keeps: the build; the build, as a share of what the image has; each request; what the image
shows, up to a count; or what it shows, up to a share of what it has."""


class Stage(Record):
    """A run of decoder layers that see the same tokens. Stage 0 sees every visual token, each later one fewer.

    Attributes:
        first_layer: the layer it begins with.
        layers: how many it has.
        kept: visual tokens that its layers see of an image, merged ones included; of a typical one and the default share, where counts are told
            (`Pruning.stage_counts_are_told`).
        max_kept: of the largest image and share; left out, the same.
        merged: how many of them were merged from several as the stage began. Each has the raster index of one of those.
        capacity: cache slots of its layers.
    """

    first_layer: int = Field(ge=0)
    layers: int = Field(ge=1)
    kept: int = Field(ge=1)
    max_kept: int = Field(default_factory=lambda given: int(given["kept"]))
    merged: int = Field(default=0, ge=0)
    capacity: int = Field(ge=1)

    @property
    def run(self) -> range:
        """Its layers."""
        return range(self.first_layer, self.first_layer + self.layers)


class Pruning(Record):
    """What is pruned and how survivors are numbered.

    Attributes:
        pruner: its name.
        keep: fraction of visual tokens kept, in (0, 1]: the default where requests choose, the bound where images do; what
            is left after the last stage, where there are stages.
        kept: how many enter the decoder: the count that `keep` gives, or all of them, where tokens are dropped inside it.
        keep_mode: who says how many.
        min_tokens: smallest count; left out, the only one.
        max_tokens: largest count; the capacity of cache and engines. Left out, the only one.
        keep_range: (smallest, largest) fraction that requests may choose; None where they have no choice.
        pruner_min_tokens: smallest number of tokens that the pruner can keep of an image.
        positions: numbering policy.
        seed: seed of pruners that draw at random.
        merged: how many of the kept tokens were merged from many and have no raster index of their own.
        merged_id: which index those stand for.
        stages: of pruners that drop tokens inside the decoder; empty for those that prune before it.
    """

    pruner: str
    keep: float
    kept: int
    keep_mode: KeepMode = "fixed"
    min_tokens: int = Field(default_factory=lambda given: int(given["kept"]))
    max_tokens: int = Field(default_factory=lambda given: int(given["kept"]))
    keep_range: tuple[float, float] | None = None
    pruner_min_tokens: int = Field(default=1, ge=1)
    positions: PositionPolicy
    seed: int
    merged: int = Field(default=0, ge=0)
    merged_id: MergedId = MergedId.LAST_VISUAL
    stages: tuple[Stage, ...] = ()

    @property
    def kept_after_last_stage(self) -> int:
        """Visual tokens that are left at the end of the decoder."""
        return self.stages[-1].kept if self.stages else self.kept

    @property
    def mean_kept(self) -> float:
        """Visual tokens that a decoder layer sees, on average: what papers about dropping them inside it compare by. Of a typical image."""
        if not self.stages:
            return float(self.kept)
        layers = sum(stage.layers for stage in self.stages)
        return sum(stage.kept * stage.layers for stage in self.stages) / layers

    @property
    def count_is_given(self) -> bool:
        """Whether every call of the vision graph is told how many tokens to keep: of images of one size that are pruned later, it keeps all."""
        return self.keep_mode in ("dynamic", "ratio", "bounded") and not self.enters_whole

    @property
    def finds_count(self) -> bool:
        """Whether the vision graph finds how many tokens an image needs."""
        return self.keep_mode in ("adaptive", "bounded")

    @property
    def enters_whole(self) -> bool:
        """Whether as many tokens of every image enter the decoder, which drops them itself."""
        return bool(self.stages) and self.min_tokens == self.max_tokens

    @property
    def stage_counts_are_told(self) -> bool:
        """Whether every prompt comes with how many tokens of each of its images every later stage has."""
        return bool(self.stages) and self.keep_mode != "fixed"

    def cache_layout(self, layers: int, capacity: int, *, static: bool) -> CacheLayout:
        """The cache of a decoder with this pruning: a run of layers for every stage, or one.

        Args:
            layers: of the decoder.
            capacity: slots of the layers that see every token.
            static: whether a cache always has all its slots.
        """
        told = self.stage_counts_are_told
        runs = tuple(
            CacheRun(stage.layers, stage.capacity, 0 if told else self.stages[0].kept - stage.kept)
            for stage in self.stages
        )
        return CacheLayout(runs or (CacheRun(layers, capacity),), static)


class FlopTerm(Record):
    """A product in the formula of a graph's floating-point operations.

    Attributes:
        factor: of all extents that are numbers.
        dims: names of those that are not, one as often as it occurs.
    """

    factor: int
    dims: tuple[str, ...]


class Graph(Record):
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


class Engine(Record):
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


class Manifest(Record):
    """Everything a runtime needs, and where everything came from.

    `Bundle.reports` holds records of measurements; they are no part of the bundle and stand in no field here.
    """

    schema_version: int = SCHEMA_VERSION
    gap_export: str
    name: str
    family: str
    checkpoint: str
    """Folder or hub id the weights came from (`random` for random weights)."""
    precision: Annotated[str, AfterValidator(known)]
    spec: ModelSpec
    """Sizes of the model."""
    pruning: Pruning
    capacity: int
    """Most slots of the cache: the longest prompt plus answer, in tokens that enter the decoder. Later stages need fewer
    (`Stage.capacity`)."""
    max_new_tokens: int
    layout: Layout
    """How an image becomes what the vision graph takes."""
    prompt: PromptTemplate
    chat: ChatFormat | None = None
    """How free questions become prompts, by the template that lies beside the manifest; None where they cannot be asked."""
    box: BoxFormat
    text_tower: TextTower | None = None
    graphs: dict[str, Graph]
    engines: dict[EngineTarget, dict[str, Engine]] = Field(default_factory=dict)
    """target -> graph name -> engine."""
    gates: Thresholds = Field(default_factory=Thresholds)
    """What `validate` requires: those of the recipe, or those of its precision."""
    files: dict[str, FileRecord] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    recipe: Recipe
    """What it was built from, with everything that was left out filled in."""

    @property
    def cache_layout(self) -> CacheLayout:
        """Of the decoder."""
        decoder = self.graphs["decode" if self.pruning.stages else "decoder"].spec
        pasts = set(decoder.aliased.values())
        slots = [tensor.shape[_SLOT_AXIS] for tensor in decoder.inputs if tensor.name in pasts]
        static = not any(isinstance(dim, Dim) for dim in slots)
        return self.pruning.cache_layout(self.spec.layers, self.capacity, static=static)
