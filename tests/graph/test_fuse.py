"""Fused norms and rotary embeddings: the numbers are PyTorch's, and what has another form stays as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from gap_export.graph.passes import operators, simplify
from gap_export.modeling.attention import OPSET
from tests.exported import GraphExporter

BATCH, HEADS, LENGTH, WIDTH = 2, 3, 5, 8
FREQUENCIES = 10000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)


class Rotary(nn.Module):
    """As transformers has it, with a switch for what only looks like it."""

    def __init__(self, *, scale: float = 1.0, halves: bool = True, same: bool = True) -> None:
        super().__init__()
        self._scale, self._halves, self._same = scale, halves, same

    def forward(self, x_BHSD: Tensor, ids_BS: Tensor) -> Tensor:
        angle = ids_BS[..., None].to(torch.float32) * FREQUENCIES
        wide = torch.cat((angle, angle if self._same else 2 * angle), dim=-1)
        cos, sin = (wide.cos() * self._scale).to(x_BHSD.dtype), (wide.sin() * self._scale).to(x_BHSD.dtype)
        if self._halves:
            return apply_rotary_pos_emb(x_BHSD, x_BHSD, cos, sin)[0]  # type: ignore[no-any-return]
        cut = WIDTH // 4
        turned = torch.cat((-x_BHSD[..., cut:], x_BHSD[..., :cut]), dim=-1)
        return x_BHSD * cos[:, None] + turned * sin[:, None]


def exported(module: nn.Module, arguments: tuple[Any, ...]) -> ir.Model:
    program = torch.onnx.export(
        module.eval(), arguments, opset_version=OPSET, dynamo=True, optimize=False, verbose=False
    )
    assert program is not None
    simplify(program.model)
    return program.model


def outcome(model: ir.Model, *arguments: Tensor) -> Any:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {given.name: value.numpy() for given, value in zip(session.get_inputs(), arguments, strict=True)}
    return session.run(None, feeds)[0]


@pytest.fixture
def gapped() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(BATCH, HEADS, LENGTH, WIDTH), torch.tensor([[0, 3, 4, 90, 577], [5, 6, 7, 8, 600]])


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_a_rotary_embedding_is_one_operator(scale: float, gapped: tuple[Tensor, Tensor]) -> None:
    module = Rotary(scale=scale)
    model = exported(module, gapped)
    counts = operators(model)
    assert counts["RotaryEmbedding"] == 1
    assert not {"Neg", "Slice"} & set(counts)
    np.testing.assert_allclose(outcome(model, *gapped), module(*gapped).numpy(), atol=2e-6)


@pytest.mark.parametrize("options", [{"halves": False}, {"same": False}])
def test_what_only_looks_like_one_stays(options: dict[str, bool], gapped: tuple[Tensor, Tensor]) -> None:
    module = Rotary(**options)
    model = exported(module, gapped)
    assert "RotaryEmbedding" not in operators(model)
    np.testing.assert_allclose(outcome(model, *gapped), module(*gapped).numpy(), atol=2e-6)


def test_in_half_precision_it_stays(gapped: tuple[Tensor, Tensor]) -> None:
    """The operator would take its cosines in half precision and multiply them so; ours come from fp32."""
    x, ids = gapped[0].half(), gapped[1]
    assert "RotaryEmbedding" not in operators(exported(Rotary(), (x, ids)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_is_one_operator(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(WIDTH, eps=1e-5).to(dtype)
    norm.weight.data = torch.randn(WIDTH).to(dtype)
    x = (torch.randn(BATCH, LENGTH, WIDTH) * 10).to(dtype)
    model = exported(norm, (x,))
    counts = operators(model)
    assert counts.pop("RMSNormalization") == 1
    assert not counts
    # In half precision transformers rounds before the weight and ONNX Runtime after it.
    tolerance = {"atol": 2e-6} if dtype is torch.float32 else {"rtol": 2**-9, "atol": 0}
    np.testing.assert_allclose(outcome(model, x), norm(x).detach().numpy(), **tolerance)


def test_a_norm_over_something_else_stays() -> None:
    class OverHeads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(WIDTH) * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5))

    x = torch.randn(BATCH, LENGTH, WIDTH)
    assert "RMSNormalization" not in operators(exported(OverHeads(), (x,)))


def test_a_real_decoder_has_neither_left(tiny_graph: GraphExporter) -> None:
    decoder = tiny_graph("decoder")
    layers = decoder.model.spec.layers
    graph = onnx.load(decoder.path, load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("RMSNormalization") == 2 * layers + 1
    assert kinds.count("RotaryEmbedding") == 2 * layers
    assert not {"Neg", "Pow", "Reciprocal"} & set(kinds)
