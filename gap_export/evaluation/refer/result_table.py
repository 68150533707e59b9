"""The table of an evaluation: one row per expression, written to Parquet and read back, checked field by field."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gap_export.boxes import metrics
from gap_export.boxes.codecs import Box
from gap_export.errors import InputError
from gap_export.evaluation.refer.tables import Table
from gap_export.files.kinds import RESULTS


@dataclass(frozen=True)
class ResultRow:
    """One expression, its answer and how that scored.

    Attributes:
        id: of the expression.
        image: as the annotations name it.
        expression: what was asked for.
        answer: text.
        truth: the true box, pixels.
        box: that the answer gave, pixels, as the evaluator places it; None without one.
        iou: of both.
        hit: under the protocol.
        no_box_because: why there is no box; None where there is one.
        tokens: generated.
        kept_indices: raster indices of the visual tokens that were kept.
        seconds: of the image's work, in equal parts among its expressions.
    """

    id: str
    image: str
    expression: str
    answer: str
    truth: Box
    box: Box | None
    iou: float
    hit: bool
    no_box_because: str | None
    tokens: int
    kept_indices: tuple[int, ...]
    seconds: float


def table_of(rows: Iterable[ResultRow]) -> bytes:
    """Rows as the content of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    content = io.BytesIO()
    table = pyarrow.Table.from_pylist(
        [{field.name: getattr(row, field.name) for field in fields(ResultRow)} for row in rows],
        schema=_schema(),
    )
    parquet.write_table(table, content)
    return content.getvalue()


def read_table(path: Path) -> tuple[list[ResultRow], bytes]:
    """Rows of a table, and the content of its file.

    Raises:
        InputError: it cannot be read, columns are missing or of other types, or a value cannot be; with the row and the field.
    """
    table = Table(path, RESULTS)
    for wanted in _schema():
        if table.schema.names.count(wanted.name) != 1:
            raise _error(path, f"has no column {wanted.name}, or several")
        there = table.schema.field(wanted.name).type
        if there != wanted.type:
            raise _error(path, f"has {wanted.name} as {there}, not as {wanted.type}")
    found: list[ResultRow] = []
    known: set[str] = set()
    for number, values in enumerate(table.rows([field.name for field in fields(ResultRow)]), 1):
        wrong = _wrong(values) or (f"id {values['id']} comes twice" if values["id"] in known else None)
        if wrong:
            raise _error(f"{path}, row {number}", wrong)
        known.add(values["id"])
        box, kept = values["box"], tuple(values["kept_indices"])
        values |= {
            "truth": tuple(values["truth"]),
            "box": None if box is None else tuple(box),
            "kept_indices": kept,
        }
        found.append(ResultRow(**values))
    if not found:
        raise _error(path, "holds no rows")
    return found, table.content


def _wrong(values: dict[str, Any]) -> str | None:
    """What is wrong with a row; None where nothing is."""
    for name, sound in _SOUND.items():
        if not sound(values[name]):
            return f"{name} is {_short(values[name])}, not {_MEANING[name]}"
    if (values["box"] is None) == (values["no_box_because"] is None):
        return f"no_box_because is {_short(values['no_box_because'])}, and box is {_short(values['box'])}"
    # At the threshold itself, protocols differ.
    if values["iou"] != metrics.HIT_IOU and values["hit"] != (values["iou"] > metrics.HIT_IOU):
        return f"hit is {values['hit']}, and iou is {values['iou']:g}"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_box(value: Any) -> bool:
    """Whether it is a box that may lie anywhere and have no area."""
    numbers = isinstance(value, list) and len(value) == 4 and all(map(_is_finite, value))
    return numbers and value[0] <= value[2] and value[1] <= value[3]


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


_MEANING = {
    "id": "a text",
    "image": "a text",
    "expression": "a text",
    "answer": "a text, which may be empty",
    "truth": "a box with an area: x1 < x2, y1 < y2, all finite",
    "box": "a box: x1 <= x2, y1 <= y2, all finite",
    "iou": "a share between 0 and 1",
    "hit": "true or false",
    "tokens": "a number of tokens",
    "kept_indices": "a list of indices",
    "seconds": "a time",
}
_SOUND: dict[str, Callable[[Any], bool]] = {
    "id": _is_text,
    "image": _is_text,
    "expression": _is_text,
    "answer": lambda value: isinstance(value, str),
    "truth": lambda value: _is_box(value) and value[0] < value[2] and value[1] < value[3],
    "box": lambda value: value is None or _is_box(value),
    "iou": lambda value: _is_finite(value) and 0 <= value <= 1,
    "hit": lambda value: isinstance(value, bool),
    "tokens": lambda value: isinstance(value, int) and value >= 0,
    "kept_indices": lambda value: (
        isinstance(value, list) and all(isinstance(each, int) and each >= 0 for each in value)
    ),
    "seconds": lambda value: _is_finite(value) and value >= 0,
}
"""Column -> whether a value of it can be."""


def _error(subject: Path | str, message: str) -> InputError:
    return InputError(
        message, subject=str(subject), hint="it is damaged, or was changed: run the evaluation again"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@functools.cache
def _schema() -> Any:
    import pyarrow

    box = pyarrow.list_(pyarrow.float64(), 4)
    return pyarrow.schema(
        [
            ("id", pyarrow.string()),
            ("image", pyarrow.string()),
            ("expression", pyarrow.string()),
            ("answer", pyarrow.string()),
            ("truth", box),
            ("box", box),
            ("iou", pyarrow.float64()),
            ("hit", pyarrow.bool_()),
            ("no_box_because", pyarrow.string()),
            ("tokens", pyarrow.int64()),
            ("kept_indices", pyarrow.list_(pyarrow.int32())),
            ("seconds", pyarrow.float64()),
        ]
    )
