"""Numbers that a graph states: the content of initializers and Constant nodes."""

from __future__ import annotations

import onnx_ir as ir


def integers(value: ir.Value | None) -> list[int] | None:
    """All elements in order; None for what is computed, or not there."""
    content = None if value is None else ir.convenience.get_const_tensor(value)
    return None if content is None else [int(number) for number in content.numpy().reshape(-1)]


def scalar(value: ir.Value | None) -> float | None:
    """The only element; None for what is computed, has several elements, or is not there."""
    content = None if value is None else ir.convenience.get_const_tensor(value)
    return None if content is None or content.size != 1 else float(content.numpy().reshape(-1)[0])
