"""From a row of any format to an expression: what every reader asks of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gap_export.boxes.codecs import Box
from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations.format import Expression, shown


class RowReader:
    """Reads fields of one row, and says which file, which row and which field where one cannot be used.

    Args:
        path: of the file.
        number: of the row, from 1.
        row: its fields.
    """

    def __init__(self, path: Path, number: int, row: Mapping[str, Any]) -> None:
        self._path, self._number, self._row = path, number, row

    def text(self, field: str) -> str:
        """A string with something in it."""
        value = self._field(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{field} is {shown(value)}, not a text")
        return value

    def corners(self, field: str) -> Box:
        """A box given by two corners."""
        x1, y1, x2, y2 = self._four(field)
        return self._sound((x1, y1, x2, y2), field)

    def extents(self, field: str) -> Box:
        """A box given by a corner, width and height."""
        x, y, width, height = self._four(field)
        return self._sound((x, y, x + width, y + height), field)

    def pixels(self, field: str) -> int | None:
        """An extent of the image, where there is one."""
        value = self._row.get(field)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{field} is {shown(value)}, not a number of pixels")
        return value

    def expression(self, identity: str, image: str, text: str, box: Box) -> Expression:
        """Put together; a box wholly outside of the image is no box of it."""
        width, height = self.pixels("width"), self.pixels("height")
        x1, y1, x2, y2 = box
        outside = (
            x2 <= 0 or y2 <= 0 or (width is not None and x1 >= width) or (height is not None and y1 >= height)
        )
        if outside:
            raise self.error(f"the box {shown(list(box))} lies outside of the image of {width}x{height}")
        return Expression(identity, image, " ".join(text.split()), box, width, height)

    def error(self, message: str) -> InputError:
        """What is wrong with this row."""
        return InputError(
            message, subject=f"{self._path}, row {self._number}", hint="mend or leave out that row"
        )

    def _field(self, field: str) -> Any:
        if field not in self._row:
            raise self.error(f"has no {field}, but {shown(sorted(self._row))}")
        return self._row[field]

    def _four(self, field: str) -> tuple[float, float, float, float]:
        value = self._field(field)
        try:
            numbers = [float(number) for number in value]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
            raise self.error(f"{field} is {shown(value)}, not four finite numbers")
        return numbers[0], numbers[1], numbers[2], numbers[3]

    def _sound(self, box: Box, field: str) -> Box:
        if box[2] <= box[0] or box[3] <= box[1]:
            raise self.error(f"{field} {shown(self._row[field])} has no area")
        return box
