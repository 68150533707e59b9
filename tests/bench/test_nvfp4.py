"""`bench/nvfp4.py`: its standard operators against NumPy, number for number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from gap_export.bundle.folder import Bundle
from gap_export.evaluation.calibrate import calibrate
from gap_export.runtime.backends import open_session

pytestmark = pytest.mark.slow


@pytest.fixture
def nvfp4(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("nvfp4")


def restored(x: Any, step: float) -> Any:
    """What E2M1 in blocks of 16 makes of activations, by the types of ml_dtypes."""
    blocks = x.astype(np.float32).reshape(-1, 16)
    wanted = np.minimum(np.abs(blocks).max(axis=1, keepdims=True) / np.float32(6) / np.float32(step), 448)
    scale = wanted.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(step)
    scaled = np.clip(blocks / np.where(scale == 0, 1, scale), -6, 6)
    return (scaled.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale).reshape(x.shape)


def quantizer(step: float) -> ir.Model:
    """TensorRT's operator, and what restores its numbers, alone."""
    given = ir.Value(name="x", shape=ir.Shape(["rows", 2, 32]), type=ir.TensorType(ir.DataType.FLOAT16))
    scale = ir.Value(name="step", const_value=ir.tensor(np.float32(step)), shape=ir.Shape([]))
    attributes = [ir.AttrInt64("axis", -1), ir.AttrInt64("block_size", 16), ir.AttrInt64("scale_type", 17)]
    low = ir.Node("trt", "TRT_FP4DynamicQuantize", [given, scale], attributes, num_outputs=2)
    scales = ir.node("DequantizeLinear", [low.outputs[1], scale])
    back = ir.node("DequantizeLinear", [low.outputs[0], scales.outputs[0]], {"axis": -1, "block_size": 16})
    half = ir.node("Cast", [back.outputs[0]], {"to": ir.DataType.FLOAT16})
    out = half.outputs[0]
    out.name, out.shape, out.type = "y", given.shape, given.type
    final = ir.node("Identity", [out])
    final.outputs[0].name, final.outputs[0].shape, final.outputs[0].type = "z", given.shape, given.type
    graph = ir.Graph(
        [given],
        [final.outputs[0]],
        nodes=[low, scales, back, half, final],
        initializers=[scale],
        opset_imports={"": 24, "trt": 1},
    )
    return ir.Model(graph, ir_version=11)


@pytest.mark.parametrize("step", [0.01, 1.0])
def test_activations_are_those_of_e2m1(nvfp4: ModuleType, step: float) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, 2, 32)) * 10.0 ** rng.integers(-3, 2, (3, 2, 1))).astype(np.float16)
    x[0, 0, :16] = 0
    x[1, 0, :16] = (
        np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6] * 2) * 6 * 0.5
    )  # ties, where the scale is exact
    model = quantizer(step)
    nvfp4.rewrite(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (mine,) = session.run(None, {"x": x})
    np.testing.assert_array_equal(mine, restored(x, step).astype(np.float16))


def test_a_rewritten_bundle_answers_nearly_as_in_half_precision(
    nvfp4: ModuleType, deep_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    import shutil

    from gap_export.bundle.folder import open_bundle
    from gap_export.inputs.batch import of_one_size
    from gap_export.runtime.generate import generate

    ranges = tmp_path / "ranges.json"
    ranges.write_text(calibrate(deep_bundle().folder, limit=2, threads=1).model_dump_json())
    low = open_bundle(
        Path(shutil.copytree(deep_bundle(precision="nvfp4", ranges=str(ranges)).folder, tmp_path / "copy"))
    )
    half = deep_bundle(precision="fp16")
    pixels = np.random.default_rng(1).standard_normal((2, 3, 36, 36), np.float32)
    ids = np.array([[1, 5, 6, 4, 7, 8, 9]] * 2, np.int64)
    a, b = (
        generate(session, of_one_size(pixels, 36), ids, max_new_tokens=1, eos_token_ids=(), keep_logits=True)
        .logits[0]
        .ravel()
        for session in (
            nvfp4.in_standard_operators(low, "onnxruntime", threads=1),
            open_session(half, "onnxruntime", threads=1),
        )
    )
    assert 0.6 < a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) < 0.99999
