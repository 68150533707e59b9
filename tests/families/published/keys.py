"""Keys and shapes, written as data: what layers hold, and the beginnings under which parts of a model are published."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.{part}": (width,) for part in (("weight", "bias") if bias else ("weight",))}


def stack(name: str, depth: int, layer: Shapes) -> Shapes:
    """So many layers that hold the same."""
    return {f"{name}.{number}.{key}": shape for number in range(depth) for key, shape in layer.items()}


def named(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + key: shape for key, shape in shapes.items()}


def new_names(decoder: Shapes, others: Shapes) -> Shapes:
    """Everything as transformers names it from 4.52 on: under `model.`, the head alone outside."""
    inner = {key.replace("model.", "language_model.", 1): shape for key, shape in decoder.items()}
    head = {key: inner.pop(key) for key in decoder if key.startswith("lm_head.")}
    return {**named("model.", {**inner, **others}), **head}
