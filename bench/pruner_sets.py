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
from gap_export.positions import PAD, MergedId, PositionPolicy
from gap_export.prune import order, reference

Arrays = dict[str, NDArray[np.float32]]

HEADS = 16
ALIGNED = 768
"""Width of the space that OpenAI's CLIP ViT-L shares with its text tower."""
TIE = 1e-6
"""A choice that float64 makes by less than this, float32 may make otherwise."""


def random_features(
    generator: np.random.Generator, grid: tuple[int, int], *, batch: int = 1, width: int = 1024
) -> Arrays:
    """What a tower's layers give, from which `features_of` computes: spread like a tower's, with tokens that resemble each other."""
    visual, heads, aligned = grid[0] * grid[1], min(HEADS, width // 4), min(ALIGNED, width)

    def normal(*shape: int) -> NDArray[np.float32]:
        return generator.normal(size=(batch, *shape)).astype(np.float32)

    # A few themes shared by many tokens: independent ones would all be at right angles in a space this wide.
    themes, weights = normal(12, width), normal(visual, 12)
    patches = np.einsum("bnt,bte->bne", weights, themes) / np.float32(2.0) + normal(visual, width)
    return {
        "patches_BNE": patches.astype(np.float32),
        "class_query_BAD": normal(heads, width // heads),
        "keys_BATD": normal(heads, visual + 1, width // heads),
        "class_token_BE": normal(width),
        "following_query_BE": normal(width),
        "following_keys_BTE": np.concatenate([normal(1, width), patches + normal(visual, width)], axis=1),
        "projected_BNH": (patches[:, :, ::-1] + normal(visual, width)).astype(np.float32),
        # As long as CLIP's: raw products of a patch with a text are of the order of ten.
        "aligned_BNP": patches[:, :, :aligned] + normal(visual, aligned),
        "text_BP": (themes[:, 0, :aligned] + normal(aligned)) / np.float32(8.0),
    }


SOURCES = {
    "patches": ("patches_BNE",),
    "class_attention": ("class_query_BAD", "keys_BATD"),
    "class_token": ("class_token_BE",),
    "mean_keys": ("keys_BATD",),
    "following_attention": ("following_query_BE", "following_keys_BTE"),
    "following_keys": ("following_keys_BTE",),
    "projected": ("projected_BNH",),
    "aligned": ("aligned_BNP",),
    "text": ("text_BP",),
}
"""Field of `prune.VisionFeatures` -> what it is computed from."""


def features_of(
    given: Mapping[str, Tensor],
    grid: tuple[int, int],
    *,
    aligned_inversely: bool = True,
    kind: type[prune.VisionFeatures[Tensor]] = prune.VisionFeatures,
) -> prune.VisionFeatures[Tensor]:
    """The features of a batch, as far as what they are computed from is given."""

    def field(name: str, compute: Callable[..., Tensor] = lambda tensor: tensor) -> partial[Tensor] | None:
        sources = [given[source] for source in SOURCES[name] if source in given]
        return partial(compute, *sources) if len(sources) == len(SOURCES[name]) else None

    return kind(
        patches=given["patches_BNE"],
        grid=grid,
        class_attention=field("class_attention", prune.class_attention),
        class_token=field("class_token"),
        mean_keys=field("mean_keys", prune.mean_keys),
        following_attention=field(
            "following_attention",
            lambda query_BE, keys_BTE: prune.class_attention(query_BE[:, None], keys_BTE[:, None]),
        ),
        following_keys=field("following_keys", lambda keys_BTE: keys_BTE[:, 1:].float()),
        projected=field("projected"),
        aligned=field("aligned"),
        text=field("text"),
        aligned_inversely=aligned_inversely,
    )


def features_in_float64(
    arrays: Arrays, row: int, grid: tuple[int, int], *, aligned_inversely: bool = True
) -> prune.VisionFeatures[reference.Floats]:
    """Those of one row as the twins of the pruners take them."""
    exact = {name: array[row].astype(np.float64) for name, array in arrays.items()}
    return prune.VisionFeatures(
        patches=exact["patches_BNE"],
        grid=grid,
        class_attention=reference.class_attention(exact["class_query_BAD"], exact["keys_BATD"]),
        class_token=exact["class_token_BE"],
        mean_keys=exact["keys_BATD"].mean(axis=0)[1:],
        following_attention=reference.class_attention(
            exact["following_query_BE"][None], exact["following_keys_BTE"][None]
        ),
        following_keys=exact["following_keys_BTE"][1:],
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
        features = features_of(given, graph.grid, aligned_inversely=graph.aligned_inversely)
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
def reads(pruner: str) -> tuple[str, ...]:
    """The features that a strategy reads or chooses from."""
    arrays = random_features(np.random.default_rng(0), (3, 4), width=16)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    watched = features_of(tensors, (3, 4), kind=_Watched)
    _Watched.looked_at.clear()
    prune.load(pruner).select(watched, 12, seed=0, merged_id=MergedId.LAST_VISUAL)
    read = {source for field in _Watched.looked_at & SOURCES.keys() for source in SOURCES[field]}
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
    model: Any = None
    session: Any = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The features among its inputs."""
        return reads(self.pruner)

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
    example = random_features(np.random.default_rng(0), graph.grid, batch=1, width=width)
    visual, batch = graph.grid[0] * graph.grid[1], Dim(name="batch", minimum=1, optimum=1, maximum=8)
    kept: int | Dim
    if graph.kept is None:
        kept = Dim(name="kept", minimum=prune.row(graph.pruner).min_tokens, optimum=7, maximum=visual)
    else:
        kept = graph.kept
    given = [float_spec(name, "float32", batch, *example[name].shape[1:]) for name in graph.reads]
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
        image = features_in_float64(arrays, row, graph.grid, aligned_inversely=graph.aligned_inversely)
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
