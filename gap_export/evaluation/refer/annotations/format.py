"""What a format of annotations is, and what its readers make of a file: expressions, and images where the file holds them."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from gap_export.boxes.codecs import Box
from gap_export.errors import InputError
from gap_export.evaluation.refer.json_rows import Damaged, JsonRow, escaped, json_rows
from gap_export.files import is_folder, opened
from gap_export.files.kinds import ANNOTATION_TABLE, ANNOTATIONS
from gap_export.records import Record

_HEAD_BYTES = 4096
_LONGEST_SHOWN = 80
_FIRST_ROWS = 100
"""Rows of a file that are looked at to tell its format: a few of them may be damaged."""


@dataclass(frozen=True)
class Expression:
    """One referring expression.

    Attributes:
        id: unique in its data set.
        image: the image's name.
        text: what to find.
        box: the true one, (x1, y1, x2, y2) in pixels.
        width: of the image in pixels, where the annotations tell.
        height: of the image in pixels, where the annotations tell.
    """

    id: str
    image: str
    text: str
    box: Box
    width: int | None = None
    height: int | None = None


class SkippedRow(Record):
    """A row that could not be used and was left out.

    Attributes:
        where: file and row.
        why: what is wrong with it.
        ids: of its expressions, where those could be told.
    """

    where: str
    why: str
    ids: tuple[str, ...] = ()


class BadRows:
    """What becomes of rows that cannot be used: the first one ends the reading, or all are left out and put down here.

    Args:
        skip: whether they are left out.

    Attributes:
        found: those that were.
    """

    def __init__(self, *, skip: bool = False) -> None:
        self._skip = skip
        self.found: list[SkippedRow] = []

    @contextmanager
    def around(self, identities: Callable[[], tuple[str, ...]] = tuple) -> Iterator[None]:
        """Around the reading of one row.

        Args:
            identities: tells the ids of the row's expressions when the row turns out to be unusable.

        Raises:
            InputError: of the row, where it is not to be skipped.
        """
        try:
            yield
        except InputError as error:
            if not self._skip:
                raise
            self.found.append(SkippedRow(where=escaped(error.subject), why=error.message, ids=identities()))

    def name(self, where: str, identity: str) -> None:
        """Say which expression it is that a row holds that was left out before that could be told."""
        self.found = [
            each.model_copy(update={"ids": (*each.ids, identity)}) if each.where == escaped(where) else each
            for each in self.found
        ]


class EmbeddedImages(Protocol):
    """Images that lie in the data set."""

    def names(self) -> Sequence[str]:
        """Of all there are."""
        ...

    def read(self, image: str) -> bytes:
        """One image, encoded."""
        ...


@dataclass(frozen=True)
class Annotations:
    """A data set, or one split of it.

    Attributes:
        format: name in the table of formats.
        expressions: in the order of the file, ids unique.
        images: where the data set brings them.
        skipped: rows that could not be used, where those were to be left out.
    """

    format: str
    expressions: tuple[Expression, ...]
    images: EmbeddedImages | None = None
    skipped: tuple[SkippedRow, ...] = ()


@dataclass(frozen=True)
class AnnotationFormat:
    """One row of the table of formats.

    Attributes:
        name: of the format.
        files: what its files hold, for people.
        published_by: whose format it is.
        images: where its images come from, for people.
        suffixes: of the files that make up a data set of this format, where it is a folder.
        recognizes: whether a file or folder is of this format, told by what it holds and never by its name alone.
        read: (file or folder, split or None for all of them) -> its annotations. It raises `InputError` for a row that cannot be
            used, with its number, and for a split that is not there, with those that are.
    """

    name: str
    files: str
    published_by: str
    images: str
    suffixes: tuple[str, ...]
    recognizes: Callable[[AnnotationFile], bool]
    read: Callable[[AnnotationFile, str | None], Annotations]


class AnnotationFile:
    """A file or a folder with annotations, looked into no further than its format asks for.

    Args:
        path: of the file or folder.
        skip_bad_rows: whether rows that cannot be used are left out.

    Attributes:
        bad_rows: for readers to put around each row; see `rows.usable`.
    """

    def __init__(self, path: Path, *, skip_bad_rows: bool = False) -> None:
        self.path = path
        self.bad_rows = BadRows(skip=skip_bad_rows)

    @cached_property
    def head(self) -> bytes:
        """The first bytes of a file, without a byte order mark; nothing of a folder."""
        if is_folder(self.path):
            return b""
        with opened(self.path, ANNOTATION_TABLE) as file:
            return file.read(_HEAD_BYTES).removeprefix(BOM_UTF8)

    @cached_property
    def rows(self) -> list[JsonRow]:
        """What a JSON list, JSON lines or a JSON object hold; `Damaged` for lines that are none and are to be skipped.

        Raises:
            InputError: it is neither.
        """
        hint = "mend that line, or leave out all such lines (--skip-bad-rows)"
        return json_rows(self.path, replace(ANNOTATIONS, hint=hint), around=self.bad_rows.around)

    def holds(self, fields: Collection[str]) -> bool:
        """Whether it is JSON with rows that have these fields."""
        wanted = frozenset(fields)
        return any(isinstance(row.value, dict) and wanted <= row.value.keys() for row in self._first_rows)

    @property
    def first(self) -> Any:
        """The first row of JSON; None where there is none."""
        return self._first_rows[0].value if self._first_rows else None

    @cached_property
    def _first_rows(self) -> list[JsonRow]:
        """The first rows of JSON that can be read; none where it is not JSON."""
        if self.head.lstrip().removeprefix(BOM_UTF8)[:1] not in (b"[", b"{"):
            return []
        try:
            return [row for row in self.rows[:_FIRST_ROWS] if not isinstance(row.value, Damaged)]
        except InputError:
            return []


def shown(value: object) -> str:
    """What was found, short, for messages; of what is long, no more is looked at than is shown."""
    text = ""
    for part in json.JSONEncoder(default=str, skipkeys=True).iterencode(value):
        text += part[: _LONGEST_SHOWN + 1]
        if len(text) > _LONGEST_SHOWN:
            return text[: _LONGEST_SHOWN - 3] + "..."
    return text
