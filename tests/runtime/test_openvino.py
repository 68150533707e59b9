"""OpenVINO: answers are ONNX Runtime's, whatever the bundle drops and however it stores weights; what cannot be given is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from gap_export.bundle.folder import Bundle
from gap_export.errors import MissingRequirementError, SessionError
from gap_export.evaluation.controls import controls
from gap_export.inputs.batch import of_one_size
from gap_export.positions import Ids, advance
from gap_export.precision import PRECISIONS
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import Generation, generate
from gap_export.runtime.keep import KeepCounts, keep_counts
from gap_export.runtime.session import Session
from tests.conftest import IMAGE_TOKEN

openvino_graph = pytest.importorskip("gap_export.runtime.openvino_graph")
BuildBundle = Callable[..., Bundle]
Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def text_ids() -> Ids:
    """[2, 6] of two expressions."""
    return np.array([[0, 5, 6, 7, 1, 1], [0, 8, 9, 10, 11, 1]])


def answer(session: Session, pixels: Floats, ids: Ids, **options: Any) -> Generation:
    given = {"max_new_tokens": 6, "eos_token_ids": (), "keep_logits": True, **options}
    return generate(session, of_one_size(pixels, 36), ids, **given)


def told(bundle: Bundle, pixels: Floats) -> dict[str, Any]:
    """What a bundle is told of a batch whose later stages follow the request."""
    manifest = bundle.manifest
    if not manifest.pruning.stage_counts_are_told:
        return {}
    return {"keep_counts": keep_counts(manifest.pruning, manifest.spec, of_one_size(pixels, 36), None)}


def apart(one: Generation, other: Generation) -> float:
    return float(max(np.abs(a - b).max() for a, b in zip(one.logits, other.logits, strict=True)))


BUNDLES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fixed": ("tiny_bundle", {}, {}),
    "a range": ("tiny_bundle", {"keep": "0.1:0.5:1.0"}, {"keep_counts": KeepCounts((4,))}),
    "adaptive": ("tiny_bundle", {"pruner": "prumerge", "keep": "adaptive"}, {}),
    "stages": ("deep_bundle", {"pruner": "fastv"}, {}),
    "stages of a range": ("deep_bundle", {"pruner": "fastv", "keep": "0.15:0.25:1.0"}, {}),
    "stages of a range, merged": ("deep_bundle", {"pruner": "sparsevlm", "keep": "0.15:0.25:1.0"}, {}),
    "shifted": ("tiny_bundle", {"positions": "shifted"}, {}),
}
KINDS = [pytest.param(kind, marks=pytest.mark.long) if "merged" in kind else kind for kind in BUNDLES]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_onnx_runtime(
    kind: str, request: pytest.FixtureRequest, pixels: Floats, ragged_ids: Ids
) -> None:
    """Of rows that differ in length, of other rows, and again of the first ones: nothing is left over in the cache."""
    fixture, changes, options = BUNDLES[kind]
    bundle = request.getfixturevalue(fixture)(**changes)
    rows = len(ragged_ids)
    pixels = np.resize(pixels, (rows, *pixels.shape[1:]))
    with open_session(bundle, threads=1) as true, open_session(bundle, "openvino", threads=1) as session:
        for some in (slice(0, rows), slice(0, 1), slice(0, rows)):
            given = {**options, **told(bundle, pixels[some])}
            expected = answer(true, pixels[some], ragged_ids[some], **given)
            mine = answer(session, pixels[some], ragged_ids[some], **given)
            assert mine.tokens == expected.tokens
            assert apart(mine, expected) < 1e-4
            for kept, wanted in zip(mine.every_kept_indices, expected.every_kept_indices, strict=True):
                np.testing.assert_array_equal(kept, wanted)
        for name, adjust in controls(staged=False).items():
            if kind == "fixed" and name != "decoding continues at kept length":
                before = np.array([row.tolist().index(IMAGE_TOKEN) for row in ragged_ids])
                wrong = answer(
                    session,
                    pixels,
                    ragged_ids,
                    adjust=lambda placement, visual, adjust=adjust, before=before: adjust(
                        placement, before, (visual.kept_indices >= 0).sum(axis=1)
                    ),
                )
                assert apart(wrong, expected) > 1e-2, name


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-blocks", "int4"])
def test_weights_as_they_are_stored(
    precision: str, low: Callable[[str], Bundle], pixels: Floats, ragged_ids: Ids
) -> None:
    """The same visual tokens, so that a tie between patches decides nothing. ONNX Runtime rounds activations of blocks, OpenVINO does not."""
    bundle = low(precision)
    pixels = np.resize(pixels, (len(ragged_ids), *pixels.shape[1:]))
    with open_session(bundle, threads=1) as true, open_session(bundle, "openvino", threads=1) as session:
        seen = session.encode({"pixel_values": pixels})
        logits = []
        for each in (session, true):
            spliced = each.splice(ragged_ids, seen)
            logits.append(each.prefill(spliced.embeds, spliced.placement).logits)
            placement = advance(spliced.placement)
            logits.append(each.step(np.full(len(ragged_ids), 20), placement).copy())
    for mine, expected in zip(logits[:2], logits[2:], strict=True):
        assert 0 < np.abs(mine - expected).max() < 0.06 * np.abs(expected).max()


def test_half_precision_is_asked_for_and_given(
    tiny_bundle: BuildBundle, pixels: Floats, ragged_ids: Ids
) -> None:
    try:
        session = open_session(tiny_bundle(), "openvino:bf16", threads=1)
    except SessionError as error:
        pytest.skip(str(error))
    pixels = np.resize(pixels, (len(ragged_ids), *pixels.shape[1:]))
    with session, open_session(tiny_bundle(), "openvino", threads=1) as exact:
        assert session.backend == "openvino:bf16"
        assert exact.backend == "openvino"
        mine, expected = (answer(each, pixels, ragged_ids, max_new_tokens=1) for each in (session, exact))
    difference = apart(mine, expected) / np.abs(expected.logits[0]).max()
    assert 1e-5 < difference < 0.1


# What is refused


def test_a_device_that_is_not_there_is_an_error(tiny_bundle: BuildBundle) -> None:
    message = r"device gpu:7: is not there for OpenVINO, which finds cpu"
    with pytest.raises(SessionError, match=message) as refused:
        open_session(tiny_bundle(), "openvino:gpu:7")
    assert "--" in refused.value.hint


@pytest.mark.parametrize("hint", ["f16", "bf16"])
def test_a_type_that_the_processor_has_not_is_an_error(hint: str, tiny_bundle: BuildBundle) -> None:
    """Processors differ: one that has the type gives it, and any other says so."""
    refused = None
    try:
        open_session(tiny_bundle(), f"openvino:{hint}").close()
    except SessionError as error:
        refused = error
    if refused is not None:
        assert re.search(rf"\.onnx: would compute in \w+ here, and {hint} was asked for", str(refused))
        assert "--" in refused.hint


def test_a_type_that_was_not_asked_for_is_seen(tiny_bundle: BuildBundle) -> None:
    """Hints are wishes: the same check says nothing of the type that ran, and names it where another was wished for."""
    core = openvino_graph.open_core("CPU", 1)
    model = core.read_model(tiny_bundle().graph_path("decoder"))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for quantised in (False, True):
        assert openvino_graph.wrong_types(compiled, "f32", quantised=quantised) == ()
        assert openvino_graph.wrong_types(compiled, "bf16", quantised=quantised) == ("f32",)


def test_a_version_that_learns_no_operators(
    tiny_bundle: BuildBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_graph, "ConversionExtension", None)
    with pytest.raises(MissingRequirementError, match="has no conversion extensions") as refused:
        open_session(tiny_bundle(), "openvino")
    assert "pip install 'openvino>=" in refused.value.hint


def test_it_is_not_installed(tiny_bundle: BuildBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    for name in (
        "gap_export.runtime.openvino",
        "gap_export.runtime.openvino_graph",
        "gap_export.runtime.openvino_package",
    ):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingRequirementError, match=r"pip install 'gap-export\[cpu,openvino\]'"):
        open_session(tiny_bundle(), "openvino")


def test_precisions_without_kernels(tiny_bundle: BuildBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setitem(PRECISIONS, "fp32", replace(PRECISIONS["fp32"], cpu=False))
    with pytest.raises(SessionError, match="no CPU kernels"):
        open_session(tiny_bundle(), "openvino")


def test_inputs_that_do_not_fit(tiny_bundle: BuildBundle) -> None:
    with open_session(tiny_bundle(), "openvino", threads=1) as session:
        with pytest.raises(SessionError, match="failed in OpenVINO") as refused:
            session.encode({"pixel_values": np.zeros((1, 3, 35, 36), np.float32)})
        assert "\n" not in str(refused.value)


def test_nobody_is_told_that_it_is_used(tmp_path: Path) -> None:
    """Its own import writes into the home folder and opens a connection; ours does neither, and leaves the package to others."""
    program = """if True:
        import sys
        told = []
        sys.addaudithook(lambda event, given: told.append(given) if event.startswith("socket.") else None)
        import %s
        import openvino_telemetry
        print([each for each in told if "connect" in str(each) or "getaddrinfo" in str(each)], len(told))
    """
    ends = {}
    for imported in ("gap_export.runtime.openvino_graph", "openvino"):
        home = tmp_path / imported
        home.mkdir()
        environment = {**os.environ, "HOME": str(home), "CI": ""}
        ran = subprocess.run(
            [sys.executable, "-c", program % imported],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        ends[imported] = ([*home.rglob("*")] != [], ran.stdout.strip())
    assert ends["gap_export.runtime.openvino_graph"] == (False, "[] 0")
    assert ends["openvino"][0], "it writes nothing by itself any more: the detour can go"


# The operator that it lacks


def scatter_model(**attributes: Any) -> onnx.ModelProto:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 24]>
        scatter (float[b, 2, c, 4] past, float[b, 2, s, 4] update, int64[b] write_index) => (float[b, 2, c, 4] present)
        { present = TensorScatter (past, update, write_index) }""")
    model.graph.node[0].attribute.extend(onnx.helper.make_attribute(*each) for each in attributes.items())
    return model


@pytest.mark.parametrize("length", [1, 3])
def test_tensor_scatter_is_that_of_onnx(length: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(length)
    inputs = {
        "past": rng.standard_normal((3, 2, 9, 4)).astype(np.float32),
        "update": rng.standard_normal((3, 2, length, 4)).astype(np.float32),
        "write_index": np.array([0, 4, 9 - length]),
    }
    model = scatter_model()
    onnx.save(model, tmp_path / "scatter.onnx")
    core = openvino_graph.open_core("CPU", 1)
    compiled = core.compile_model(core.read_model(tmp_path / "scatter.onnx"), "CPU")
    (mine,) = compiled(inputs).values()
    (expected,) = ReferenceEvaluator(model).run(None, inputs)
    np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize("attributes", [{"axis": 1}, {"mode": "circular"}], ids=str)
def test_other_kinds_of_it_are_refused(attributes: dict[str, Any], tmp_path: Path) -> None:
    onnx.save(scatter_model(**attributes), tmp_path / "scatter.onnx")
    with pytest.raises(Exception, match="TensorScatter"):
        openvino_graph.open_core("CPU", 1).read_model(tmp_path / "scatter.onnx")
