"""REFER's own files: `refs(unc).p` (or google, umd) and `instances.json` beside it. RefCOCO, RefCOCO+ and RefCOCOg are published so.

The same references in JSON are read too; gRefCOCO has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations.format import (
    AnnotationFile,
    AnnotationFormat,
    Annotations,
    Expression,
    shown,
)
from gap_export.evaluation.refer.annotations.plain_pickle import read_plain_pickle
from gap_export.evaluation.refer.annotations.rows import RowReader, usable
from gap_export.evaluation.refer.json_rows import json_document
from gap_export.files import is_file, is_folder

INSTANCES = "instances.json"
_FILES = ("*refs*.p", "*refs*.json")
"""Also those of gRefCOCO, whose references are of REFER's layout, in JSON."""
_FIELDS = ("ann_id", "image_id", "sentences")


def _recognizes(file: AnnotationFile) -> bool:
    if is_folder(file.path):
        return any(any(file.path.glob(pattern)) for pattern in _FILES)
    return _is_pickle(file) or file.holds(_FIELDS)


def _is_pickle(file: AnnotationFile) -> bool:
    return file.path.suffix == ".p" or file.head[:1] == b"\x80" or file.head[:2] in (b"(l", b"]q")


def _read(file: AnnotationFile, split: str | None) -> Annotations:
    """Read one split: train, val, test, testA or testB; all of them when left out.

    Raises:
        InputError: several files of references, or no instances.json beside it.
    """
    path = file.path
    if is_folder(path):
        found = next(each for pattern in _FILES if (each := sorted(path.glob(pattern))))
        if len(found) > 1:
            raise InputError(
                f"holds annotations by several: {', '.join(each.name for each in found)}",
                subject=str(path),
                hint="give the path of one of them",
            )
        path = found[0]
    pickled = _is_pickle(file) if path == file.path else path.suffix == ".p"
    references = read_plain_pickle(path) if pickled else json_document(path)
    if not isinstance(references, list) or not all(isinstance(each, dict) for each in references):
        raise InputError(
            f"holds {shown(type(references).__name__)}, not a list of references",
            subject=str(path),
            hint="known formats: see docs/evaluation.md",
        )
    instances = path.parent / INSTANCES
    if not is_file(instances):
        raise InputError(
            "is not there",
            subject=str(instances),
            hint="boxes and images of REFER are in it; put it beside",
        )
    try:
        content = json_document(instances)
        objects = {each["id"]: each for each in content["annotations"]}
        images = {each["id"]: each for each in content["images"]}
    except (KeyError, TypeError) as error:
        raise InputError(
            f"is not COCO's instances: {error}", subject=str(instances), hint="get the file again"
        ) from error
    splits = sorted({str(each.get("split")) for each in references})
    if split is not None and split not in splits:
        raise InputError(
            f"is not there; there are {', '.join(splits)}",
            subject=f"split {split} of {path}",
            hint="choose one of them (--split)",
        )
    expressions: list[Expression] = []
    for number, reference in enumerate(references, 1):
        if split is None or reference.get("split") == split:
            expressions += _of_reference(file, path, number, reference, objects, images)
    return Annotations("refer", tuple(expressions))


def _of_reference(
    file: AnnotationFile,
    path: Path,
    number: int,
    reference: dict[str, Any],
    objects: dict[Any, Any],
    images: dict[Any, Any],
) -> list[Expression]:
    """The expressions of a reference; none where it is to be skipped."""
    row = RowReader(path, number, reference)
    row.identities = _identities(reference.get("sentences"))
    found: list[Expression] = []
    with usable(row, file.bad_rows):
        ann_id, image_id = _only(row, reference, "ann_id"), _only(row, reference, "image_id")
        item, entry = objects.get(ann_id), images.get(image_id)
        if item is None or entry is None:
            missing = f"annotation {ann_id}" if item is None else f"image {image_id}"
            raise row.error(f"{INSTANCES} does not hold {missing}")
        whole = RowReader(path, number, {**reference, **entry, "bbox": item.get("bbox")})
        box, image = whole.extents("bbox"), whole.text("file_name")
        sentences = reference.get("sentences")
        if not isinstance(sentences, list):
            raise row.error(f"sentences is {shown(sentences)}, not a list")
        for sentence in sentences:
            reader = RowReader(path, number, sentence)
            with usable(reader, file.bad_rows):
                reader.identity = str(reader.key("sent_id"))
                found.append(whole.expression(reader.identity, image, reader.text("sent"), box))
    return found


def _identities(sentences: Any) -> tuple[str, ...]:
    """Of those sentences that have one."""
    held = (
        [each.get("sent_id") for each in sentences if isinstance(each, dict)]
        if isinstance(sentences, list)
        else []
    )
    return tuple(str(each) for each in held if isinstance(each, str | int) and not isinstance(each, bool))


def _only(row: RowReader, reference: dict[str, Any], field: str) -> str | int:
    """The one id of a field; gRefCOCO has lists there, of one, of several and of none (-1)."""
    value = reference.get(field)
    if isinstance(value, list) and len(value) == 1 and value != [-1]:
        return RowReader(Path(), 0, {field: value[0]}, where=row.where).key(field)
    if isinstance(value, list):
        raise row.error(
            f"{field} is {shown(value)}: the expression stands for several objects or none, as in gRefCOCO, "
            "and one box per expression is scored"
        )
    return row.key(field)


FORMAT = AnnotationFormat(
    name="refer",
    files="a folder with `refs(unc).p` (or `google`, `umd`) and `instances.json`; boxes are x, y, width, height",
    published_by="REFER: RefCOCO, RefCOCO+, RefCOCOg",
    images="`--images`",
    suffixes=(".p", ".json"),
    recognizes=_recognizes,
    read=_read,
)
