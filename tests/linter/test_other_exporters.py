"""Decoders that other exporters wrote: the verdict is what each graph was measured to do.

`data/EXPORTER-GRAPH.TRUTH.onnx` are written by `bench/lint_exporters.py --store`, without weights: onnxruntime-genai's builder, optimum, mobius,
transformers' own exporter (plain, and fused for providers of ONNX Runtime), and torch called by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gap_export.linter import lint_graph

GRAPHS = sorted((Path(__file__).parent / "data").glob("*.onnx"))


def test_graphs_of_all_exporters_are_there() -> None:
    exporters = {path.name.partition("-")[0] for path in GRAPHS}
    assert exporters == {"genai", "mobius", "optimum", "torch", "transformers"}


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.name.removesuffix(".onnx"))
def test_the_verdict_is_what_was_measured(path: Path) -> None:
    truth = path.suffixes[-2].removeprefix(".").replace("_", " ")
    report = lint_graph(path, prove=True)
    assert report.verdict.answer == truth, report.verdict.reason
    assert report.attention_layers == 2
    assert report.proof is not None
    assert report.proof.outcome == "not run here"  # its weights are not there


def test_an_operator_that_onnx_runtime_writes_under_the_standards_name_is_named() -> None:
    fused = next(path for path in GRAPHS if path.name.startswith("transformers-cpu-prefill"))
    sentences = {finding.sentence for finding in lint_graph(fused).warnings}
    assert "ai.onnx::SimplifiedLayerNormalization is not a standard operator" in sentences
