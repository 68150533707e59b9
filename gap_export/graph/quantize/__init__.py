"""Low precision: matrix products whose weights have few bits; activations and everything else are floats.

A scheme is a module with four functions (`scheme.Scheme`): which weights it fits, what it makes of them, how it rounds, and which
nodes take the place of a matrix product. A precision (`gap_export.precision`) says which layers get which scheme.

    int8         QuantizeLinear -> MatMulInteger -> scales. One scale per column of the weight, and per token of the activations a scale and
                 a midpoint, found while running.
    int8_fine    the same with the activations in two pieces, and the product made of both.
    int8_blocks  DequantizeLinear in blocks of 32 along the input -> MatMul. Runtimes read eight bits and multiply in one go (ONNX Runtime:
                 `MatMulNBits`).
    int4         the same in four bits.
    uint4        the same with a zero point per block.
    fp8          QuantizeLinear -> DequantizeLinear for activations and DequantizeLinear for weights -> MatMul. Engines multiply E4M3 by
                 E4M3.
    nvfp4        the same places in E2M1, with a scale per block of 16: activations by TensorRT's own operator, whose block scales are
                 found while running.

Activations of fp8 and nvfp4 have one scale that is measured beforehand (`recipe/ranges.py`). Schemes of blocks of even steps can make up for errors
of rounding (`compensate.py`), where a text is given that the decoder reads meanwhile (`calibration.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gap_export.graph.quantize.rewrite import DECODERS, quantize, schemes_of
from gap_export.graph.quantize.store import QuantizedStore

if TYPE_CHECKING:  # schemes are imported by name; here they are held against the contract
    from gap_export.graph.quantize import fp8, int4, int8, int8_blocks, int8_fine, nvfp4, uint4
    from gap_export.graph.quantize.scheme import BlockScheme, Scheme

    _SCHEMES: tuple[Scheme, ...] = (int8, int8_fine, int8_blocks, int4, uint4, fp8, nvfp4)
    _BLOCK_SCHEMES: tuple[BlockScheme, ...] = (int4, uint4)

__all__ = ["DECODERS", "QuantizedStore", "quantize", "schemes_of"]
