"""Rows are computed where they are asked for: the same numbers, fewer of them, and nothing moved that others read."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gap_export.graph.passes import simplify
from gap_export.graph.rows import select_rows_early
from gap_export.modeling.attention import OPSET, onnx_attention
from tests.exported import GraphExporter

HEADS, HEAD, CAPACITY, ROWS = 2, 4, 9, 7
WIDTH = HEADS * HEAD


class Layer(nn.Module):
    """A transformer layer, a choice of its rows after it, and whatever a test adds.

    Args:
        skip: rows left out before they are counted, as a class token is.
        also: reads all rows of the result too.
        computed: rows are found by looking at the tokens.
        masked: attention has a mask with a row per query.
    """

    def __init__(
        self, *, skip: int = 0, also: bool = False, computed: bool = False, masked: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self._skip, self._also, self._computed, self._masked = skip, also, computed, masked

    def forward(self, x_BSH: Tensor, rows_BK: Tensor, mask_B1SS: Tensor) -> tuple[Tensor, ...]:
        query, key, value = (
            part(x_BSH).view(*x_BSH.shape[:2], HEADS, HEAD).transpose(1, 2) for part in self.qkv
        )
        context, _ = onnx_attention(self, query, key, value, mask_B1SS if self._masked else None)
        hidden = x_BSH + self.out(context.reshape(*x_BSH.shape))
        hidden = hidden + self.down(nn.functional.silu(self.up(self.norm(hidden))))
        if self._computed:
            rows_BK = x_BSH.sum(-1)[:, self._skip :].topk(rows_BK.shape[1], dim=1).indices
        chosen = hidden[:, self._skip :].gather(1, rows_BK[..., None].expand(-1, -1, WIDTH))
        return (chosen, hidden.sum(1)) if self._also else (chosen,)


@functools.cache
def traced(**options: Any) -> tuple[ir.Model, ir.Model]:
    """The graph of a layer, with its rows moved and without."""
    models = []
    for moved in (True, False):
        example = (
            torch.zeros(2, ROWS, WIDTH),
            torch.zeros(2, 3, dtype=torch.int64),
            torch.ones(2, 1, ROWS, ROWS, dtype=torch.bool),
        )
        program = torch.onnx.export(
            Layer(**options).eval(), example, opset_version=OPSET, dynamo=True, optimize=False, verbose=False
        )
        assert program is not None
        with pytest.MonkeyPatch.context() as patch:
            if not moved:
                patch.setattr("gap_export.graph.passes.select_rows_early", lambda model: None)
            simplify(program.model)
        models.append(program.model)
    return models[0], models[1]


def outcome(model: ir.Model, **feeds: Any) -> list[Any]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    given = {tensor.name: value for tensor, value in zip(session.get_inputs(), feeds.values(), strict=True)}
    return session.run(None, given)  # type: ignore[no-any-return]


def rows_of_products(model: ir.Model) -> list[Any]:
    """Rows of every product of rows with weights."""
    return [
        node.inputs[0].shape[1]
        for node in model.graph
        if node.op_type == "MatMul" and node.inputs[0] is not None and node.inputs[0].shape is not None
    ]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), skip=st.integers(0, 2), masked=st.booleans(), computed=st.booleans())
@pytest.mark.slow
def test_the_numbers_are_the_same(seed: int, skip: int, masked: bool, computed: bool) -> None:
    moved, plain = traced(skip=skip, masked=masked, computed=computed)
    rng = np.random.default_rng(seed)
    mask = rng.random((2, 1, ROWS, ROWS)) < 0.6
    mask[..., 0] = True
    feeds = {
        "x_BSH": rng.standard_normal((2, ROWS, WIDTH)).astype(np.float32),
        "rows_BK": rng.integers(0, ROWS - skip, (2, 3)),
        "mask_B1SS": mask,
    }
    for one, other in zip(outcome(moved, **feeds), outcome(plain, **feeds), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_only_keys_and_values_are_computed_for_all_rows() -> None:
    moved, plain = traced(skip=1)
    assert sorted(rows_of_products(plain)) == [ROWS] * 6
    assert sorted(rows_of_products(moved)) == [3] * 4 + [ROWS] * 2


def test_nothing_moves_where_somebody_reads_all_rows() -> None:
    moved, plain = traced(also=True)
    assert rows_of_products(moved) == rows_of_products(plain)


def test_a_mask_is_not_chosen_from_by_what_the_tokens_say() -> None:
    moved, _ = traced(computed=True)
    masks = [node.inputs[3] for node in moved.graph if node.op_type == "Attention"]
    assert masks[0] is not None
    assert masks[0].is_graph_input()
    assert sorted(rows_of_products(moved)) == [3] * 3 + [ROWS] * 3, (
        "what comes after attention is moved still"
    )


def test_a_choice_of_single_numbers_is_left_alone() -> None:
    class Picks(nn.Module):
        def forward(self, x_BSH: Tensor, index_BKH: Tensor) -> Tensor:
            return (x_BSH @ torch.eye(WIDTH)).gather(1, index_BKH)

    example = (torch.zeros(2, ROWS, WIDTH), torch.zeros(2, 3, WIDTH, dtype=torch.int64))
    program = torch.onnx.export(
        Picks(), example, opset_version=OPSET, dynamo=True, optimize=False, verbose=False
    )
    assert program is not None
    before = [node.op_type for node in program.model.graph]
    select_rows_early(program.model)
    assert [node.op_type for node in program.model.graph] == before


def test_the_last_layer_of_a_decoder_and_of_a_tower(tiny_graph: GraphExporter) -> None:
    """One row of the decoder, kept patches of the tower."""
    decoder = tiny_graph("decoder")
    model = onnx.load(decoder.path, load_external_data=False)
    names = {name for node in model.graph.node if node.op_type == "Attention" for name in node.input[:1]}
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.value_info
    }
    queries = [shapes[name][2] for name in names]
    layers = decoder.model.spec.layers
    assert sorted(queries, key=str) == [1, *["sequence"] * (layers - 1)]


def test_a_sum_with_something_of_unknown_rank_stops_the_choice() -> None:
    """It may have a row for every token."""

    class Scaled(nn.Module):
        def forward(self, x_BSH: Tensor, rows_BK: Tensor) -> Tensor:
            hidden = (x_BSH @ torch.eye(WIDTH)) * x_BSH.mean(-1, keepdim=True)
            return hidden.gather(1, rows_BK[..., None].expand(-1, -1, WIDTH))

    example = (torch.zeros(2, ROWS, WIDTH), torch.zeros(2, 3, dtype=torch.int64))
    program = torch.onnx.export(
        Scaled().eval(), example, opset_version=OPSET, dynamo=True, optimize=False, verbose=False
    )
    assert program is not None
    for node in program.model.graph:
        if node.op_type == "ReduceMean":
            node.outputs[0].shape = None
    before = [node.op_type for node in program.model.graph]
    select_rows_early(program.model)
    assert [node.op_type for node in program.model.graph] == before
