"""MiniGPT-4's JSON, Shikra's and InternVL's (and Qwen's) JSON lines."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection

from gap_export.evaluation.refer.annotations.format import (
    AnnotationFile,
    AnnotationFormat,
    Annotations,
    Expression,
)
from gap_export.evaluation.refer.annotations.rows import RowReader, usable
from gap_export.evaluation.refer.json_rows import Damaged

RowToExpression = Callable[[RowReader, Callable[[str], int]], Expression]
"""Reads a row; the second argument counts how often it was called with a key before, to make ids unique."""


def json_format(
    name: str,
    *,
    files: str,
    published_by: str,
    fields: Collection[str],
    counted_by: str,
    read_row: RowToExpression,
) -> AnnotationFormat:
    """A format of JSON lists or JSON lines with one expression per row.

    Args:
        name: of the format.
        files: what its files hold, for people.
        published_by: whose format it is.
        fields: that tell it from other formats.
        counted_by: field whose equal texts are counted to make ids.
        read_row: makes an expression of a row.
    """

    def read(file: AnnotationFile, split: str | None) -> Annotations:
        counted = Counter[str]()

        def count(key: str) -> int:
            counted[key] += 1
            return counted[key] - 1

        expressions = []
        for number, row in enumerate(file.rows, 1):
            if isinstance(row.value, Damaged):
                # Ids count the rows about an image, so that a row which says no more than its image counts too.
                key = _text_in(row.value.content, counted_by)
                if key is not None:
                    file.bad_rows.name(row.where, f"{key}.{count(key)}")
                continue
            reader = RowReader(file.path, number, row.value, where=row.where)
            with usable(reader, file.bad_rows):
                expressions.append(read_row(reader, count))
        return Annotations(name, tuple(expressions))

    return AnnotationFormat(
        name=name,
        files=files,
        published_by=published_by,
        images="`--images`",
        suffixes=(".json", ".jsonl"),
        recognizes=lambda file: file.holds(fields),
        read=read,
    )


def _text_in(line: bytes, field: str) -> str | None:
    """What a line that is no JSON has in a field, where that much of it is whole."""
    found = re.search(rf'"{field}"\s*:\s*("(?:[^"\\]|\\.)*")'.encode(), line)
    try:
        return None if found is None else str(json.loads(found[1]))
    except ValueError:
        return None


def _minigpt4(row: RowReader, count: Callable[[str], int]) -> Expression:
    object_id = row.text("img_id")
    row.identity = f"{object_id}.{count(object_id)}"
    # The last number is that of the reference; what stands before it names the image.
    image = object_id.rpartition("_")[0] + ".jpg"
    return row.expression(row.identity, image, row.text("sents"), row.extents("bbox"))


def _shikra(row: RowReader, count: Callable[[str], int]) -> Expression:
    image = row.text("img_path")
    row.identity = f"{image}.{count(image)}"
    return row.expression(row.identity, image, row.text("expression"), row.corners("bbox"))


def _internvl(row: RowReader, count: Callable[[str], int]) -> Expression:
    image = row.text("image")
    row.identity = f"{image}.{count(image)}"
    return row.expression(row.identity, image, row.text("sent"), row.corners("bbox"))


MINIGPT4 = json_format(
    "minigpt4",
    files="a JSON list of `{img_id, sents, bbox, height, width}`; boxes are x, y, width, height",
    published_by="MiniGPT-4",
    fields=("img_id", "sents", "bbox"),
    counted_by="img_id",
    read_row=_minigpt4,
)
SHIKRA = json_format(
    "shikra",
    files="JSON lines of `{img_path, expression, bbox}`; boxes are x1, y1, x2, y2",
    published_by="Shikra",
    fields=("img_path", "expression", "bbox"),
    counted_by="img_path",
    read_row=_shikra,
)
INTERNVL = json_format(
    "internvl",
    files="JSON lines of `{image, sent, bbox, width, height}`; boxes are x1, y1, x2, y2",
    published_by="InternVL and Qwen",
    fields=("image", "sent", "bbox"),
    counted_by="image",
    read_row=_internvl,
)
