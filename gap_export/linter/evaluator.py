"""The reference evaluator of the onnx package, held to a limit: of nodes that it runs, and of bytes that their results take.

A loop of 10^12 steps would run for ever, and `ConstantOfShape` of 10^12 elements takes a terabyte. How much a node is about to make is told
from what it is given, before it runs; bodies of If, Loop and Scan are watched too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from gap_export.linter.limits import MOST_EVALUATED_BYTES, NODE_WORK, Work

_BYTES_PER_ELEMENT = 8
_TEXT_BYTES = 64
_FEW = 2**17
"""Elements that are no matter, so that need not be told exactly."""
_SIZED = frozenset({"ConstantOfShape", "Expand", "Range", "Tile", "OneHot", "Pad"})
"""Operators that are given the size of their result."""
_UNTOLD = frozenset(
    {
        "Resize",
        "Upsample",
        "RandomNormal",
        "RandomUniform",
        "Multinomial",
        "AffineGrid",
        "GridSample",
        "DFT",
        "STFT",
    }
    | {
        "HannWindow",
        "HammingWindow",
        "BlackmanWindow",
        "MelWeightMatrix",
        "Col2Im",
        "MaxUnpool",
        "CenterCropPad",
    }
    | {
        "Conv",
        "ConvInteger",
        "QLinearConv",
        "ConvTranspose",
        "DeformConv",
        "AveragePool",
        "MaxPool",
        "LpPool",
    }
    | {
        "RoiAlign",
        "MaxRoiPool",
        "ImageDecoder",
        "Attention",
        "StringConcat",
        "StringSplit",
        "TfIdfVectorizer",
    }
    | {"RNN", "LSTM", "GRU"}
)
"""Operators whose results may be far larger than what they are given; no rotary angle and no mask is made with them."""


class TooMuch(Exception):
    """An evaluation takes more memory than it may, or cannot be told to take less."""


class Budget:
    """What one evaluation may still make.

    Args:
        work: of the graph; its steps are counted there.
    """

    def __init__(self, work: Work) -> None:
        self._work, self._left = work, MOST_EVALUATED_BYTES

    def start(self) -> None:
        """Begin an evaluation: nothing of an earlier one is held any more."""
        self._left = MOST_EVALUATED_BYTES

    def before(self, node: Any, inputs: Sequence[Any]) -> None:
        """Count a node that is about to run.

        Raises:
            TooMuch: its result would not fit.
            LintError: too much has been done for the graph.
        """
        elements = elements_of(node, inputs)
        if elements * _BYTES_PER_ELEMENT > self._left:
            raise TooMuch(f"{node.op_type} would make {elements} elements")
        self._work.take(NODE_WORK + elements // 1024)

    def after(self, outputs: Iterable[Any]) -> None:
        """Count what a node made."""
        self._left -= sum(_bytes(output) for output in outputs)


def evaluator_of(model: onnx.ModelProto, budget: Budget) -> ReferenceEvaluator:
    """The evaluator of a model, and of all bodies in it, with one budget.

    Raises:
        Exception: what the evaluator raises of operators or opsets that it does not know.
    """

    class Bounded(ReferenceEvaluator):
        """Bodies are evaluated by the class of the evaluator that holds them."""

        def _init(self) -> None:
            super()._init()
            for node in self.rt_nodes_:
                _watch(node, budget)

        def run(self, *given: Any, **options: Any) -> Any:
            budget.before(self, ())  # a body without nodes is a step of its loop too
            return super().run(*given, **options)

        op_type = "(body)"

    return Bounded(model)


def _watch(node: Any, budget: Budget) -> None:
    """Count a node of an evaluator whenever it runs."""
    run = node.run

    def watched(*inputs: Any, **options: Any) -> Any:
        budget.before(node, inputs)
        outputs = run(*inputs, **options)
        budget.after(outputs)
        return outputs

    node.run = watched


def elements_of(node: Any, inputs: Sequence[Any]) -> int:
    """At least as many elements as the largest result, or table on the way to it, will have.

    Args:
        node: with `op_type`, and attributes as attributes.
        inputs: arrays, lists of arrays, or None for what was left out.

    Raises:
        TooMuch: it cannot be told.
    """
    op = str(node.op_type)
    if op in _UNTOLD:
        raise TooMuch(f"how much {op} makes cannot be told")
    if op not in _SIZED:
        # Nothing else makes more than every element of each input with every one of the others.
        pairs = math.prod([given.size or 1 if isinstance(given, np.ndarray) else _FEW for given in inputs])
        if pairs < _FEW:
            return pairs
    arrays = [
        np.asarray(each) for given in inputs for each in (given if isinstance(given, list) else [given])
    ]
    shapes = [array.shape for array in arrays]
    if op in _BY_VALUES and inputs:
        try:
            return int(_BY_VALUES[op](node, arrays))
        except (IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
            raise TooMuch(f"how much {op} makes cannot be told") from error
    elements = max(sum(math.prod(shape) for shape in shapes), math.prod(_broadcast(shapes)))
    is_text = op == "Cast" and getattr(node, "to", None) == onnx.TensorProto.STRING
    return elements * _TEXT_BYTES // _BYTES_PER_ELEMENT if is_text else elements


def _broadcast(shapes: Sequence[Sequence[int]]) -> list[int]:
    """The largest extent on every axis, as broadcasting aligns them."""
    rank = max(map(len, shapes), default=0)
    return [max(s[axis - rank] for s in shapes if len(s) >= rank - axis) for axis in range(rank)]


def _ints(array: np.ndarray[Any, Any]) -> list[int]:
    return [max(int(each), 0) for each in array.reshape(-1)[:64]]


def _expanded(node: Any, given: list[Any]) -> int:
    return math.prod(_broadcast([given[0].shape, _ints(given[1])]))


def _counted(node: Any, given: list[Any]) -> int:
    start, end, step = (each.reshape(-1)[0].item() for each in given[:3])
    return max(int((end - start) / step) + 1, 0)


def _padded(node: Any, given: list[Any]) -> int:
    pads = given[1] if len(given) > 1 else np.asarray(node.pads)
    return math.prod(extent + sum(_ints(pads)) for extent in given[0].shape)


def _gathered(node: Any, given: list[Any]) -> int:
    data, index = given[:2]
    return int(index.size * data.size // max(data.shape[int(node.axis or 0)], 1))


def _gathered_nd(node: Any, given: list[Any]) -> int:
    data, index = given[:2]
    taken = index.shape[-1] + int(getattr(node, "batch_dims", 0) or 0)
    return int(math.prod(index.shape[:-1]) * math.prod(data.shape[taken:]))


def _multiplied(node: Any, given: list[Any]) -> int:
    a, b = (each if each.ndim > 1 else each.reshape(1, -1) for each in given[:2])
    batch = math.prod(_broadcast([a.shape[:-2], b.shape[:-2]]))
    return int(batch * max(a.shape[-2:]) * max(b.shape[-2:]))


_BY_VALUES = {
    "ConstantOfShape": lambda node, given: math.prod(_ints(given[0])),
    "Expand": _expanded,
    "Range": _counted,
    "Tile": lambda node, given: given[0].size * math.prod(_ints(given[1])),
    "OneHot": lambda node, given: given[0].size * sum(_ints(given[1])),
    "Pad": _padded,
    "Gather": _gathered,
    "GatherND": _gathered_nd,
    "MatMul": _multiplied,
    "MatMulInteger": _multiplied,
    "Gemm": _multiplied,
    "Einsum": lambda node, given: math.prod(each.size for each in given),
}
"""Operator -> how many elements its result has."""


def _bytes(output: Any) -> int:
    if isinstance(output, list):
        return sum(_bytes(each) for each in output)
    return int(getattr(output, "nbytes", 0))
