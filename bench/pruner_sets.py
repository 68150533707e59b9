"""Strategies as graphs of their own: random features in, the choice out, to be held against the float64 reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gap_export import prune
from gap_export.bundle.spec import Dim, GraphSpec, TensorSpec, float_spec, int64_spec
from gap_export.graph import passes
from gap_export.graph.trace_cache import Tracer
from gap_export.modeling.components import Component
from gap_export.modeling.received import received
from gap_export.modeling.text_embedding import with_text
from gap_export.positions import PAD, MergedId, PositionPolicy
from gap_export.prune import order, reference

Arrays = dict[str, NDArray[Any]]

HEADS = 16
ALIGNED = 768
"""Width of the space that OpenAI's CLIP ViT-L shares with its text tower."""
TOWERS = {"class_token": 0, "patches": 1, "groups": 4}
"""What scores tokens: a class token; or attention that patches receive from each other, of which a token is one, or four (a decoder then takes
no sum of what is before the projector). Text is read by CLIP's text tower beside a class token, and by the decoder's token embedding elsewhere.
-> patches of a token where there is no class token."""
WORDS, VOCABULARY = 6, 40
"""Most tokens of an expression, and how many there are, where the decoder's embedding reads it."""
TIE = 1e-6
"""A choice that float64 makes by less than this, float32 may make otherwise."""


def random_features(
    generator: np.random.Generator,
    grid: tuple[int, int],
    *,
    batch: int = 1,
    width: int = 1024,
    tower: str = "class_token",
) -> Arrays:
    """What a tower's layers give, from which `features_of` computes: spread like a tower's, with tokens that resemble each other."""
    visual, heads, aligned = grid[0] * grid[1], min(HEADS, width // 4), min(ALIGNED, width)

    def normal(*shape: int) -> NDArray[np.float32]:
        return generator.normal(size=(batch, *shape)).astype(np.float32)

    # A few themes shared by many tokens: independent ones would all be at right angles in a space this wide.
    themes, weights = normal(12, width), normal(visual, 12)
    patches = np.einsum("bnt,bte->bne", weights, themes) / np.float32(2.0) + normal(visual, width)
    arrays = {
        "patches_BNE": patches.astype(np.float32),
        "class_query_BAD": normal(heads, width // heads),
        "keys_BATD": normal(heads, visual + 1, width // heads),
        "class_token_BE": normal(width),
        "full_width_query_BE": normal(width),
        "full_width_keys_BTE": np.concatenate([normal(1, width), patches + normal(visual, width)], axis=1),
        "projected_BNH": (patches[:, :, ::-1] + normal(visual, width)).astype(np.float32),
        # As long as CLIP's: raw products of a patch with a text are of the order of ten.
        "aligned_BNP": patches[:, :, :aligned] + normal(visual, aligned),
        "text_BP": (themes[:, 0, :aligned] + normal(aligned)) / np.float32(8.0),
    }
    if TOWERS[tower]:
        of_tower = ("class", "keys", "full")
        arrays = {name: array for name, array in arrays.items() if not name.startswith(of_tower)}
        heads_of_patches = (heads, visual * TOWERS[tower], width // heads)
        # Some patches are looked at by all others. At full width, where the heads' products add up, no softmax may be all of one patch: the
        # scores of others would be 0 in float32 and not in float64, and their order lost.
        bias = normal(heads, 1, width // heads) / np.float32(2.0)
        arrays["query_BAPD"] = normal(*heads_of_patches) + bias
        arrays["patch_keys_BAPD"] = normal(*heads_of_patches) + bias * normal(1, heads_of_patches[1], 1)
        # Short beside a visual token, as embeddings are, and with a theme of the image in them.
        about = themes[:, :1, ::-1] / np.float32(2.0)
        (of_text,) = generator.spawn(1)  # sets are the same for pruners that read it and for others
        table_BVH = about + of_text.normal(size=(batch, VOCABULARY, width))
        arrays["table_BVH"] = (table_BVH / 50).astype(np.float32)
        words_BL = of_text.integers(0, VOCABULARY, (batch, WORDS))
        is_filled_BL = np.arange(WORDS) < of_text.integers(1, WORDS + 1, (batch, 1))
        arrays["text_ids_BL"] = np.where(is_filled_BL, words_BL, PAD)
    return arrays


SOURCES = {
    "patches": ("patches_BNE",),
    "attention": ("class_query_BAD", "keys_BATD"),
    "class_token": ("class_token_BE",),
    "mean_keys": ("keys_BATD",),
    "full_width_attention": ("full_width_query_BE", "full_width_keys_BTE"),
    "full_width_keys": ("full_width_keys_BTE",),
    "projected": ("projected_BNH",),
    "aligned": ("aligned_BNP",),
    "text": ("text_BP",),
}
"""Field of `prune.VisionFeatures` -> what it is computed from."""

RECEIVED = ("query_BAPD", "patch_keys_BAPD")
"""What attention and keys are computed from where there is no class token."""
EMBEDDED = ("table_BVH", "text_ids_BL")
"""What text is computed from there: the decoder's token embedding, another one for every image, and an expression."""

SOURCES_WITHOUT_CLASS_TOKEN = {
    **dict.fromkeys(("attention", "mean_keys", "full_width_attention", "full_width_keys"), RECEIVED),
    "projected": ("projected_BNH",),
    "embeds": ("projected_BNH",),
    "aligned": ("projected_BNH",),
    "text": EMBEDDED,
}


class _Table(nn.Module):
    """A token embedding that is given and not stored."""

    def __init__(self, table_BVH: Tensor) -> None:
        super().__init__()
        self._table_BVH = table_BVH

    def forward(self, ids_BL: Tensor) -> Tensor:
        """[B, L] -> [B, L, H]."""
        return order.take(self._table_BVH, ids_BL)


def features_of(
    given: Mapping[str, Tensor],
    grid: tuple[int, int],
    *,
    aligned_inversely: bool = True,
    tower: str = "class_token",
    kind: type[prune.VisionFeatures[Tensor]] = prune.VisionFeatures,
) -> prune.VisionFeatures[Tensor]:
    """The features of a batch, as far as what they are computed from is given."""

    def field(name: str, compute: Callable[..., Tensor] = lambda tensor: tensor) -> partial[Tensor] | None:
        sources = [given[source] for source in SOURCES[name] if source in given]
        return partial(compute, *sources) if len(sources) == len(SOURCES[name]) else None

    if TOWERS[tower]:
        features = kind(
            patches=given["patches_BNE"],
            grid=grid,
            projected=field("projected"),
            embeds=field("projected") if tower == "groups" else None,
            **(received(*(given[name] for name in RECEIVED), TOWERS[tower]) if RECEIVED[0] in given else {}),
        )
        table_BVH, text_ids_BL = (given.get(name) for name in EMBEDDED)
        return with_text(features, None if table_BVH is None else _Table(table_BVH), text_ids_BL)
    return kind(
        patches=given["patches_BNE"],
        grid=grid,
        attention=field("attention", prune.class_attention),
        class_token=field("class_token"),
        mean_keys=field("mean_keys", prune.mean_keys),
        full_width_attention=field(
            "full_width_attention",
            lambda query_BE, keys_BTE: prune.class_attention(query_BE[:, None], keys_BTE[:, None]),
        ),
        full_width_keys=field("full_width_keys", lambda keys_BTE: keys_BTE[:, 1:].float()),
        projected=field("projected"),
        aligned=field("aligned"),
        text=field("text"),
        aligned_inversely=aligned_inversely,
    )


def features_in_float64(
    arrays: Arrays,
    row: int,
    grid: tuple[int, int],
    *,
    aligned_inversely: bool = True,
    tower: str = "class_token",
) -> prune.VisionFeatures[reference.Floats]:
    """Those of one row as the twins of the pruners take them."""
    exact = {name: array[row].astype(np.float64) for name, array in arrays.items() if name != "text_ids_BL"}
    if TOWERS[tower]:
        query_APD, keys_APD = (exact[name] for name in RECEIVED)
        groups = (len(exact["patches_BNE"]), TOWERS[tower])
        whole_1PE, whole_keys_1PE = (np.concatenate(heads, axis=-1)[None] for heads in (query_APD, keys_APD))
        words_L = arrays["text_ids_BL"][row]
        mean_H = exact["table_BVH"][words_L[words_L != PAD]].mean(axis=0)
        projected_NH = exact["projected_BNH"]
        return prune.VisionFeatures(
            patches=exact["patches_BNE"],
            grid=grid,
            attention=reference.received_attention(query_APD, keys_APD).reshape(groups).mean(axis=1),
            mean_keys=keys_APD.mean(axis=0).reshape(*groups, -1).mean(axis=1),
            full_width_attention=reference.received_attention(whole_1PE, whole_keys_1PE)
            .reshape(groups)
            .sum(axis=1),
            full_width_keys=whole_keys_1PE[0].reshape(*groups, -1).mean(axis=1),
            projected=projected_NH,
            embeds=projected_NH if tower == "groups" else None,
            aligned=projected_NH / np.linalg.norm(projected_NH, axis=1, keepdims=True),
            text=mean_H / np.linalg.norm(mean_H),
            aligned_inversely=False,
        )
    return prune.VisionFeatures(
        patches=exact["patches_BNE"],
        grid=grid,
        attention=reference.class_attention(exact["class_query_BAD"], exact["keys_BATD"]),
        class_token=exact["class_token_BE"],
        mean_keys=exact["keys_BATD"].mean(axis=0)[1:],
        full_width_attention=reference.class_attention(
            exact["full_width_query_BE"][None], exact["full_width_keys_BTE"][None]
        ),
        full_width_keys=exact["full_width_keys_BTE"][1:],
        projected=exact["projected_BNH"],
        aligned=exact["aligned_BNP"],
        text=exact["text_BP"],
        aligned_inversely=aligned_inversely,
    )


class Selection(nn.Module):
    """A strategy and the decoder's order, as one module.

    Features and, where K is an input, 0 .. K - 1 -> features, indices and, where images differ, counts.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph, self._pruner = graph, prune.load(graph.pruner)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        graph = self._graph
        given = {"patches_BNE": tensors[0], **dict(zip(graph.reads, tensors, strict=False))}
        features = features_of(
            given, graph.grid, aligned_inversely=graph.aligned_inversely, tower=graph.tower
        )
        kept = tensors[-1].shape[0] if graph.kept is None else graph.kept
        if graph.adaptive:
            adaptive = prune.load_adaptive(graph.pruner)
            selected = adaptive.select_adaptive(features, kept, merged_id=graph.merged_id)
        else:
            selected = self._pruner.select(features, kept, seed=0, merged_id=graph.merged_id)
        selected = order.in_decoder_order(selected, PositionPolicy.GAP)
        tokens = selected.patches_BKE
        if tokens is None:
            tokens = order.take(given[source_of(graph.pruner)], selected.indices_BK)
        counts = () if selected.counts_B is None else (selected.counts_B,)
        return tokens, selected.indices_BK, *counts


def source_of(pruner: str) -> str:
    """The features that a strategy chooses from, where it does not make its own."""
    return "projected_BNH" if prune.row(pruner).reads_projected else "patches_BNE"


class _Watched(prune.VisionFeatures[Tensor]):
    """Features that remember which of them were looked at."""

    looked_at: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str) -> Any:
        _Watched.looked_at.add(name)
        return super().__getattribute__(name)


@functools.cache
def reads(pruner: str, tower: str) -> tuple[str, ...]:
    """The features that a strategy reads or chooses from."""
    arrays = random_features(np.random.default_rng(0), (3, 4), width=16, tower=tower)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    watched = features_of(tensors, (3, 4), tower=tower, kind=_Watched)
    _Watched.looked_at.clear()
    prune.load(pruner).select(watched, 12, seed=0, merged_id=MergedId.LAST_VISUAL)
    sources = SOURCES_WITHOUT_CLASS_TOKEN if TOWERS[tower] else SOURCES
    read = {source for field in _Watched.looked_at & sources.keys() for source in sources[field]}
    return tuple(name for name in arrays if name in read | {source_of(pruner)})


@dataclass
class Graph:
    """A strategy in ONNX Runtime.

    Attributes:
        kept: K, the bound where images differ; None where it is an input.
    """

    pruner: str
    kept: int | None
    grid: tuple[int, int]
    merged_id: MergedId = MergedId.LAST_VISUAL
    adaptive: bool = False
    aligned_inversely: bool = True
    tower: str = "class_token"
    model: Any = None
    session: Any = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The features among its inputs."""
        return reads(self.pruner, self.tower)

    @property
    def row(self) -> prune.Pruner:
        """Of the pruner, on this tower."""
        return prune.row(self.pruner).on_tower(("projected_class_token",) if TOWERS[self.tower] else ())

    def __call__(self, arrays: Arrays, kept: int | None = None) -> list[NDArray[Any]]:
        given: dict[str, Any] = {name: arrays[name] for name in self.reads}
        if kept is not None:
            given["keep_count"] = np.array(kept)
        outputs: list[NDArray[Any]] = self.session.run(None, given)
        return outputs


def graph(
    pruner: str,
    kept: int | None,
    grid: tuple[int, int],
    *,
    width: int = 1024,
    tracer: Tracer | None = None,
    **options: Any,
) -> Graph:
    """Export a strategy on its own, batch free, one thread; `kept=None` makes K an input as well."""
    made = Graph(pruner, kept, grid, **options)
    made.model = (tracer or Tracer(None))(_component(made, width)).model
    passes.simplify(made.model)
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = 1
    session_options.log_severity_level = 3
    made.session = ort.InferenceSession(ir.to_proto(made.model).SerializeToString(), session_options)
    return made


def _component(graph: Graph, width: int) -> Component:
    """The selection, ready to be traced."""
    example = random_features(np.random.default_rng(0), graph.grid, batch=1, width=width, tower=graph.tower)
    visual, batch = graph.grid[0] * graph.grid[1], Dim(name="batch", minimum=1, optimum=1, maximum=8)
    kept: int | Dim
    if graph.kept is None:
        kept = Dim(name="kept", minimum=graph.row.min_tokens, optimum=7, maximum=visual)
    else:
        kept = graph.kept
    given = [
        TensorSpec(name=name, dtype=example[name].dtype.name, shape=(batch, *example[name].shape[1:]))
        for name in graph.reads
    ]
    if isinstance(kept, Dim):
        given.append(TensorSpec(name="keep_count", dtype="int64", shape=(), extent_of=kept))
    chosen = example[source_of(graph.pruner)].shape[-1]
    outputs = [
        float_spec("visual_embeds", "float32", batch, kept, chosen),
        int64_spec("kept_indices", batch, kept),
        *([int64_spec("kept_counts", batch)] if graph.adaptive else []),
    ]
    return Component(
        module=Selection(graph).eval(),
        spec=GraphSpec(name="vision", inputs=tuple(given), outputs=tuple(outputs)),
        weight_key=str,
        settings=(
            graph.pruner,
            graph.kept,
            graph.grid,
            graph.merged_id,
            graph.adaptive,
            graph.aligned_inversely,
            graph.tower,
        ),
    )


def agrees(graph: Graph, arrays: Arrays, kept: int | None = None) -> list[str]:
    """Per row: `equal`, `tie` (float64 itself chose by less than `TIE`), or what is wrong."""
    outputs = graph(arrays, kept)
    source = arrays[source_of(graph.pruner)]
    extent = graph.kept if kept is None else kept
    assert extent is not None
    verdicts = []
    for row, (embeds_KE, indices_K) in enumerate(zip(*outputs[:2], strict=True)):
        image = features_in_float64(
            arrays, row, graph.grid, aligned_inversely=graph.aligned_inversely, tower=graph.tower
        )
        if graph.adaptive:
            choice = reference.choose_adaptive(graph.pruner, image, extent, merged_id=graph.merged_id)
            same_count = outputs[2][row] == choice.needed
        else:
            choice = reference.choose(graph.pruner, image, extent, seed=0, merged_id=graph.merged_id)
            same_count = True
        sort = np.argsort(choice.indices_K, kind="stable")
        padding = np.full(extent - len(sort), PAD)
        if not same_count or not np.array_equal(indices_K, [*choice.indices_K[sort], *padding]):
            verdicts.append("tie" if choice.margin < TIE else f"other tokens, margin {choice.margin:.1e}")
            continue
        tokens = source[row][indices_K] if choice.patches_KE is None else choice.patches_KE[sort]
        off = float(np.abs(embeds_KE[: len(sort)] - tokens).max() / np.abs(tokens).max())
        if (off > 1e-5 and choice.merge_margin >= TIE) or not np.isfinite(embeds_KE).all():
            verdicts.append(f"other features, {off:.1e} of the largest, margin {choice.merge_margin:.1e}")
        else:
            verdicts.append("equal")
    return verdicts
