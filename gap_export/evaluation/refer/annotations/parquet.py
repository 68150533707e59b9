"""Parquet files with images inside, one row per object, as lmms-lab publishes RefCOCO, RefCOCO+ and RefCOCOg on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.errors import InputError, MissingRequirementError, first_line
from gap_export.evaluation.refer.annotations.format import (
    AnnotationFile,
    AnnotationFormat,
    Annotations,
    Expression,
    shown,
)
from gap_export.evaluation.refer.annotations.rows import RowReader, usable
from gap_export.evaluation.refer.json_rows import packed

COLUMNS = ("question_id", "answer", "bbox")


@dataclass(frozen=True)
class _Place:
    """Where an image lies."""

    file: Path
    group: int
    row: int


class TableImages:
    """Images of a table, read one by one: a file may hold gigabytes of them."""

    def __init__(self, places: dict[str, _Place]) -> None:
        self._places = places
        self._group: tuple[Path, int, Any] | None = None  # the last one read: rows of an image lie together

    def names(self) -> Sequence[str]:
        """Names of all images."""
        return list(self._places)

    def read(self, image: str) -> bytes:
        """One image, encoded."""
        place = self._places[image]
        if self._group is None or self._group[:2] != (place.file, place.group):
            column = _read_group(_opened(place.file), place.file, place.group, ["image"]).column("image")
            self._group = (place.file, place.group, column)
        content = self._group[2][place.row].as_py()
        content = content.get("bytes") if isinstance(content, dict) else content
        if not isinstance(content, bytes):
            raise InputError(
                "holds no image in that row", subject=f"{place.file}, {image}", hint="get the file again"
            )
        return content


def _recognizes(file: AnnotationFile) -> bool:
    return any(file.path.rglob("*.parquet")) if file.path.is_dir() else file.head[:4] == b"PAR1"


def _read(file: AnnotationFile, split: str | None) -> Annotations:
    """A split is all files whose names begin with it, up to the first hyphen."""
    if not file.path.is_dir():
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
    places: dict[str, _Place] = {}
    embedded = True
    for path in files:
        table = _opened(path)
        names = table.schema_arrow.names
        if not set(COLUMNS) <= set(names):
            raise InputError(
                f"has columns {shown(names)}, not {', '.join(COLUMNS)}",
                subject=str(path),
                hint="known formats: see docs/evaluation.md",
            )
        embedded = embedded and "image" in names
        wanted = [name for name in (*COLUMNS, "file_name") if name in names]
        number = 0
        for group in range(table.num_row_groups):
            for within, row in enumerate(_rows(table, path, group, wanted)):
                number += 1
                reader = RowReader(path, number, row)
                with usable(reader, file.bad_rows):
                    identity = str(reader.key("question_id"))
                    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
                    reader.identities = tuple(f"{identity}.{count}" for count in range(len(answers)))
                    box = reader.extents("bbox")
                    image = row.get("file_name") or identity
                    places.setdefault(image, _Place(path, group, within))
                    for count, text in enumerate(answers):
                        answer = RowReader(path, number, {"answer": text})
                        answer.identity = f"{identity}.{count}"
                        with usable(answer, file.bad_rows):
                            expressions.append(
                                reader.expression(answer.identity, image, answer.text("answer"), box)
                            )
    return Annotations("parquet", tuple(expressions), TableImages(places) if embedded else None)


def _rows(table: Any, path: Path, group: int, columns: Sequence[str]) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = _read_group(table, path, group, columns).to_pylist()
    except UnicodeDecodeError as error:
        raise InputError(
            f"holds text that is not UTF-8: {error.reason}", subject=str(path), hint="get the file again"
        ) from error
    return rows


def _read_group(table: Any, path: Path, group: int, columns: Sequence[str]) -> Any:
    from pyarrow import ArrowException

    try:
        return table.read_row_group(group, columns=columns)
    except (OSError, ArrowException) as error:
        raise InputError(
            f"cannot be read: {first_line(error)}", subject=str(path), hint="get the file again"
        ) from error


def _opened(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingRequirementError(
            "is not installed", subject="pyarrow", hint="pip install 'gap-export[eval]'"
        ) from error
    try:
        with path.open("rb") as file:
            packed(file.read(32), path)
        return parquet.ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise InputError(
            f"cannot be read: {first_line(error)}", subject=str(path), hint="get the file again"
        ) from error


FORMAT = AnnotationFormat(
    name="parquet",
    files="`.parquet` files with `question_id`, `image`, `answer`, `bbox`; boxes are x, y, width, height",
    published_by="lmms-lab, on the hub",
    images="inside",
    suffixes=(".parquet",),
    recognizes=_recognizes,
    read=_read,
)
