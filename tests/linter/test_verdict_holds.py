"""The verdict against a runtime: ids that survive change the logits as they should, ids that do not change nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from gap_export.linter import lint_graph

Array = NDArray[np.float32]

CONTIGUOUS = np.array([[3, 4, 5, 6, 7, 8]])
GAPPED = np.array([[3, 4, 9, 11, 12, 20]])
TOKENS = CONTIGUOUS.shape[1]


def logits(parts: SimpleNamespace, proto: onnx.ModelProto, ids: NDArray[np.int64]) -> Array:
    """Last-token logits of one prefill in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given: dict[str, NDArray[np.generic]] = {
        "inputs_embeds": embeds(parts),
        "position_ids": ids,
        "write_index": np.zeros(1, np.int64),
        "last_index": np.array([TOKENS - 1]),
    }
    past = np.zeros((1, 1, parts.CAPACITY, parts.HEAD), np.float32)
    feeds = {i.name: given.get(i.name, past) for i in session.get_inputs()}
    result: Array = session.run(["logits"], feeds)[0]
    return result


def embeds(parts: SimpleNamespace) -> Array:
    return np.random.default_rng(1).normal(size=(1, TOKENS, parts.WIDTH)).astype(np.float32)


def reference(parts: SimpleNamespace, ids: NDArray[np.int64]) -> Array:
    """The small decoder in NumPy: causal by index, rotated by id."""
    weights = parts.constants(2)
    angle = ids[0, :, None] * np.concatenate([weights["inv_freq"][0, 0]] * 2)

    def rotate(x_SHD: Array) -> Array:
        first, second = np.split(x_SHD, 2, axis=-1)
        turned = np.concatenate([-second, first], axis=-1)
        return x_SHD * np.cos(angle)[:, None] + turned * np.sin(angle)[:, None]

    h_SE = embeds(parts)[0]
    for layer in range(2):
        q_SHD = rotate((h_SE @ weights[f"wq{layer}"]).reshape(TOKENS, 2, parts.HEAD))
        k_SHD = rotate((h_SE @ weights[f"wk{layer}"]).reshape(TOKENS, 1, parts.HEAD))
        v_SD = h_SE @ weights[f"wv{layer}"]
        scores_HSS = np.einsum("qhd,kd->hqk", q_SHD, k_SHD[:, 0]) / np.sqrt(parts.HEAD)
        scores_HSS = np.where(np.tri(TOKENS, dtype=bool), scores_HSS, -np.inf)
        weights_HSS = np.exp(scores_HSS - scores_HSS.max(-1, keepdims=True))
        weights_HSS /= weights_HSS.sum(-1, keepdims=True)
        context_SE = np.einsum("hqk,kd->qhd", weights_HSS, v_SD).reshape(TOKENS, -1)
        h_SE = h_SE + context_SE @ weights[f"wo{layer}"]
    result: Array = (h_SE[-1] @ weights["w_out"])[None]
    return result


def assert_counted(parts: SimpleNamespace, proto: onnx.ModelProto) -> None:
    """Gapped ids give, without a word, the logits of contiguous ones."""
    given_gaps = logits(parts, proto, GAPPED)
    np.testing.assert_array_equal(given_gaps, logits(parts, proto, CONTIGUOUS))
    np.testing.assert_allclose(given_gaps, reference(parts, CONTIGUOUS), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("rotate", "rows"),
    [
        ("half", "ROWS"),
        ("half", "TABLE_ROWS"),
        ("apart", "HALF_ROWS"),
        ("matrix", "ROWS"),
        ("operator-ids", "TABLE_ROWS"),
        ("microsoft", "TABLE_ROWS"),
    ],
)
def test_ids_that_survive_give_the_logits_they_should(parts: SimpleNamespace, rotate: str, rows: str) -> None:
    proto = parts.Small(rotate=parts.ROTATE[rotate], rows=getattr(parts, rows)).proto()
    assert lint_graph(ir.from_proto(proto)).verdict.survives
    for ids in (CONTIGUOUS, GAPPED):
        np.testing.assert_allclose(logits(parts, proto, ids), reference(parts, ids), atol=2e-4, rtol=1e-4)
    assert np.abs(reference(parts, GAPPED) - reference(parts, CONTIGUOUS)).max() > 0.05


@pytest.mark.parametrize("angles", ["range", "first"])
def test_ids_that_do_not_survive_change_nothing(parts: SimpleNamespace, angles: str) -> None:
    proto = parts.Small(angles=parts.ANGLES[angles]).proto()
    assert not lint_graph(ir.from_proto(proto)).verdict.survives
    assert_counted(parts, proto)


def test_a_mask_made_from_ids_gives_other_logits(parts: SimpleNamespace) -> None:
    change = {
        "cache": parts.NO_CACHE,
        "present": "float[B,1,S,16]",
        "inputs": ("inputs_embeds", "position_ids", "last_index"),
    }
    causal = """row_S = Range (zero, length, one) row_Q1 = Unsqueeze (row_S, ax1) row_1K = Unsqueeze (row_S, ax0)
        seen = LessOrEqual (row_1K, row_Q1) """
    packed = parts.PACKED_MASK.replace(
        "mask = Unsqueeze (same, ax1)", "both = And (same, seen) mask = Unsqueeze (both, ax1)"
    )
    slots = causal + "seen_3 = Unsqueeze (seen, ax0) mask = Unsqueeze (seen_3, ax0)"
    right = parts.Small(mask=slots, **change).proto()
    wrong = parts.Small(mask=causal + packed, **change).proto()
    assert lint_graph(ir.from_proto(right)).verdict.survives
    assert not lint_graph(ir.from_proto(wrong)).verdict.survives
    np.testing.assert_allclose(logits(parts, right, GAPPED), reference(parts, GAPPED), atol=2e-4, rtol=1e-4)
    assert np.abs(logits(parts, wrong, GAPPED) - reference(parts, GAPPED)).max() > 0.01
    np.testing.assert_allclose(
        logits(parts, wrong, CONTIGUOUS), reference(parts, CONTIGUOUS), atol=2e-4, rtol=1e-4
    )


def test_rotary_inside_grouped_query_attention_reads_only_the_first_id(parts: SimpleNamespace) -> None:
    mask = """length_32 = Cast <to=6> (length) one_32 = Cast <to=6> (one) before_32 = Sub (length_32, one_32)
        lengths = Unsqueeze (before_32, ax0) total = Identity (length_32)"""
    attention = """a{l}_f, present.{l}.key, present.{l}.value = com.microsoft.GroupQueryAttention
        <num_heads=2, kv_num_heads=1, do_rotary=1> (qp{l}, kp{l}, vp{l}, past.{l}.key, past.{l}.value, lengths, total,
        cos_half, sin_half, position_ids) a{l}_s = Reshape (a{l}_f, split_q) a{l} = Transpose <perm=[0,2,1,3]> (a{l}_s)"""
    proto = parts.Small(
        angles="",
        rows="",
        rotate=parts.ROTATE["none"],
        mask=mask,
        cache="",
        attention=attention,
        past="float[B,1,P,16]",
        present="float[B,1,T,16]",
    ).proto()
    assert not lint_graph(ir.from_proto(proto)).verdict.survives
    assert_counted(parts, proto)
