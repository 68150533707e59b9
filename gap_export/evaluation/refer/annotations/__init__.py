"""Annotations of referring expressions, in the formats that data sets are published in.

The table `FORMATS` has a row per format, and `register` adds one. A format is told by what a file holds, never by its name alone. All
boxes are pixels of the original image.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import json_formats, mdetr, parquet, refer
from gap_export.evaluation.refer.annotations.format import (
    AnnotationFile,
    AnnotationFormat,
    Annotations,
    EmbeddedImages,
    Expression,
    SkippedRow,
    shown,
)
from gap_export.evaluation.refer.json_rows import Damaged, packed
from gap_export.files import is_folder

__all__ = [
    "FORMATS",
    "AnnotationFile",
    "AnnotationFormat",
    "Annotations",
    "EmbeddedImages",
    "Expression",
    "SkippedRow",
    "read_annotations",
    "register",
]

FORMATS: dict[str, AnnotationFormat] = {}
"""By name; files are offered to them in this order."""


def register(row: AnnotationFormat) -> None:
    """Add a format to the table.

    Raises:
        ValueError: there is one of that name.
    """
    if row.name in FORMATS:
        raise ValueError(f"a format named {row.name!r} is in the table already")
    FORMATS[row.name] = row


for _row in (
    refer.FORMAT,
    parquet.FORMAT,
    json_formats.MINIGPT4,
    json_formats.SHIKRA,
    json_formats.INTERNVL,
    mdetr.FORMAT,
):
    register(_row)


def read_annotations(path: Path, *, split: str | None = None, skip_bad_rows: bool = False) -> Annotations:
    """Read a data set.

    Args:
        path: a file, or the folder of a data set in several files.
        split: where the format holds several; others have one, which any name stands for.
        skip_bad_rows: leave out rows that cannot be used; they are in the result's `skipped`.

    Raises:
        InputError: missing, of no known format (with what was found), a row that cannot be used (with its number), ids that come
            twice, a split that is not there (with those that are).
        MissingRequirementError: parquet, and pyarrow is not installed.
    """
    if not os.path.lexists(path):
        raise InputError("does not exist", subject=str(path), hint="give the annotation file (--data)")
    file = AnnotationFile(path, skip_bad_rows=skip_bad_rows)
    packed(file.head, path)
    for row in FORMATS.values():
        if row.recognizes(file):
            read = replace(row.read(file, split), skipped=tuple(file.bad_rows.found))
            return _checked(read, path)
    raise _unknown(file)


def _checked(annotations: Annotations, path: Path) -> Annotations:
    """Refuse ids that come twice: an answer could not be told to belong to one of them."""
    seen: set[str] = set()
    twice = [each.id for each in annotations.expressions if each.id in seen or seen.add(each.id)]  # type: ignore[func-returns-value]
    if twice:
        raise InputError(
            f"has expression ids that come twice: {', '.join(dict.fromkeys(twice[:5]))}",
            subject=str(path),
            hint="ids must be unique; two files may have been put together",
        )
    if not annotations.expressions:
        skipped = len(annotations.skipped)
        raise InputError(
            f"holds no expression that can be used: {skipped} rows were skipped"
            if skipped
            else "holds no expressions",
            subject=str(path),
            hint="run without --skip-bad-rows to see what is wrong with the first"
            if skipped
            else "the file is empty: get it again",
        )
    return annotations


def _unknown(file: AnnotationFile) -> InputError:
    """What to say of a file or folder that is of none of the formats.

    Raises:
        InputError: it is not even JSON.
    """
    if is_folder(file.path):
        found = sorted(each.name for each in file.path.iterdir())[:5]
        return InputError(
            f"holds annotations of no known format, but {', '.join(found) or 'nothing'}",
            subject=str(file.path),
            hint="give the annotation file itself (--data)",
        )
    readable = [row for row in file.rows if not isinstance(row.value, Damaged)]
    if not readable:
        return InputError(
            "holds no expressions", subject=str(file.path), hint="the file is empty: get it again"
        )
    for fields, what in _MISTAKEN.items():
        if file.holds(fields):
            return InputError(f"looks like {what}", subject=str(file.path), hint="see docs/evaluation.md")
    first = readable[0].value
    return InputError(
        f"is of no known format: its first row has {shown(sorted(first) if isinstance(first, dict) else first)}",
        subject=str(file.path),
        hint="known: " + "; ".join(f"{row.name} ({row.files})" for row in FORMATS.values()),
    )


_MISTAKEN = {
    frozenset(
        {"images", "annotations"}
    ): "COCO's instances, which know no expressions: give refs(...).p beside it",
    frozenset({"id", "answer"}): "a file of answers: give it as --predictions",
    frozenset(
        {"ann_id", "sentences"}
    ): "gRefCOCO's references, where an expression stands for several objects or none; one box per expression is scored",
}
"""Fields of files that are often given in the place of annotations -> what such a file is."""
