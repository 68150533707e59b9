"""Parquet files with images inside, one row per object, as lmms-lab publishes RefCOCO, RefCOCO+ and RefCOCOg on the hub."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
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
from gap_export.evaluation.refer.annotations.rows import RowReader, usable
from gap_export.evaluation.refer.tables import Table
from gap_export.files import is_folder
from gap_export.files.kinds import ANNOTATION_TABLE

COLUMNS = ("question_id", "answer", "bbox")


@dataclass(frozen=True)
class _Place:
    """Where an image lies."""

    file: Path
    group: int
    row: int


class TableImages:
    """Images of a table, read one by one: a file may hold gigabytes of them.

    Args:
        places: name of an image -> all places where one of that name lies.
    """

    def __init__(self, places: dict[str, list[_Place]]) -> None:
        self._places = places
        self._group: tuple[Path, int, list[Any]] | None = (
            None  # the last one read: rows of an image lie together
        )

    def names(self) -> Sequence[str]:
        """Names of all images."""
        return list(self._places)

    def read(self, image: str) -> bytes:
        """One image, encoded.

        Raises:
            InputError: no image lies there, or two that are not the same have that name.
        """
        first, *others = self._places[image]
        content = self._content(first, image)
        for other in others:
            if self._content(other, image) != content:
                raise InputError(
                    f"is the name of two different images: in row {first.row + 1} of group {first.group + 1} of {first.file.name}, and "
                    f"in row {other.row + 1} of group {other.group + 1} of {other.file.name}",
                    subject=f"image {image} of {first.file.parent}",
                    hint="give one split of the data set, or rename one of them",
                )
        self._places[image] = [first]  # that they are the same need not be seen again
        return content

    def _content(self, place: _Place, image: str) -> bytes:
        if self._group is None or self._group[:2] != (place.file, place.group):
            found = Table(place.file, ANNOTATION_TABLE).rows(["image"], groups=[place.group])
            self._group = (place.file, place.group, [row["image"] for row in found])
        rows = self._group[2]
        content = rows[place.row] if place.row < len(rows) else None  # the file may be another by now
        content = content.get("bytes") if isinstance(content, dict) else content
        if not isinstance(content, bytes):
            raise InputError(
                "holds no image in that row", subject=f"{place.file}, {image}", hint="get the file again"
            )
        return content


def _recognizes(file: AnnotationFile) -> bool:
    return any(file.path.rglob("*.parquet")) if is_folder(file.path) else file.head[:4] == b"PAR1"


def _read(file: AnnotationFile, split: str | None) -> Annotations:
    """A split is all files whose names begin with it, up to the first hyphen."""
    if not is_folder(file.path):
        return _read_tables(file, [file.path])
    tables = sorted(file.path.rglob("*.parquet"))
    wanted = [each for each in tables if split is None or each.name.partition("-")[0] == split]
    if not wanted:
        there = sorted({each.name.partition("-")[0] for each in tables})
        raise InputError(
            f"is not there; there are {', '.join(there)}",
            subject=f"split {split} of {file.path}",
            hint="choose one of them (--split)",
        )
    return _read_tables(file, wanted)


def _read_tables(file: AnnotationFile, files: Sequence[Path]) -> Annotations:
    expressions: list[Expression] = []
    places: defaultdict[str, list[_Place]] = defaultdict(list)
    embedded = True
    for path in files:
        table = Table(path, ANNOTATION_TABLE)
        names = table.schema.names
        if not set(COLUMNS) <= set(names):
            raise InputError(
                f"has columns {shown(names)}, not {', '.join(COLUMNS)}",
                subject=str(path),
                hint="known formats: see docs/evaluation.md",
            )
        embedded = embedded and "image" in names
        wanted = [name for name in (*COLUMNS, "file_name") if name in names]
        number = 0
        for group in range(table.groups):
            for within, row in enumerate(table.rows(wanted, groups=[group])):
                number += 1
                reader = RowReader(path, number, row)
                with usable(reader, file.bad_rows):
                    identity = str(reader.key("question_id"))
                    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
                    reader.identities = tuple(f"{identity}.{count}" for count in range(len(answers)))
                    box = reader.extents("bbox")
                    image = reader.text("file_name") if row.get("file_name") else identity
                    places[image].append(_Place(path, group, within))
                    for count, text in enumerate(answers):
                        answer = RowReader(path, number, {"answer": text})
                        answer.identity = f"{identity}.{count}"
                        with usable(answer, file.bad_rows):
                            expressions.append(
                                reader.expression(answer.identity, image, answer.text("answer"), box)
                            )
    return Annotations("parquet", tuple(expressions), TableImages(dict(places)) if embedded else None)


FORMAT = AnnotationFormat(
    name="parquet",
    files="`.parquet` files with `question_id`, `image`, `answer`, `bbox`; boxes are x, y, width, height",
    published_by="lmms-lab, on the hub",
    images="inside",
    suffixes=(".parquet",),
    recognizes=_recognizes,
    read=_read,
)
