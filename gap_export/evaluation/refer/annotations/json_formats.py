"""MiniGPT-4's JSON, Shikra's and InternVL's (and Qwen's) JSON lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import Annotations, Expression, shown
from gap_export.evaluation.refer.annotations.rows import RowReader


def _minigpt4(row: RowReader, count: Callable[[str], int]) -> Expression:
    object_id = row.text("img_id")
    # The last number is that of the reference; what stands before it names the image.
    image = object_id.rpartition("_")[0] + ".jpg"
    return row.expression(f"{object_id}.{count(object_id)}", image, row.text("sents"), row.extents("bbox"))


def _shikra(row: RowReader, count: Callable[[str], int]) -> Expression:
    image = row.text("img_path")
    return row.expression(f"{image}.{count(image)}", image, row.text("expression"), row.corners("bbox"))


def _internvl(row: RowReader, count: Callable[[str], int]) -> Expression:
    image = row.text("image")
    return row.expression(f"{image}.{count(image)}", image, row.text("sent"), row.corners("bbox"))


FORMATS: dict[str, tuple[frozenset[str], Callable[[RowReader, Callable[[str], int]], Expression]]] = {
    "minigpt4": (frozenset({"img_id", "sents", "bbox"}), _minigpt4),
    "shikra": (frozenset({"img_path", "expression", "bbox"}), _shikra),
    "internvl": (frozenset({"image", "sent", "bbox"}), _internvl),
}
"""Name -> (fields that tell it, reader of a row)."""


def read_json(path: Path) -> Annotations:
    """Read either.

    Raises:
        InputError: see `read_annotations`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "is not a text in UTF-8", subject=str(path), hint="known formats: see docs/evaluation.md"
        ) from error
    rows = _rows(text, path)
    if not rows:
        return Annotations("empty", ())
    name = _format_of(rows[0], path)
    read, counted = FORMATS[name][1], Counter[str]()

    def count(key: str) -> int:
        counted[key] += 1
        return counted[key] - 1

    expressions = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(
                f"is {shown(row)}, not an object", subject=f"{path}, row {number}", hint="mend that row"
            )
        expressions.append(read(RowReader(path, number, row), count))
    return Annotations(name, tuple(expressions))


def _rows(text: str, path: Path) -> list[Any]:
    """Of a JSON list, or of JSON lines."""
    if text.lstrip()[:1] == "[":
        try:
            return list(json.loads(text))
        except json.JSONDecodeError as error:
            raise InputError(
                f"is not JSON: {error.msg} in line {error.lineno}",
                subject=str(path),
                hint="get the file again",
            ) from error
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(
                f"is not JSON: {error.msg}", subject=f"{path}, line {number}", hint="get the file again"
            ) from error
    return rows


def _format_of(row: Any, path: Path) -> str:
    if isinstance(row, dict):
        for name, (fields, _) in FORMATS.items():
            if fields <= row.keys():
                return name
        looks = {
            frozenset(
                {"images", "annotations"}
            ): "COCO's instances, which know no expressions: give refs(...).p beside it",
            frozenset({"id", "answer"}): "a file of answers: give it as --predictions",
        }
        for fields, what in looks.items():
            if fields <= row.keys():
                raise InputError(f"looks like {what}", subject=str(path), hint="see docs/evaluation.md")
    found = sorted(row) if isinstance(row, dict) else row
    raise InputError(
        f"is of no known format: its first row has {shown(found)}",
        subject=str(path),
        hint="known: "
        + "; ".join(f"{name} ({', '.join(sorted(fields))})" for name, (fields, _) in FORMATS.items()),
    )
