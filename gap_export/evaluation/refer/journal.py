"""The folder of an evaluation while it runs: what was asked, and one line per answer, in the order in which they came.

Lines of one image are written and flushed to the disk together. A run that was killed resumes after the last whole line; what a torn
write left is cut off. So no expression is answered twice, and none is lost.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from gap_export.errors import BundleError
from gap_export.evaluation.result_folder import SETTINGS, open_result_folder
from gap_export.files import FolderKind, write_atomically
from gap_export.records import Record

ANSWERS = "answers.jsonl"
EVALUATION = FolderKind(
    "evaluation",
    SETTINGS,
    frozenset({"manifest_sha256", "annotations", "backend"}),
    lambda _: [
        re.compile(r"settings\.json|answers\.jsonl|provenance\.json|[a-z-]+-(results\.parquet|eval\.json)")
    ],
)
"""How folders of evaluations are told; the protocols' results are named after them."""


class Settings(Record):
    """What all answers of a folder have in common.

    Attributes:
        manifest_sha256: of the build that answered.
        annotations: sha256 of the annotations, or the name of generated scenes.
        split: of the data set.
        backend: that answered.
        keep: fraction of the visual tokens that was asked for; None for the bundle's own.
        share: whether prompts about one image shared their beginning.
        ignore_exif: whether images were taken as they are stored.
    """

    manifest_sha256: str
    annotations: str
    split: str
    backend: str
    keep: float | None
    share: bool
    ignore_exif: bool = False


class AnswerRow(Record):
    """One answer.

    Attributes:
        id: of the expression.
        image: as the annotations name it.
        width: of the image, pixels.
        height: of the image, pixels.
        answer: text.
        refused: why the model could not be asked.
        tokens: generated.
        kept_indices: raster indices of the visual tokens that were kept of the last image, in the decoder's order.
        seconds: of the image's work, in equal parts among its expressions.
    """

    id: str
    image: str
    width: int
    height: int
    answer: str
    refused: str | None = None
    tokens: int
    kept_indices: tuple[int, ...] = ()
    seconds: float

    @property
    def kept(self) -> int:
        """How many visual tokens were kept."""
        return len(self.kept_indices)


class Journal:
    """The opened folder.

    Args:
        folder: made or checked by `open_journal`.
        rows: what lies in it.
    """

    def __init__(self, folder: Path, rows: list[AnswerRow]) -> None:
        self.folder = folder
        self.rows = rows
        self.known = {row.id for row in rows}

    def add(self, rows: Sequence[AnswerRow]) -> None:
        """Keep answers; they are on the disk when this returns."""
        text = "".join(row.model_dump_json() + "\n" for row in rows)
        with (self.folder / ANSWERS).open("a", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        self.rows.extend(rows)
        self.known.update(row.id for row in rows)


def open_journal(folder: Path, settings: Settings, *, replace: bool = False) -> Journal:
    """Make the folder of an evaluation, or go on with it.

    Args:
        folder: absent, empty, or an evaluation's.
        settings: what its answers must have in common.
        replace: throw an evaluation of other settings away.

    Raises:
        BundleError: something else is there, an evaluation of other settings, or a damaged one.
    """
    there = open_result_folder(folder, settings, EVALUATION, replace=replace)
    return Journal(folder, _whole_rows(folder / ANSWERS) if there else [])


def read_settings(folder: Path) -> Settings | None:
    """Of the evaluation in a folder; None where answers came from a file.

    Raises:
        InputError: they are damaged.
    """
    path = folder / SETTINGS
    hint = "it is damaged or was written by another version: run the same evaluation again, with --replace"
    return Settings.read(path, hint=hint) if path.is_file() else None


def _whole_rows(path: Path) -> list[AnswerRow]:
    """Rows of the journal; the end of a write that was cut short is removed from the file."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        write_atomically(path, whole)
    rows, known = [], set[str]()
    for number, line in enumerate(whole.splitlines(), 1):
        row = AnswerRow.parse(
            line,
            subject=f"{path}, line {number}",
            hint="it is damaged: delete the folder, or start the evaluation again with --replace",
            error=BundleError,
        )
        if row.id in known:
            raise BundleError(
                f"holds the answer to {row.id} twice (line {number})",
                subject=str(path),
                hint="two evaluations wrote into it at once: start again with --replace",
            )
        known.add(row.id)
        rows.append(row)
    return rows
