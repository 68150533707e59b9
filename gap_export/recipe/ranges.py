"""Activation ranges (amax): what precisions need whose activations have a scale before they run.

    {"gap_export": "0.1.0", "bundle": "shapes", "family": "llava", "samples": 128, "source": "scenes", "largest": {PARAMETER: 3.2, ...}}

A range belongs to the weight that the activation is multiplied with, by the name it has in the graph. Names do not depend on pruner,
share or precision, so one file serves all bundles of a model.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from pydantic import Field

from gap_export.errors import RecipeError
from gap_export.files.kinds import RANGES as RANGES_FILE
from gap_export.records import Record

RANGES = "ranges.json"
"""Its name in a bundle that was built with it."""


class Ranges(Record):
    """What `calibrate` measured.

    Attributes:
        gap_export: version that wrote it.
        bundle: name of the bundle it was measured on.
        family: of the model.
        checkpoint: of the model.
        samples: how many questions were answered.
        source: where they are from.
        largest: parameter of the decoder -> largest magnitude of what it was multiplied with.
    """

    gap_export: str
    bundle: str
    family: str
    checkpoint: str
    samples: int = Field(ge=1, lt=2**53, strict=True)
    source: str
    largest: dict[str, Annotated[float, Field(ge=0, strict=True)]]

    def check_covers(self, parameters: Collection[str], family: str) -> None:
        """Refuse ranges that are of another model.

        Args:
            parameters: that need one.
            family: of the model that is built.

        Raises:
            RecipeError: a range is missing.
        """
        missing = sorted(set(parameters) - set(self.largest))
        if missing or family != self.family:
            what = f"no range of {missing[0]}" if missing else f"ranges of family {self.family!r}"
            raise RecipeError(
                f"has {what}, so it is of another model than this {family}",
                subject=f"ranges of {self.bundle} ({self.checkpoint})",
                hint=CALIBRATE,
            )


CALIBRATE = (
    "build the model with --precision fp32 (or fp16), run `gap-export calibrate BUNDLE -o ranges.json`, and "
    "build again with --ranges ranges.json"
)


def is_ranges(path: Path) -> bool:
    """Whether a file holds ranges, of this version."""
    try:
        read_ranges(path)
    except RecipeError:
        return False
    return True


def read_ranges(path: Path) -> Ranges:
    """Read a file of ranges.

    Raises:
        RecipeError: it is not there, or is no such file.
    """
    return Ranges.read(path, hint=CALIBRATE, error=RecipeError, kind=RANGES_FILE)
