"""Gates: what was measured against what is demanded. Measuring knows nothing of thresholds; judging measures nothing."""

from __future__ import annotations

from typing import Literal

from gap_export.precision import Thresholds
from gap_export.records import Record

GROUNDING = Thresholds(max_accuracy_drop=0.05, min_box_iou=0.90, min_prediction_agreement=0.95)
"""What one evaluation must meet against another where nothing else is said: those of NVIDIA's own checks of grounding models."""


class Gate(Record):
    """One demand and whether it was met.

    Attributes:
        name: of what was measured.
        demand: how it must compare with the limit.
        limit: the threshold.
        measured: the value.
        passed: whether it does; a value that is not a number never does.
    """

    name: str
    demand: Literal["<=", ">="]
    limit: float
    measured: float
    passed: bool


def at_most(name: str, measured: float, limit: float) -> Gate:
    """A gate that larger values do not pass."""
    return Gate(name=name, demand="<=", limit=limit, measured=measured, passed=measured <= limit)


def at_least(name: str, measured: float, limit: float) -> Gate:
    """A gate that smaller values do not pass."""
    return Gate(name=name, demand=">=", limit=limit, measured=measured, passed=measured >= limit)
