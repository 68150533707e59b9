"""MDETR's RefCOCO: one JSON object in COCO's layout, where an "image" is an expression (`caption`) and has one annotation, its object.

Source: `scripts/fine-tuning/refexp_coco_format.py` and `datasets/refexp.py` of ashkamath/mdetr.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations.format import (
    AnnotationFile,
    AnnotationFormat,
    Annotations,
    shown,
)
from gap_export.evaluation.refer.annotations.rows import RowReader, usable


def _recognizes(file: AnnotationFile) -> bool:
    if not file.holds(("images", "annotations")):
        return False
    images = file.first.get("images") if isinstance(file.first, dict) else None
    return isinstance(images, list) and any(isinstance(each, dict) and "caption" in each for each in images)


def _read(file: AnnotationFile, split: str | None) -> Annotations:
    content = file.first
    boxes: defaultdict[Any, list[Any]] = defaultdict(list)
    annotations = content.get("annotations")
    if not isinstance(annotations, list):
        raise InputError(
            f"annotations is {shown(annotations)}, not a list",
            subject=str(file.path),
            hint="get the file again",
        )
    for number, annotation in enumerate(annotations, 1):
        reader = RowReader(file.path, number, annotation, where=f"{file.path}, annotation {number}")
        with usable(reader, file.bad_rows):
            boxes[reader.key("image_id")].append(annotation)
    expressions = []
    for number, entry in enumerate(content["images"], 1):
        row = RowReader(file.path, number, entry, where=f"{file.path}, image {number}")
        with usable(row, file.bad_rows):
            key = row.key("id")
            row.identity = str(key)
            if len(boxes[key]) != 1:
                raise row.error(
                    f"has {len(boxes[key])} objects: one expression with several boxes or none is not scored"
                )
            reader = RowReader(file.path, number, {**entry, "bbox": boxes[key][0].get("bbox")})
            box = reader.extents("bbox")
            expressions.append(row.expression(row.identity, row.text("file_name"), row.text("caption"), box))
    return Annotations("mdetr", tuple(expressions))


FORMAT = AnnotationFormat(
    name="mdetr",
    files="a JSON object of `images` with `caption`, and `annotations`; boxes are x, y, width, height",
    published_by="MDETR",
    images="`--images`",
    suffixes=(".json",),
    recognizes=_recognizes,
    read=_read,
)
