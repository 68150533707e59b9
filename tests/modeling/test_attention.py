"""Attention with an explicit mask over a cache in place: the operators in ONNX Runtime against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from gap_export.modeling.attention import (
    IMPLEMENTATION,
    SlotCache,
    attention_in_matmuls,
    onnx_attention,
    slot_mask,
)

BATCH, HEADS, KV_HEADS, CAPACITY, WIDTH = 2, 4, 2, 10, 8
Floats = NDArray[np.float32]


@given(
    starts=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    queries=st.integers(1, 6),
    capacity=st.integers(1, 30),
)
def test_slot_mask_is_causality_by_slot_per_row(starts: list[int], queries: int, capacity: int) -> None:
    mask = slot_mask(torch.tensor(starts), queries, capacity)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(starts), 1, queries, capacity)
    for row, start in enumerate(starts):
        for query in range(queries):
            allowed = [slot for slot in range(capacity) if mask[row, 0, query, slot]]
            assert allowed == [slot for slot in range(capacity) if slot <= start + query]


class _OneLayer(nn.Module):
    """What a decoder layer does between its projections."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        write_index: Tensor,
        past_key: Tensor,
        past_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cache = SlotCache((past_key, past_value), write_index)
        keys, values = cache.update(key, value, 0)
        mask = slot_mask(write_index, query.shape[2], past_key.shape[2])
        context, weights = onnx_attention(self, query, keys, values, mask, scaling=0.3)
        assert weights is None
        return (context, *cache.present)  # type: ignore[return-value]


Layer = Callable[..., tuple[Floats, Floats, Floats]]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    sequence = torch.export.Dim("sequence", min=1, max=CAPACITY)
    fresh, past = (BATCH, KV_HEADS, 3, WIDTH), (BATCH, KV_HEADS, CAPACITY, WIDTH)
    example = (
        torch.zeros(BATCH, HEADS, 3, WIDTH),
        torch.zeros(fresh),
        torch.zeros(fresh),
        torch.zeros(BATCH, dtype=torch.int64),
        torch.zeros(past),
        torch.zeros(past),
    )
    names = ["query", "key", "value", "write_index", "past_key", "past_value"]
    exported = torch.export.export(
        _OneLayer(),
        example,
        dynamic_shapes=({2: sequence}, {2: sequence}, {2: sequence}, {}, {}, {}),
        strict=False,
    )
    program = torch.onnx.export(
        exported, (), input_names=names, opset_version=24, dynamo=True, optimize=False, verbose=False
    )
    assert program is not None
    path = tmp_path_factory.mktemp("attention") / "layer.onnx"
    program.save(path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*inputs: Any) -> tuple[Floats, Floats, Floats]:
        context, key, value = session.run(None, dict(zip(names, inputs, strict=True)))
        return context, key, value

    return run


def attend(query_BHSD: Floats, keys: Floats, values: Floats, starts: list[int]) -> NDArray[np.float64]:
    """[B, S, H, D]: plain grouped-query attention, query by query, over the slots it may see."""
    batch, heads, queries, width = query_BHSD.shape
    out = np.zeros((batch, queries, heads, width))
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // keys.shape[1])
            for q in range(queries):
                visible = min(starts[b] + q + 1, keys.shape[2])
                k, v = (
                    keys[b, group, :visible].astype(np.float64),
                    values[b, group, :visible].astype(np.float64),
                )
                logits = 0.3 * (k @ query_BHSD[b, h, q].astype(np.float64))
                weights = np.exp(logits - logits.max())
                out[b, q, h] = (weights / weights.sum()) @ v
    return out


@given(data=st.data())
@settings(max_examples=25)
def test_one_call_writes_its_slots_and_looks_back(data: st.DataObject, layer: Layer) -> None:
    queries = data.draw(st.integers(1, 4))
    starts = data.draw(st.lists(st.integers(0, CAPACITY - queries), min_size=BATCH, max_size=BATCH))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))

    def normal(*shape: int) -> Floats:
        return rng.normal(size=shape).astype(np.float32)

    query = normal(BATCH, HEADS, queries, WIDTH)
    key, value = normal(BATCH, KV_HEADS, queries, WIDTH), normal(BATCH, KV_HEADS, queries, WIDTH)
    past_key, past_value = normal(BATCH, KV_HEADS, CAPACITY, WIDTH), normal(BATCH, KV_HEADS, CAPACITY, WIDTH)
    context, present_key, present_value = layer(query, key, value, np.array(starts), past_key, past_value)

    expected_key, expected_value = past_key.copy(), past_value.copy()
    for row, start in enumerate(starts):
        expected_key[row, :, start : start + queries] = key[row]
        expected_value[row, :, start : start + queries] = value[row]
    assert np.array_equal(present_key, expected_key)
    assert np.array_equal(present_value, expected_value)
    assert np.abs(context - attend(query, expected_key, expected_value, starts)).max() < 1e-5


def test_transformers_knows_the_seam() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    assert AttentionInterface()[IMPLEMENTATION] is onnx_attention
    assert AttentionMaskInterface()[IMPLEMENTATION](1, 2, 3) is None


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_plain_operators_is_the_same(masked: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None] if masked else None
    context, nothing = attention_in_matmuls(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    torch.testing.assert_close(context, expected.transpose(1, 2))
    assert nothing is None


def test_a_tower_below_a_loop_has_no_fused_attention(vision_operators: Any) -> None:
    """TensorRT-RTX 1.7 crashes, and takes the process with it, while it builds a graph with both."""
    assert "Attention" in vision_operators(pruner="cls_attention", keep="0.1:1.0")
    for keep in (0.25, "0.1:1.0"):
        looped = vision_operators(pruner="divprune", keep=keep)
        assert "Scan" in looped
        assert "Attention" not in looped


@pytest.fixture
def vision_operators(tiny_graph: Any) -> Any:
    """`vision_operators(...)`: operators of the tiny model's vision graph."""
    return lambda **changes: tiny_graph("vision", **changes).graph.operators
