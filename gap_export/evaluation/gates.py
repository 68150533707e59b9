"""Gates: what was measured against what is required. Measuring knows nothing of thresholds; judging measures nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gap_export.errors import GateError
from gap_export.precision import Thresholds
from gap_export.records import Flag, Number, Record

GROUNDING = Thresholds(max_accuracy_drop=0.05, min_box_iou=0.90, min_prediction_agreement=0.95)
"""What one evaluation must meet against another where nothing else is said: those of NVIDIA's own checks of grounding models."""


def _not_a_number(value: Any) -> Any:
    return float("nan") if value is None else value


Measured = Annotated[float, Field(allow_inf_nan=True, strict=True), BeforeValidator(_not_a_number)]
"""A float that may be anything. JSON has no word for what is no finite number: it is stored as null, and read as NaN."""


class Gate(Record):
    """One bound and whether it was met.

    Attributes:
        name: of what was measured.
        comparison: how it must compare with the limit.
        limit: the threshold.
        measured: the value.
        passed: whether it does; a value that is not a number never does.
    """

    name: str
    comparison: Literal["<=", ">="]
    limit: Number
    measured: Measured
    passed: Flag

    @model_validator(mode="after")
    def _says_what_was_measured(self) -> Self:
        met = self.measured <= self.limit if self.comparison == "<=" else self.measured >= self.limit
        if self.passed != met:
            raise ValueError(
                f"{self.name} {self.measured:g} {self.comparison} {self.limit:g} is not {self.passed}"
            )
        return self


def at_most(name: str, measured: float, limit: float) -> Gate:
    """A gate that larger values do not pass."""
    return Gate(name=name, comparison="<=", limit=limit, measured=measured, passed=measured <= limit)


def at_least(name: str, measured: float, limit: float) -> Gate:
    """A gate that smaller values do not pass."""
    return Gate(name=name, comparison=">=", limit=limit, measured=measured, passed=measured >= limit)


def check_gates(gates: Iterable[Gate], *, subject: str) -> None:
    """Go on only where every gate was met.

    Args:
        gates: checked.
        subject: what was checked.

    Raises:
        GateError: one was not, with all of those.
    """
    failed = [
        f"{gate.name} {gate.measured:.6g}, not {gate.comparison} {gate.limit:g}"
        for gate in gates
        if not gate.passed
    ]
    if failed:
        raise GateError(
            f"does not meet {'; '.join(failed)}",
            subject=subject,
            hint="the record says what was measured; thresholds are those of the recipe (gates) or of the call",
        )
