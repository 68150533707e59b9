"""What a trace costs besides the model: made once, and never at the expense of the graph."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest

from gap_export.graph import trace
from gap_export.modeling.components import Component


def test_torch_makes_its_table_of_functions_once(
    lookup: Callable[..., Component], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.onnx._internal.exporter import _registration

    made: list[int] = []
    own, list_functions = (
        _registration.ONNXRegistry.from_torchlib,
        _registration.onnxscript_apis.get_torchlib_ops,
    )

    def counted() -> object:
        made.append(1)
        return list_functions()

    monkeypatch.setattr(_registration.onnxscript_apis, "get_torchlib_ops", counted)
    trace._function_table.cache_clear()
    first, second = (
        ir.to_proto(trace.graph_from_component(lookup())).SerializeToString(deterministic=True)
        for _ in range(2)
    )
    assert made == [1]
    assert first == second, "the table is not used up"
    assert own == _registration.ONNXRegistry.from_torchlib, "torch is as it was"


def test_a_torch_without_that_table_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter import _registration

    monkeypatch.delattr(_registration.ONNXRegistry, "from_torchlib")
    with trace._one_function_table():
        assert not hasattr(_registration.ONNXRegistry, "from_torchlib")
