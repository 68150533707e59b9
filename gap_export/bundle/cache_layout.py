"""How many slots a cache is laid out with."""

from __future__ import annotations

SLOT_STEP = 16
"""Caches are laid out in steps of so many slots, so that requests of similar length share a layout."""


def in_slot_steps(slots: int) -> int:
    """The next multiple of `SLOT_STEP`."""
    return -(-slots // SLOT_STEP) * SLOT_STEP
