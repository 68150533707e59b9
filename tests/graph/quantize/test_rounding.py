"""Floats to few bits: against exact rounding, against every number a format has, and packing against onnx."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

from gap_export.graph.quantize import fp8, int4, int8, int8_blocks, int8_fine, nvfp4, uint4
from gap_export.graph.quantize.int4 import BLOCK
from gap_export.graph.quantize.int8 import WEIGHT_MAX
from gap_export.graph.quantize.rounding import packed_pairs
from gap_export.graph.quantize.scheme import Weight
from gap_export.precision import FP16, FP32, Activations

E4M3 = np.unique(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64))
E4M3 = E4M3[np.isfinite(E4M3)]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([-E2M1[:0:-1], E2M1])


def whole(rows: Any, activations: Activations = FP32) -> Weight:
    """The weight that has these rows and no others."""
    return Weight(*rows.shape, activations, lambda: float(np.abs(rows).max()))


weights = arrays(np.float32, (4, 2 * BLOCK), elements=st.floats(-8, 8, width=32))


@given(weights)
def test_int8_is_nearest(rows: Any) -> None:
    numbers, scales, sums = int8.encode(rows, whole(rows))
    assert np.abs(numbers).max() <= WEIGHT_MAX
    assert (np.abs(numbers * scales[:, None] - rows) <= scales[:, None] * 0.5001 + 1e-30).all()
    # What the middle of the activations is multiplied with: the numbers' own sums, and not those of the weights they were.
    np.testing.assert_allclose(sums, (numbers.astype(np.float64) * scales[:, None]).sum(axis=1), rtol=1e-6)


@given(weights)
def test_int8_fine_is_nearest_and_uses_all_its_numbers(rows: Any) -> None:
    numbers, scales = int8_fine.encode(rows, whole(rows))
    assert (np.abs(numbers * scales[:, None] - rows) <= scales[:, None] * 0.5001 + 1e-30).all()
    largest = np.abs(rows).max(axis=1)
    assert (np.abs(numbers).max(axis=1) == np.where(largest > 1e-36, 127, np.abs(numbers).max(axis=1))).all()


@given(weights, st.sampled_from([FP32, FP16]))
def test_int8_blocks_are_nearest_block_by_block(rows: Any, activations: Activations) -> None:
    numbers, scales = int8_blocks.encode(rows, whole(rows, activations))
    assert (scales.astype(activations.dtype) == scales).all()
    blocks, steps = rows.reshape(4, 2, BLOCK), scales[..., None]
    restored = numbers.reshape(4, 2, BLOCK).astype(np.float64) * steps
    # A scale rounded to half precision cuts the extreme off by what it is too small.
    rounding = np.float64(np.finfo(activations.dtype).eps) * np.abs(blocks) + np.finfo(activations.dtype).tiny
    assert (np.abs(restored - blocks) <= steps * 0.5001 + rounding * 127).all()


@given(weights, st.sampled_from([FP32, FP16]))
def test_uint4_is_within_a_step_of_its_block(rows: Any, activations: Activations) -> None:
    """Half a step, and as much again where zero point and number are rounded the same way at either end of the block."""
    numbers, scales, zeros = uint4.encode(rows, whole(rows, activations))
    assert numbers.dtype == zeros.dtype == np.uint8
    assert max(numbers.max(), zeros.max()) <= 15
    assert (scales.astype(activations.dtype) == scales).all()
    assert (scales > 0).all()
    blocks = rows.reshape(4, 2, BLOCK).astype(np.float64)
    steps, middles = (each[..., None].astype(np.float64) for each in (scales, zeros))
    restored = (numbers.reshape(blocks.shape) - middles) * steps
    rounding = 16 * np.finfo(activations.dtype).eps * np.abs(blocks).max(axis=2, keepdims=True)
    assert (np.abs(restored - blocks) <= steps * 1.001 + rounding + np.finfo(activations.dtype).tiny).all()
    inside = (restored > -middles * steps) & (restored < (15 - middles) * steps)
    assert (
        np.abs(restored - blocks)[inside] <= (np.broadcast_to(steps, blocks.shape) * 0.501 + 1e-30)[inside]
    ).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_uint4_blocks_on_one_side_of_zero_use_all_sixteen_numbers(sign: int) -> None:
    rows = (sign * np.linspace(0, 3, BLOCK, dtype=np.float32))[None]
    numbers, scales, zeros = uint4.encode(rows, whole(rows))
    assert np.unique(numbers).tolist() == list(range(16))
    assert zeros.item() == (0 if sign > 0 else 15)
    assert scales.item() == np.float32(3 / 15)


@given(weights)
def test_zero_is_zero_in_uint4(rows: Any) -> None:
    rows[:, ::3] = 0
    numbers, _, zeros = uint4.encode(rows, whole(rows))
    np.testing.assert_array_equal(numbers[rows == 0], np.repeat(zeros, BLOCK, axis=1)[rows == 0])


@pytest.mark.parametrize("extreme", [WEIGHT_MAX, -WEIGHT_MAX])
@pytest.mark.parametrize("activation", [255, int8_fine.ZERO + int8_fine.PIECE_MAX])
def test_products_of_extremes_are_not_cut_off(activation: int, extreme: int) -> None:
    """Those of pieces of seven bits on any processor; those of eight where there is VNNI, and not on x86 without it."""
    inner, columns = 512, 32
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.UINT8, ["rows", inner]),
            helper.make_tensor_value_info("zero", TensorProto.UINT8, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["rows", columns])],
        [numpy_helper.from_array(np.full((inner, columns), extreme, np.int8), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for rows in (1, 40):
        feeds = {"x": np.full((rows, inner), activation, np.uint8), "zero": np.array(0, np.uint8)}
        assert (session.run(None, feeds)[0] == activation * extreme * inner).all()


@given(weights)
def test_int4_is_nearest_but_for_what_is_cut_off(rows: Any) -> None:
    numbers, scales = int4.encode(rows, whole(rows))
    assert numbers.min() >= -8
    assert numbers.max() <= 7
    blocks, steps = rows.reshape(4, 2, BLOCK), scales[..., None]
    restored = numbers.reshape(4, 2, BLOCK) * steps
    cut = np.clip(blocks / steps, -8, 7) * steps  # opposite to the extreme there is one step less
    assert (np.abs(restored - cut) <= np.abs(steps) * 0.5001 + 1e-6).all()


@given(weights, st.sampled_from([FP32, FP16]))
def test_of_all_scales_that_are_tried_int4_takes_the_one_that_loses_least(
    rows: Any, activations: Activations
) -> None:
    """Block by block, in float64."""
    numbers, scales = int4.encode(rows, whole(rows, activations))
    kind = np.dtype(activations.dtype).type
    assert (scales.astype(kind) == scales).all()
    for block, coded, scale in zip(
        rows.reshape(-1, BLOCK).astype(np.float64),
        numbers.reshape(-1, BLOCK),
        scales.reshape(-1),
        strict=True,
    ):
        extreme = block[np.abs(block).argmax()]
        lost = []
        for shrunk in (1.0, 0.95, 0.9, 0.85, 0.8):
            step = float(kind(np.float32(extreme) * np.float32(shrunk / -8))) or 1.0
            lost.append(np.square(np.clip(np.rint(block / step), -8, 7) * step - block).sum())
        assert np.square(coded * float(scale) - block).sum() <= min(lost) * 1.001 + 1e-6


def test_pairs_lie_as_onnx_has_them() -> None:
    numbers = np.random.default_rng(0).integers(-8, 8, (6, 4)).astype(np.int8)
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=(4, 6))
    tensor.raw_data = packed_pairs(numbers).T.tobytes()
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), numbers.T)


def nearest(values: Any, among: Any) -> Any:
    """Distance of every value to the nearest number of a format."""
    return np.abs(np.asarray(values, np.float64)[..., None] - among).min(axis=-1)


@given(weights)
def test_fp8_is_nearest(rows: Any) -> None:
    numbers, scales = fp8.encode(rows, whole(rows, FP16))
    assert (scales == scales.astype(np.float16)).all()
    scaled = np.clip(rows / scales[:, None], -448, 448)
    found = np.abs(numbers.astype(np.float64) - scaled)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, nearest(scaled, E4M3), atol=1e-6)


@given(weights)
def test_nvfp4_is_nearest_to_what_its_scales_allow(rows: Any) -> None:
    numbers, scales, overall = nvfp4.encode(rows, whole(rows, FP16))
    steps = scales.astype(np.float64) * overall
    assert (steps > 0).all()
    scaled = np.clip(rows.reshape(4, -1, nvfp4.BLOCK) / steps[..., None], -6, 6)
    found = np.abs(numbers.astype(np.float64).reshape(scaled.shape) - scaled)
    np.testing.assert_allclose(found, nearest(scaled, E2M1), atol=1e-5)


@given(weights)
def test_nvfp4_loses_no_more_than_the_plain_scale(rows: Any) -> None:
    """Largest number for the extreme, as NVIDIA's tools have it: the search must not be worse, block by block."""
    numbers, scales, overall = nvfp4.encode(rows, whole(rows, FP16))
    blocks = rows.reshape(4, -1, nvfp4.BLOCK).astype(np.float64)
    mine = numbers.astype(np.float64).reshape(blocks.shape) * (scales.astype(np.float64) * overall)[..., None]
    wanted = np.abs(blocks).max(axis=2) / 6 / overall
    plain = np.maximum(wanted.astype(ml_dtypes.float8_e4m3fn).astype(np.float64), 2.0**-9) * overall
    theirs = np.clip(blocks / plain[..., None], -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    lost, plainly_lost = (np.square(blocks - each).sum(axis=2) for each in (mine, theirs * plain[..., None]))
    assert (lost <= plainly_lost * 1.001 + 1e-6).all()


def test_a_weight_of_zeros_stays_zero() -> None:
    zeros = np.zeros((2, BLOCK), np.float32)
    assert nvfp4.global_scale(0.0) == nvfp4.global_scale(1e-40) == 1.0
    for scheme in (int8, int8_fine, int8_blocks, int4, uint4, fp8, nvfp4):
        numbers, scales, *_ = scheme.encode(zeros, whole(zeros))
        assert not numbers.astype(np.float32).any()
        assert (scales.astype(np.float32) > 0).all()


def test_pairs_of_e2m1_lie_as_onnx_has_them() -> None:
    numbers = np.random.default_rng(0).choice(E2M1, (6, 4)).astype(ml_dtypes.float4_e2m1fn)
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT4E2M1, dims=(4, 6))
    tensor.raw_data = packed_pairs(numbers).T.tobytes()
    restored = numpy_helper.to_array(tensor).astype(np.float32)
    np.testing.assert_array_equal(restored, numbers.T.astype(np.float32))
