"""How the cache of a decoder is laid out: in runs of layers, each with as many slots as the tokens that its layers see.

A decoder whose layers all see the same tokens is one run. One that drops tokens between its layers has a run for every stage: what was
dropped leaves the cache of all later layers shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gap_export.bundle.spec import Dim

SLOT_STEP = 16
"""Caches are laid out in steps of so many slots, so that requests of similar length share a layout."""


def in_slot_steps(slots: int) -> int:
    """The next multiple of `SLOT_STEP`."""
    return -(-slots // SLOT_STEP) * SLOT_STEP


@dataclass(frozen=True)
class CacheRun:
    """Consecutive layers that see the same tokens.

    Attributes:
        layers: how many.
        capacity: most slots of each.
        dropped: tokens of the first run that these layers never see.
    """

    layers: int
    capacity: int
    dropped: int = 0


@dataclass(frozen=True)
class CacheLayout:
    """The cache of a decoder.

    Attributes:
        runs: from the first layer to the last.
        static: whether a cache always has all its slots, and not as many as a request needs.
    """

    runs: tuple[CacheRun, ...]
    static: bool

    @property
    def capacities(self) -> tuple[int, ...]:
        """Most slots, of every run."""
        return tuple(run.capacity for run in self.runs)

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dimensions that are the slots of every run; none where the cache is static."""
        if self.static:
            return ()
        return tuple(f"capacity_{n}" for n in range(len(self.runs))) if len(self.runs) > 1 else ("capacity",)

    @property
    def layer_extents(self) -> tuple[int | Dim, ...]:
        """The slots of every layer, as its tensors have them."""
        if self.static:
            return tuple(run.capacity for run in self.runs for _ in range(run.layers))
        return tuple(
            Dim(name=name, minimum=1, optimum=run.capacity, maximum=run.capacity)
            for name, run in zip(self.dims, self.runs, strict=True)
            for _ in range(run.layers)
        )

    def slots_for(self, needed: Sequence[int] | None = None) -> tuple[int, ...]:
        """Slots of every run that a runtime lays out for a request: attention runs over all of them, filled or not.

        Args:
            needed: of every run; None for all there are.

        Returns:
            What is needed, in steps of `SLOT_STEP`; where the cache is static, its capacity.
        """
        if needed is None or self.static:
            return self.capacities
        return tuple(
            min(in_slot_steps(slots), run.capacity) for slots, run in zip(needed, self.runs, strict=True)
        )

    def lengths_of(self, length: int, gone: Sequence[int] | None = None) -> list[int]:
        """Most tokens in every run of a prompt that has `length` in the first.

        Args:
            length: tokens.
            gone: how many of them every later run does not see, where prompts differ in that and it is known.
        """
        if gone is not None:
            return [length, *(length - dropped for dropped in gone)]
        return [length - run.dropped for run in self.runs]

    def total_slots(self, slots: Sequence[int]) -> int:
        """Slots of all layers together, where each layer of a run has `slots` of it."""
        return sum(count * run.layers for count, run in zip(slots, self.runs, strict=True))
