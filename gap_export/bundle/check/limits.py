"""Faults: phrases about one field each; and the fields that leave their limits.

Limits are far above what models have, and low enough that nothing that follows from them is large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gap_export.errors import shown

MOST_VISUAL_TOKENS = 2**20
LARGEST_VOCABULARY = 2**24
MOST_PIXELS = 100_000_000
"""Of an image as the model sees it: 1.2 GB of floats."""

Faults = Iterator[str]
Bound = tuple[str, float, float, float]
"""Name of a field, its value, its smallest and its largest."""


def outside(bounds: Iterable[Bound]) -> Faults:
    """The fields that leave their bounds."""
    for field, value, least, most in bounds:
        if not least <= value <= most:  # so that NaN leaves them too
            yield f"{field} is {shown(value)}, and is from {least} to {most}"
