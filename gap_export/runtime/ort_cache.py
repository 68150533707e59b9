"""The cache of a session of ONNX Runtime: one block of memory for every past, of which requests use as much as they need.

Past and present of a layer are one region, so the cache is updated in place. Smaller layouts use the beginning of the blocks of larger ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gap_export.bundle.cache_layout import CacheLayout
from gap_export.bundle.spec import GraphSpec, TensorSpec
from gap_export.errors import SessionError
from gap_export.runtime.ort_memory import Memory, Region


@dataclass(frozen=True)
class Layout:
    """Rows of the cache, and slots of every stage."""

    rows: int
    capacities: tuple[int, ...]


class Cache:
    """Keys and values of every layer.

    Args:
        spec: of the graph that reads single tokens.
        slots: what the bundle says of its cache.
        memory: where it lies.

    Attributes:
        layout: of what is in it now.
    """

    def __init__(self, spec: GraphSpec, slots: CacheLayout, memory: Memory) -> None:
        cached = set(spec.aliased.values())
        self._pasts: tuple[TensorSpec, ...] = tuple(each for each in spec.inputs if each.name in cached)
        self._slots, self._memory = slots, memory
        self._blocks: dict[str, Region] = {}  # flat, of the largest cache so far
        self._sizes: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.layout = Layout(0, ())

    def lay_out(self, layout: Layout) -> bool:
        """Give it so many rows of so many slots; with as many slots as before, what lies in the first row stays. If memory is missing, nothing has changed.

        Returns:
            Whether it lies elsewhere now than what was bound before.
        """
        if layout == self.layout:
            return False
        shapes = {each.name: self._shape_of(each, layout) for each in self._pasts}
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        moves = not self._blocks or any(size > self._sizes[name] for name, size in sizes.items())
        if moves:
            largest = {name: max(size, self._sizes.get(name, 0)) for name, size in sizes.items()}
            blocks = self._new_blocks({name: (size,) for name, size in largest.items()})
            for name, block in self._blocks.items():
                self._memory.copy(self._memory.part(blocks[name], (self._sizes[name],)), block)
            self._blocks, self._sizes = blocks, largest
        self.layout, self._shapes = layout, shapes
        return moves

    def grow(self, capacities: tuple[int, ...]) -> bool:
        """Give every row at least so many slots of every stage; what lies in them stays. If memory is missing, nothing has changed.

        Returns:
            Whether it lies elsewhere now than what was bound before.
        """
        wanted = tuple(map(max, capacities, self.layout.capacities))
        if wanted == self.layout.capacities:
            return False
        before, layout = self._shapes, Layout(self.layout.rows, wanted)
        shapes = {each.name: self._shape_of(each, layout) for each in self._pasts}
        moves = any(math.prod(shape) > self._sizes[name] for name, shape in shapes.items())
        if moves:
            sources, blocks = self._blocks, self._new_blocks(shapes)
            for name, shape in before.items():
                self._copy_heads(sources[name], shape, blocks[name], shapes[name])
            self._blocks, self._sizes = blocks, {name: math.prod(shape) for name, shape in shapes.items()}
        else:
            self._spread(before, shapes)
        self.layout, self._shapes = layout, shapes
        return moves

    def _spread(self, before: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]]) -> None:
        """Move the slots of every head apart, within blocks that are large enough."""
        largest = {
            each.dtype: max(
                math.prod(before[other.name]) for other in self._pasts if other.dtype == each.dtype
            )
            for each in self._pasts
        }
        held = {dtype: self._memory.zeros((size,), dtype) for dtype, size in largest.items()}
        for each in self._pasts:
            block, shape = self._blocks[each.name], before[each.name]
            copy = self._memory.part(held[each.dtype], shape)
            self._memory.copy(copy, self._memory.part(block, shape))
            self._memory.clear(self._memory.part(block, shapes[each.name]))
            self._copy_heads(copy, shape, block, shapes[each.name])

    def _copy_heads(
        self, source: Region, source_shape: tuple[int, ...], target: Region, target_shape: tuple[int, ...]
    ) -> None:
        """Copy the slots of every head of every row to where the longer cache has them."""
        length, longer = math.prod(source_shape[2:]), math.prod(target_shape[2:])
        for head in range(math.prod(source_shape[:2])):
            here = self._memory.part(target, (length,), head * longer)
            self._memory.copy(here, self._memory.part(source, (length,), head * length))

    def views(self, first: int = 0, rows: int | None = None) -> dict[str, Region]:
        """Every past [B, G, C, D], or some rows of it, by the names of the graph's inputs."""
        return {
            name: self._memory.part(
                self._blocks[name],
                (self.layout.rows - first if rows is None else rows, *shape[1:]),
                first * math.prod(shape[1:]),
            )
            for name, shape in self._shapes.items()
        }

    def row(self, row: int) -> dict[str, Region]:
        """One row.

        Raises:
            SessionError: there is no such row.
        """
        if not 0 <= row < self.layout.rows:
            raise SessionError(
                f"is not there: the cache has {self.layout.rows}",
                subject=f"row {row}",
                hint="open as many rows as there are requests",
            )
        return self.views(row, 1)

    def check_fits(self, row: int, needed: Sequence[int]) -> None:
        """Refuse what needs more slots, in any stage, than a row has.

        Raises:
            SessionError: with both numbers.
        """
        for slots, there in zip(needed, self.layout.capacities, strict=False):
            if slots > there:
                raise SessionError(
                    f"has {there} slots, and {slots} are needed",
                    subject=f"row {row} of the cache",
                    hint="open rows with more slots",
                )

    def copy_row(self, source: int, target: int) -> None:
        """Give a row what another holds."""
        there, here = self.row(source), self.row(target)
        for name, region in there.items():
            self._memory.copy(here[name], region)

    def clear(self, row: int | None = None) -> None:
        """Forget what a row holds, or everything."""
        for region in (self.views() if row is None else self.row(row)).values():
            self._memory.clear(region)

    def release(self) -> None:
        """Give the memory back."""
        self.layout = Layout(0, ())
        for held in (self._blocks, self._sizes, self._shapes):
            held.clear()

    def _new_blocks(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Region]:
        return {
            each.name: self._memory.zeros((math.prod(shapes[each.name]),), each.dtype) for each in self._pasts
        }

    def _shape_of(self, past: TensorSpec, layout: Layout) -> tuple[int, ...]:
        extents = {
            "batch": layout.rows,
            **dict(zip(self._slots.dims, layout.capacities, strict=False)),
        }
        return tuple(dim if isinstance(dim, int) else extents[dim.name] for dim in past.shape)
