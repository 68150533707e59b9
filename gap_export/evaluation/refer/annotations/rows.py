"""From a row of any format to an expression: what every reader asks of one, and what becomes of rows that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from gap_export.boxes.codecs import Box
from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations.format import BadRows, Expression, shown

HINT = "mend that row, or leave out all such rows (--skip-bad-rows counts and lists them)"

_LONGEST_SIDE = 1_000_000
"""Pixels; a larger number is a mistake, and arithmetic on it may overflow."""

_LONGEST_TEXT = 10_000
"""Characters: a table can name one text of megabytes in every row."""


class RowReader:
    """Reads fields of one row, and says which file, which row and which field where one cannot be used.

    Args:
        path: of the file.
        number: of the row, from 1.
        row: its fields.
        where: the place, for messages, where it is more than path and number.

    Attributes:
        where: the place.
        identity: of the row's expression, once it is known.
        identities: of all its expressions, where it may have several.
    """

    def __init__(self, path: Path, number: int, row: Any, *, where: str | None = None) -> None:
        self.where = where or f"{path}, row {number}"
        self.identity: str | None = None
        self.identities: tuple[str, ...] = ()
        self._row: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
        self._given = row

    def text(self, field: str) -> str:
        """A string with something in it."""
        value = self._field(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{field} is {shown(value)}, not a text")
        if len(value) > _LONGEST_TEXT:
            raise self.error(f"{field} has {len(value)} characters")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(f"{field} {shown(value)} holds half a character (a lone surrogate)") from error
        return value

    def key(self, field: str) -> str | int:
        """An id: a text or a whole number."""
        value = self._field(field)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.error(f"{field} is {shown(value)}, not an id")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise self.error(f"{field} is a number of more than 64 bits, not an id")
        return self.text(field) if isinstance(value, str) else value

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
        if isinstance(value, float) and value.is_integer():  # tables write whole numbers so
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LONGEST_SIDE:
            raise self.error(f"{field} is {shown(value)}, not a number of pixels")
        return value

    def expression(self, identity: str, image: str, text: str, box: Box) -> Expression:
        """Put together; a box wholly outside of the image is no box of it, and a name that leads out of a folder is no image in it."""
        if _leads_out(image):
            raise self.error(f"the image {shown(image)} leads out of the folder of images")
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
        return InputError(message, subject=self.where, hint=HINT)

    def _field(self, field: str) -> Any:
        if not isinstance(self._given, Mapping):
            raise self.error(f"is {shown(self._given)}, not an object")
        if field not in self._row:
            raise self.error(f"has no {field}, but {shown(sorted(map(str, self._row)))}")
        return self._row[field]

    def _four(self, field: str) -> tuple[float, float, float, float]:
        value = self._field(field)
        try:
            numbers = [] if isinstance(value, str | Mapping) else [float(number) for number in value]
        except (TypeError, ValueError, OverflowError):
            numbers = []
        if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
            raise self.error(f"{field} is {shown(value)}, not four finite numbers")
        return numbers[0], numbers[1], numbers[2], numbers[3]

    def _sound(self, box: Box, field: str) -> Box:
        if not all(map(math.isfinite, box)) or box[2] <= box[0] or box[3] <= box[1]:
            raise self.error(f"{field} {shown(self._row[field])} has no area")
        return box


def _leads_out(image: str) -> bool:
    """Whether a relative name climbs out of the folder that it is looked for in."""
    depth = 0
    for part in PurePosixPath(image).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return False


@contextmanager
def usable(reader: RowReader, bad_rows: BadRows) -> Iterator[None]:
    """Let a row pass that cannot be used, where such rows are to be skipped.

    Args:
        reader: of the row.
        bad_rows: of the file.

    Raises:
        InputError: of the row, where it is not to be skipped.
    """
    with bad_rows.around(lambda: reader.identities or ((reader.identity,) if reader.identity else ())):
        yield
