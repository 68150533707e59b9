"""Sizes, aliases and wire formats."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.bundle.spec import Dim, DType, GraphSpec, TensorSpec
from gap_export.engine.buffers import empty_wire, from_wire, plan_buffers, size_of, to_wire

BATCH = Dim(name="batch", minimum=1, optimum=1, maximum=3)
SEQUENCE = Dim(name="sequence", minimum=1, optimum=8, maximum=20)


def spec(layers: int, capacity: int, dtype: DType) -> GraphSpec:
    shape = (BATCH, 2, capacity, 16)
    past = [TensorSpec(name=f"past.{layer}.key", dtype=dtype, shape=shape) for layer in range(layers)]
    present = [TensorSpec(name=f"present.{layer}.key", dtype=dtype, shape=shape) for layer in range(layers)]
    return GraphSpec(
        name="decoder",
        inputs=(
            TensorSpec(name="inputs_embeds", dtype=dtype, shape=(BATCH, SEQUENCE, 32)),
            TensorSpec(name="position_ids", dtype="int64", shape=(BATCH, SEQUENCE)),
            *past,
        ),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(BATCH, 40)), *present),
        aliased={out.name: into.name for out, into in zip(present, past, strict=True)},
    )


@given(st.integers(1, 40), st.integers(1, 4096), st.sampled_from(["float16", "bfloat16", "float32"]))
def test_the_cache_is_counted_once(layers: int, capacity: int, dtype: DType) -> None:
    width = 4 if dtype == "float32" else 2
    plan = plan_buffers(spec(layers, capacity, dtype), travelling=("inputs_embeds",))
    assert plan.total == layers * 3 * 2 * capacity * 16 * width + 3 * 20 * 8 + 3 * 40 * 4
    for layer in range(layers):
        assert (
            plan.buffer_of[f"present.{layer}.key"]
            == plan.buffer_of[f"past.{layer}.key"]
            == f"past.{layer}.key"
        )


def test_travelling_tensors_bring_their_own_memory() -> None:
    alone = plan_buffers(spec(1, 8, "float16"))
    assert alone.nbytes["inputs_embeds"] == 3 * 20 * 32 * 2
    assert "inputs_embeds" not in plan_buffers(spec(1, 8, "float16"), travelling=("inputs_embeds",)).buffer_of


def test_distinct_tensors_have_distinct_buffers() -> None:
    plan = plan_buffers(spec(2, 8, "float16"))
    assert set(plan.nbytes) == {"inputs_embeds", "position_ids", "past.0.key", "past.1.key", "logits"}


@pytest.mark.parametrize(
    ("dtype", "width"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("int64", 8), ("bool", 1)]
)
def test_size_of(dtype: DType, width: int) -> None:
    assert size_of(dtype, (3, 5)) == 15 * width
    assert empty_wire(dtype, (3, 5)).nbytes == 15 * width


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bfloat16_rounds_as_ml_dtypes_does(values: list[float]) -> None:
    array = np.asarray(values, np.float32)
    wire = to_wire(array, "bfloat16")
    expected = array.astype(ml_dtypes.bfloat16)
    finite = ~np.isnan(array)
    np.testing.assert_array_equal(wire[finite], expected.view(np.uint16)[finite])
    back = from_wire(wire, "bfloat16")
    np.testing.assert_array_equal(back[finite], expected.astype(np.float32)[finite])
    assert np.isnan(back[~finite]).all()


def test_halves_come_back_as_float32_and_integers_as_they_are() -> None:
    assert from_wire(to_wire(np.ones(3), "float16"), "float16").dtype == np.float32
    ids = np.arange(3, dtype=np.int32)
    assert to_wire(ids, "int64").dtype == np.int64
    assert from_wire(ids.astype(np.int64), "int64").dtype == np.int64


def test_wire_arrays_are_contiguous_and_not_copied_needlessly() -> None:
    array = np.zeros((4, 6), np.float32)
    assert to_wire(array, "float32") is array
    strided = to_wire(array[:, ::2], "float32")
    assert strided.flags.c_contiguous
    assert strided.nbytes == 4 * math.prod(strided.shape)
