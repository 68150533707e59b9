"""Whether a graph takes and gives what its spec says: names, element types and shapes, each tensor found by its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gap_export.bundle.onnx_header import Extent, Interface, Tensor
from gap_export.bundle.spec import Dim, GraphSpec, TensorSpec


def interface_fault(spec: GraphSpec, found: Interface) -> str | None:
    """What a graph has otherwise than its spec.

    Extents that the spec gives as numbers are those numbers in the graph; what varies has a name there, the same for inputs that vary together.
    Outputs may leave an extent open, or have one that is computed.

    Args:
        spec: of the manifest.
        found: what the graph itself says.

    Returns:
        A phrase, e.g. "has no input position_ids"; None where all is well.
    """
    names: dict[str, Extent] = {}
    sides: tuple[tuple[str, Sequence[TensorSpec], Sequence[Tensor]], ...] = (
        ("input", spec.inputs, found.inputs),
        ("output", spec.outputs, found.outputs),
    )
    for what, wanted, there in sides:
        fault = _names_fault(what, [tensor.name for tensor in wanted], [tensor.name for tensor in there])
        if fault is not None:
            return fault
        by_name = {tensor.name: tensor for tensor in there}
        for tensor in wanted:
            if not _same(tensor, by_name[tensor.name], names if what == "input" else None):
                return (
                    f"has {what} {tensor.name} as {shown(by_name[tensor.name])}, "
                    f"where the manifest has {shown(tensor)}"
                )
    return None


def shown(tensor: TensorSpec | Tensor) -> str:
    """Type and shape in words: `float32 [batch 1..1..8, 36, 128]`, of what varies smallest, typical and largest extent."""
    if tensor.shape is None:
        return tensor.dtype
    return f"{tensor.dtype} [{', '.join(map(_extent_shown, tensor.shape))}]"


def _extent_shown(extent: Extent | Dim) -> str:
    if isinstance(extent, Dim):
        return f"{extent.name} {extent.minimum}..{extent.optimum}..{extent.maximum}"
    return "?" if extent is None else str(extent)


def _names_fault(what: str, wanted: list[str], there: list[str]) -> str | None:
    missing = [name for name in wanted if name not in there]
    more = [name for name in there if name not in wanted]
    twice = [name for name in there if there.count(name) > 1] if len(set(there)) < len(there) else []
    for names, phrase in ((missing, "has no"), (more, "has another"), (twice, "has more than one")):
        if names:
            return f"{phrase} {what} {_listed(names)}"
    return None


def _listed(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if others else first


def _same(spec: TensorSpec, tensor: Tensor, names: dict[str, Extent] | None) -> bool:
    """Whether a tensor is as its spec says.

    Args:
        spec: of the manifest.
        tensor: of the graph.
        names: dimension of the spec -> what the graph calls it, added to; None for outputs.
    """
    if spec.dtype != tensor.dtype:
        return False
    if tensor.shape is None:
        return names is None
    if len(spec.shape) != len(tensor.shape):
        return False
    return all(_same_extent(one, other, names) for one, other in zip(spec.shape, tensor.shape, strict=True))


def _same_extent(spec: int | Dim, extent: Extent, names: dict[str, Extent] | None) -> bool:
    if isinstance(spec, int):
        return extent == spec or (names is None and not isinstance(extent, int))
    if isinstance(extent, int):
        # (Images that differ go through the vision graph one by one, and splice takes them together.)
        return spec.minimum <= extent <= spec.maximum and (names is None or spec.minimum == spec.maximum)
    return names is None or (extent is not None and names.setdefault(spec.name, extent) == extent)
