"""Strategies as graphs of their own: random features in, the choice out, to be held against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gap_export import prune
from gap_export.graph import passes
from gap_export.graph.attention import OPSET
from gap_export.positions import MergedId, PositionPolicy
from gap_export.prune import order, reference

Arrays = dict[str, NDArray[np.float32]]

HEADS = 16
TIE = 1e-6
"""A choice that float64 makes by less than this, float32 may make otherwise."""


def random_features(
    generator: np.random.Generator, grid: tuple[int, int], *, batch: int = 1, width: int = 1024
) -> Arrays:
    """One feature set as tensors of `prune.VisionFeatures`: spread like a tower's, with tokens that resemble each other."""
    visual, heads = grid[0] * grid[1], min(HEADS, width // 4)

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
    }


def seen(arrays: Arrays, row: int, grid: tuple[int, int]) -> reference.Seen:
    """One row as the reference wants it."""
    exact = {name: array[row].astype(np.float64) for name, array in arrays.items()}
    return reference.Seen(
        patches_NE=exact["patches_BNE"],
        grid=grid,
        attention_N=reference.class_attention(exact["class_query_BAD"], exact["keys_BATD"]),
        class_token_E=exact["class_token_BE"],
        keys_ND=exact["keys_BATD"].mean(axis=0)[1:],
        following_query_E=exact["following_query_BE"],
        following_keys_TE=exact["following_keys_BTE"],
        projected_NH=exact["projected_BNH"],
    )


class Selection(nn.Module):
    """A strategy and the decoder's order, as one module: the features by position -> features, indices."""

    def __init__(self, pruner: str, kept: int, grid: tuple[int, int], merged_id: MergedId) -> None:
        super().__init__()
        self._pruner, self._kept, self._grid, self._merged_id = prune.load(pruner), kept, grid, merged_id
        self._source = "projected_BNH" if prune.strategy(pruner).reads_projected else "patches_BNE"

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        names = [field.name for field in fields(prune.VisionFeatures) if field.name != "grid"]
        given = dict(zip(names, tensors, strict=True))
        features = prune.VisionFeatures(grid=self._grid, **given)
        selected = self._pruner.select(features, self._kept, seed=0, merged_id=self._merged_id)
        selected = order.in_decoder_order(selected, PositionPolicy.GAP)
        tokens = selected.patches_BKE
        return (
            order.take(given[self._source], selected.indices_BK) if tokens is None else tokens,
            selected.indices_BK,
        )


@dataclass
class Graph:
    """A strategy in ONNX Runtime."""

    pruner: str
    kept: int
    grid: tuple[int, int]
    merged_id: MergedId
    model: ir.Model
    session: Any

    def __call__(self, arrays: Arrays) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        wanted = {value.name for value in self.session.get_inputs()}
        embeds, kept = self.session.run(
            None, {name: array for name, array in arrays.items() if name in wanted}
        )
        return embeds, kept


def graph(
    pruner: str,
    kept: int,
    grid: tuple[int, int],
    *,
    width: int = 1024,
    merged_id: MergedId = MergedId.LAST_VISUAL,
) -> Graph:
    """Export a strategy on its own, batch free, one thread."""
    example = random_features(np.random.default_rng(0), grid, batch=2, width=width)
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(
        Selection(pruner, kept, grid, merged_id).eval(),
        tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in example.values()),
        dynamic_shapes=(tuple({0: batch} for _ in example),),
        strict=False,
    )
    program = torch.onnx.export(
        exported,
        (),
        input_names=list(example),
        output_names=["visual_embeds", "kept_indices"],
        opset_version=OPSET,
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    passes.simplify(program.model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(program.model).SerializeToString(), options)
    return Graph(pruner, kept, grid, merged_id, program.model, session)


def agrees(graph: Graph, arrays: Arrays) -> list[str]:
    """Per row: `equal`, `tie` (float64 itself chose by less than `TIE`), or what is wrong."""
    embeds_BKH, kept_BK = graph(arrays)
    source = arrays["projected_BNH" if prune.strategy(graph.pruner).reads_projected else "patches_BNE"]
    verdicts = []
    for row, kept_K in enumerate(kept_BK):
        choice = reference.choose(
            graph.pruner, seen(arrays, row, graph.grid), graph.kept, seed=0, merged_id=graph.merged_id
        )
        sort = np.argsort(choice.indices_K, kind="stable")
        if not np.array_equal(kept_K, choice.indices_K[sort]):
            verdicts.append("tie" if choice.margin < TIE else f"other tokens, margin {choice.margin:.1e}")
            continue
        tokens = source[row][kept_K] if choice.patches_KE is None else choice.patches_KE[sort]
        off = float(np.abs(embeds_BKH[row] - tokens).max() / np.abs(tokens).max())
        if off > 1e-5 and choice.merge_margin >= TIE:
            verdicts.append(f"other features, {off:.1e} of the largest, margin {choice.merge_margin:.1e}")
        else:
            verdicts.append("equal")
    return verdicts
