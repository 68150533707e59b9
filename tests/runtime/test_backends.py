"""The table of runtimes: a row from outside the package, unknown names, and the end of a session."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.errors import MissingRequirementError, SessionError
from gap_export.inputs.batch import of_one_size
from gap_export.positions import Ids
from gap_export.runtime import backends
from gap_export.runtime.backends import Backend, open_session
from gap_export.runtime.generate import generate
from gap_export.runtime.grounder import Grounder
from gap_export.runtime.model import load
from gap_export.runtime.session import Session
from tests.runtime import reference_runtime

BuildBundle = Callable[..., Bundle]
CheckClosed = Callable[[Session], None]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table, whose further rows are gone after the test."""
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))


@pytest.mark.usefixtures("table")
def test_a_runtime_registered_from_outside_answers_like_ours(bundle_copy: Path, image_file: Path) -> None:
    backends.register(reference_runtime.ROW)
    assert "onnx-reference" in backends.names(exported=True)
    bundle = open_bundle(bundle_copy)
    images = [Image.open(image_file).convert("RGB")] * 2
    answers = {}
    for name in ("onnxruntime", "onnx-reference"):
        with open_session(bundle, name, threads=1) as session:
            assert session.backend == name
            answers[name] = Grounder(bundle).ground(session, images, ["the red mug", "a cat"])
    ours, theirs = answers.values()
    assert ours.generation.tokens == theirs.generation.tokens
    assert np.array_equal(ours.generation.kept_indices, theirs.generation.kept_indices)
    assert [answer.box for answer in ours.answers] == [answer.box for answer in theirs.answers]
    np.testing.assert_allclose(ours.generation.logits[0], theirs.generation.logits[0], atol=1e-3)
    expressions = ["the red mug", "a cat on the left"]
    with load(bundle, threads=1) as our, load(bundle, backend="onnx-reference") as their:
        for mine, other in zip(*(each.ground(image_file, expressions) for each in (our, their)), strict=True):
            assert mine.text == other.text


@pytest.mark.usefixtures("table")
def test_a_second_row_of_a_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="'onnxruntime' already"):
        backends.register(Backend("onnxruntime", "elsewhere:Session"))


def test_an_unknown_backend_is_named_with_those_there_are(tiny_bundle: BuildBundle) -> None:
    with pytest.raises(SessionError, match=r"'tflite': unknown backend \(choose one of onnxruntime"):
        open_session(tiny_bundle(), "tflite")
    with pytest.raises(SessionError, match="runs the checkpoint"):
        backends.target_of("torch")
    assert backends.names() == (*backends.names(exported=True), "torch")


@pytest.mark.parametrize(
    ("text", "options", "whole"),
    [
        ("onnxruntime", {}, "onnxruntime"),
        ("onnxruntime", {"device": "cpu"}, "onnxruntime"),
        ("openvino", {}, "openvino"),
        ("openvino", {"device": "cpu", "precision_hint": "f32"}, "openvino"),
        ("openvino:cpu:f32", {}, "openvino"),
        ("openvino", {"precision_hint": "bf16"}, "openvino:bf16"),
        ("openvino:bf16", {}, "openvino:bf16"),
        ("openvino:bf16", {"precision_hint": "f16"}, "openvino:f16"),
        ("openvino:gpu:1:f16", {}, "openvino:gpu:1:f16"),
        ("openvino:bf16", {"device": "gpu:1"}, "openvino:gpu:1:bf16"),
        ("openvino:gpu:1:f16", {"device": "npu"}, "openvino:npu:f16"),
        ("tensorrt", {"device": "cuda"}, "tensorrt"),
    ],
)
def test_one_text_says_what_runs_a_bundle(text: str, options: dict[str, str], whole: str) -> None:
    found = backends.runtime(text, **options)
    assert str(found) == whole
    assert backends.runtime(whole) == found


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "openvino:tpu",
            {},
            "'tpu' of backend openvino: is not one of cpu, gpu, gpu:N, npu, nor of f32, bf16, f16",
        ),
        ("openvino:", {}, "device '' of backend openvino"),
        ("openvino:bf16:gpu", {}, "device 'bf16:gpu'"),
        ("openvino:gpu:01", {}, "device 'gpu:01'"),
        ("openvino:gpu:9999", {}, "device 'gpu:9999'"),
        ("openvino:CPU", {}, "device 'CPU'"),
        (
            "openvino",
            {"device": "cuda"},
            r"device 'cuda' of backend openvino: is not one of cpu, gpu, gpu:N, npu \(",
        ),
        (
            "openvino",
            {"precision_hint": "fp8"},
            "hint 'fp8' of backend openvino: is not one of f32, bf16, f16",
        ),
        (
            "onnxruntime",
            {"precision_hint": "bf16"},
            "cannot be asked for: the bundle's own precision decides",
        ),
        ("onnxruntime:bf16", {}, "device 'bf16' of backend onnxruntime: is not one of cpu"),
        ("tensorrt:cuda:1", {}, "device 'cuda:1' of backend tensorrt"),
        ("[/red]\x1b", {}, "unknown backend"),
    ],
)
def test_what_does_not_go_together_is_refused(text: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(SessionError, match=message) as refused:
        backends.runtime(text, **options)
    assert str(refused.value).isprintable()
    assert refused.value.hint


@pytest.mark.usefixtures("table")
def test_a_runtime_that_is_not_installed_says_what_to_install(tiny_bundle: BuildBundle) -> None:
    backends.register(Backend("absent", "a_runtime_that_nobody_has:Session", requirement="nobody[has]"))
    with pytest.raises(
        MissingRequirementError, match=r"a_runtime_that_nobody_has.*pip install 'nobody\[has\]'"
    ):
        open_session(tiny_bundle(), "absent")


def test_a_closed_session_holds_no_memory_and_says_that_it_is_closed(
    tiny_bundle: BuildBundle, pixels: NDArray[np.float32], ragged_ids: Ids, check_closed: CheckClosed
) -> None:
    session: Any = open_session(tiny_bundle(), threads=1)
    with session:
        before = answer(session, pixels, ragged_ids)
        held = [weakref.ref(each) for each in (*session._sessions.values(), *session._cache._blocks.values())]
        assert all(each() is not None for each in held)
    gc.collect()
    assert [each() for each in held] == [None] * len(held)
    check_closed(session)
    with open_session(tiny_bundle(), threads=1) as another:
        assert answer(another, pixels, ragged_ids) == before


@pytest.mark.parametrize("staged", [False, True])
def test_a_closed_reference_lets_its_model_go(
    staged: bool,
    tiny_bundle: BuildBundle,
    deep_bundle: BuildBundle,
    pixels: NDArray[np.float32],
    questions: Ids,
    check_closed: CheckClosed,
) -> None:
    bundle = deep_bundle(pruner="fastv", prune_layers=(2,)) if staged else tiny_bundle()
    session: Any = open_session(bundle, "torch")
    with session:
        answer(session, pixels, questions)
        held = weakref.ref(session._model.language_model)
    gc.collect()
    assert held() is None
    check_closed(session)


def answer(session: Session, pixels: NDArray[np.float32], input_ids: Ids) -> list[list[int]]:
    batch = of_one_size(pixels, 36)
    return generate(session, batch, input_ids, max_new_tokens=4, eos_token_ids=(2,)).tokens
