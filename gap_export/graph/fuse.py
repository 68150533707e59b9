"""One operator where the standard has one: `RMSNormalization` and `RotaryEmbedding` (opset 23) for what torch's exporter takes apart.

A token passes hundreds of tiny operators, and on a CPU each costs a few microseconds whatever it computes: fused, the decoder of a
135M-class model has 731 nodes less of 1779. `RotaryEmbedding` gets rows of cosines and sines that are computed from `position_ids` in
fp32, not the ids themselves, and stays outside attention: gaps are read as they are.

In half precision only the norms are fused, with their arithmetic kept in fp32 (`stash_type`) as transformers has it; the operator for
rotary embeddings wants its cosines in the type of what it rotates, and that costs a thousandth (`docs/decisions/0010`).
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from gap_export.graph.constants import integers, scalar

_HEADS_FIRST = 4
"""Rank of [B, heads, S, D]."""


def fuse(model: ir.Model) -> None:
    """Fuse norms and rotary embeddings; in place. Whatever has another form stays as it is."""
    pattern.RewriteRuleSet([_NormOfMean.rule(), _Rotation.rule()]).apply_to_model(model)


class _NormOfMean(pattern.RewriteRuleClassBase):  # type: ignore[misc]  # a class without types
    """weight * (x / sqrt(mean(x^2) + epsilon)) (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization")."""

    def pattern(self, op: Any, x: Any, weight: Any, epsilon: Any, wide: Any, narrow: Any) -> Any:
        """As transformers writes it, with or without a detour through fp32."""
        x = pattern.OrValue([op.Cast(x, to=wide), x])
        mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1, noop_with_empty_axes=0)
        scaled = op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon))))
        scaled = pattern.OrValue([op.Cast(scaled, to=narrow), scaled])
        return op.Mul(weight, scaled)

    def check(self, context: Any, x: ir.Value, weight: ir.Value, epsilon: ir.Value, **_: Any) -> Any:
        """The operator computes in fp32 and gives back the type of its weight."""
        result = pattern.MatchResult()
        if (
            x.dtype != weight.dtype
            or scalar(epsilon) is None
            or weight.shape is None
            or len(weight.shape) != 1
        ):
            result.fail("is not a norm over the last axis")
        return result

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, epsilon: ir.Value, **_: Any) -> Any:
        """One node."""
        attributes = {"axis": -1, "epsilon": scalar(epsilon), "stash_type": int(ir.DataType.FLOAT)}
        return op.RMSNormalization(x, weight, **attributes)


class _Rotation(pattern.RewriteRuleClassBase):  # type: ignore[misc]  # a class without types
    """x * cos + rotate_half(x) * sin (Su et al. 2021, "RoFormer", in the order of halves that transformers uses)."""

    def __init__(self) -> None:
        # Cosines are shared by all layers: they must outlive the first match, and dead nodes are removed afterwards.
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, ends: Any) -> Any:
        """Halves may be cut by any numbers here; `check` looks at them."""
        first = op.Slice(x, _allow_other_inputs=True, _outputs=["first"])
        second = op.Slice(x, _allow_other_inputs=True, _outputs=["second"])
        rotated = op.Concat(op.Neg(second), first, axis=-1)
        return op.Add(op.Mul(x, cos), op.Mul(rotated, sin))

    def check(
        self,
        context: Any,
        x: ir.Value,
        cos: ir.Value,
        sin: ir.Value,
        first: ir.Value,
        second: ir.Value,
        **_: Any,
    ) -> Any:
        """Halves are halves, and cosines and sines repeat their first half."""
        result = pattern.MatchResult()
        width = x.shape[-1] if x.shape is not None and len(x.shape) == _HEADS_FIRST else None
        if not isinstance(width, int) or x.dtype != ir.DataType.FLOAT:
            result.fail("is not in fp32, or not of a known head size")
        elif _cut(first) != (0, width // 2) or _cut(second) != (width // 2, width):
            result.fail("is not rotated by halves")
        elif _half_angle(cos, "Cos") is None or _half_angle(sin, "Sin") is None:
            result.fail("has cosines of another form")
        return result

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any) -> Any:
        """One node, and the cosines and sines of half the width."""
        rows = []
        for kind, whole in (("Cos", cos), ("Sin", sin)):
            found = _half_angle(whole, kind)
            assert found is not None  # `check` saw it
            half = getattr(op, kind)(found[0])
            rows.append(half if found[1] is None else op.Mul(half, found[1]))
        return op.RotaryEmbedding(x, *rows)


def _half_angle(value: ir.Value, kind: str) -> tuple[ir.Value, ir.Value | None] | None:
    """(angles [B, S, D/2], factor) of Unsqueeze(kind(Concat(angles, angles)) * factor, 1); None for any other form."""
    spread = _made_by(value, "Unsqueeze")
    if spread is None or integers(spread.inputs[1]) != [1]:
        return None
    rows, factor = spread.inputs[0], None
    scaled = _made_by(rows, "Mul")
    if scaled is not None:
        rows, factor = scaled.inputs
        if scalar(factor) is None:
            return None
    waves = _made_by(rows, kind)
    joined = None if waves is None else _made_by(waves.inputs[0], "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.attributes["axis"].as_int() not in (-1, 2):
        return None
    angle, again = joined.inputs
    if angle is None or angle is not again:
        return None
    return angle, None if factor is None or scalar(factor) == 1 else factor


def _cut(value: ir.Value) -> tuple[int, int] | None:
    """(first, end) of a Slice of the last axis; the end at most the axis' own."""
    node = _made_by(value, "Slice")
    whole = None if node is None or node.inputs[0] is None else node.inputs[0].shape
    if node is None or whole is None or len(node.inputs) != 5:
        return None
    start, end, axis, step = (integers(operand) for operand in node.inputs[1:])
    width = whole[-1]
    if (
        axis not in ([len(whole) - 1], [-1])
        or step != [1]
        or not start
        or not end
        or not isinstance(width, int)
    ):
        return None
    return start[0], min(end[0], width)


def _made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None
