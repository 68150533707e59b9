"""What a trace costs besides the model: made once, and never at the expense of the graph."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx_ir.passes import common
from torch import nn

from gap_export.bundle.spec import Dim, GraphSpec, TensorSpec
from gap_export.graph import trace
from gap_export.modeling.components import Component
from gap_export.modeling.fake import fake_mode
from gap_export.modeling.splice import Embed


def _lookup() -> Component:
    with fake_mode():
        module = Embed(nn.Embedding(8, 4)).eval()
    batch = Dim(name="batch", minimum=1, optimum=1, maximum=4)
    given = TensorSpec(name="input_ids", dtype="int64", shape=(batch, 3))
    made = TensorSpec(name="inputs_embeds", dtype="float32", shape=(batch, 3, 4))
    spec = GraphSpec(name="embed", inputs=(given,), outputs=(made,))
    return Component(module=module, spec=spec, weight_key=str)


def _bytes_of(model: ir.Model) -> bytes:
    common.ClearMetadataAndDocStringPass()(model)
    for value in model.graph.initializers.values():
        if trace.is_fake(value.const_value):
            value.const_value = None
    return ir.to_proto(model).SerializeToString()


def test_torch_makes_its_table_of_functions_once(monkeypatch: pytest.MonkeyPatch) -> None:
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
    first, second = (_bytes_of(trace.graph_from_component(_lookup())) for _ in range(2))
    assert made == [1]
    assert first == second, "the table is not used up"
    assert own == _registration.ONNXRegistry.from_torchlib, "torch is as it was"


def test_a_torch_without_that_table_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter import _registration

    monkeypatch.delattr(_registration.ONNXRegistry, "from_torchlib")
    with trace._one_function_table():
        assert not hasattr(_registration.ONNXRegistry, "from_torchlib")
