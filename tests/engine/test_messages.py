"""What the libraries say and what users are told. Texts are TensorRT-RTX 1.7.1's own; those of GPUs are from its documentation."""

from __future__ import annotations

import pytest

from gap_export.engine.library import Message
from gap_export.engine.messages import Complaint, complaints_of_log, error_from_complaints, unused_inputs
from gap_export.errors import EngineError, GapExportError, MissingRequirementError

NO_GPU = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
    "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime version))"
)


def told(*complaints: Complaint) -> GapExportError:
    return error_from_complaints(
        complaints, subject="graph decoder", library="TensorRT-RTX 1.7", doing="build the engine"
    )


@pytest.mark.parametrize(
    ("text", "kind", "hint"),
    [
        ("The KV cache tensor must have a static sequence length dimension.", EngineError, "capacity"),
        ("TensorRT only supports Attention nodes with one output.", EngineError, "TensorScatter"),
        ("tk: K exceeds the maximum value allowed (3840).", EngineError, "3840"),
        (
            "ElementWiseOperation SUM must have same input types. But they are of types Half and Float.",
            EngineError,
            "Cast",
        ),
        (
            "Myelin ([create_shape_context.cpp:936: infer] Shape tensor Scan_951_shapeInput is not initialized.)",
            EngineError,
            "choose another pruner",
        ),
        ("first input has type Bool but must have type Float, Half", EngineError, "Cast"),
        ("Plugin not found, are the plugin name, version, and namespace correct?", EngineError, "plain ONNX"),
        ("Attention operation was not supported by a dedicated kernel.", EngineError, "head sizes"),
        (
            "Cannot compile for target(s) sm75, because the model contains HW-specific datatypes: b16.",
            EngineError,
            "bf16",
        ),
        (
            "Error Code 2: OutOfMemory (Requested size was 12884901888 bytes.)",
            MissingRequirementError,
            "free memory",
        ),
        ("std::bad_alloc", MissingRequirementError, "free memory"),
        (
            "The engine does not support the compute capability of this device.",
            EngineError,
            "compute_capabilities",
        ),
        ("CUDA initialization failure with error: 35", MissingRequirementError, "NVIDIA GPU"),
        ("something nobody has seen before", EngineError, "please report"),
    ],
)
def test_each_failure_has_its_own_hint(text: str, kind: type[GapExportError], hint: str) -> None:
    error = told(Complaint(text))
    assert type(error) is kind
    assert hint in error.hint
    assert text in error.message
    assert error.subject == "graph decoder"


def test_the_subject_is_as_narrow_as_the_complaint() -> None:
    assert told(Complaint("bad", node="n1", operator="Add")).subject == "graph decoder, n1"
    assert told(Complaint("Failed to open file: /b/w.bin")).subject == "graph decoder, /b/w.bin"
    profile = (
        "Dimension mismatch for tensor position_ids and profile 0. At dimension axis 1, profile has min=9"
    )
    assert told(Complaint(profile)).subject == "graph decoder, position_ids"


def test_every_complaint_is_quoted_up_to_a_point() -> None:
    error = told(
        *(
            Complaint(f"reason {index}", node=f"n{index}", operator="Mul", source="a.cpp:7")
            for index in range(7)
        )
    )
    assert "n0 (Mul): reason 0 [a.cpp:7]; n1 (Mul): reason 1" in error.message
    assert "reason 4" in error.message
    assert "reason 5" not in error.message
    assert error.message.endswith("and 2 more")
    assert error.subject.endswith("n0")


def test_silence_is_reported_as_such() -> None:
    assert "no reason" in told().message


def test_the_missing_gpu_is_noise_beside_a_real_error_and_the_error_on_its_own() -> None:
    real = "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (tk: K is odd. In validate at /_src/a/b.cpp:12)"
    beside = complaints_of_log([Message(1, real), Message(1, NO_GPU), Message(2, "a warning")])
    assert [complaint.text for complaint in beside] == ["API Usage Error (tk: K is odd.)"]
    (alone,) = complaints_of_log([Message(1, NO_GPU)])
    assert type(told(alone)) is MissingRequirementError
    assert "CUDA driver" in alone.text


def test_lines_that_repeat_a_parser_error_are_left_out() -> None:
    log = [
        Message(1, 'ModelImporter.cpp:140: While parsing node number 0 [NonZero -> "y"]:'),
        Message(1, "ModelImporter.cpp:142: --- Begin node ---\nNode name: nz"),
        Message(1, "WeightsContext.cpp:203: Failed to open file: /b/w.bin"),
        Message(
            1,
            "ModelImporter.cpp:151: ERROR: ModelImporter.cpp:899 In function importInitializers:\n[5] Failed",
        ),
    ]
    assert [complaint.text for complaint in complaints_of_log(log)] == ["Failed to open file: /b/w.bin"]


def test_unused_inputs_are_named_once() -> None:
    log = [
        Message(2, "ModelImporter.cpp:1071: Make sure input n has Int64 binding."),
        Message(2, "Unused Input: n"),
        Message(
            2,
            "[RemoveDeadLayers] Input Tensor n is unused or used only at compile-time, but is not being removed.",
        ),
        Message(
            2,
            "[RemoveDeadLayers] Input Tensor u is unused or used only at compile-time, but is not being removed.",
        ),
    ]
    assert unused_inputs(log) == ["n", "u"]
    assert unused_inputs(log[:1]) == []
