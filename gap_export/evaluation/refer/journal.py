"""The folder of an evaluation while it runs: what was asked, and one line per answer, in the order in which they came.

Lines of one image are written and flushed to the disk together. A run that was killed resumes after the last whole line; what a torn
write left is cut off. So no expression is answered twice, and none is lost. Every line holds a running digest: one that is damaged or
changed anywhere else than at the torn end is an error.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Annotated

from pydantic import Field

from gap_export.errors import BundleError, GapExportError, InputError
from gap_export.evaluation.digests import first_digest, sealed, unsealed
from gap_export.evaluation.refer.annotations import Expression
from gap_export.evaluation.result_folder import SETTINGS, open_result_folder
from gap_export.files import read_bytes, results_kind, write_atomically, writing
from gap_export.files.kinds import JOURNAL
from gap_export.records import Amount, Count, Flag, Record, Share, Text

ANSWERS = "answers.jsonl"
Side = Annotated[int, Field(ge=1, le=1_000_000, strict=True)]
"""Of an image, pixels."""
EVALUATION = results_kind(
    "evaluation",
    SETTINGS,
    frozenset({"manifest_sha256", "annotations", "backend"}),
    r"settings\.json|answers\.jsonl|provenance\.json|[a-z-]+-(results\.parquet|eval\.json)",
    unlisted=r"answers\.jsonl",  # it grows
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
        box_format: that answers are read in, where not the bundle's own; settings without one are written as before there was any.
    """

    manifest_sha256: Text
    annotations: Text
    split: Text
    backend: Text
    keep: Share | None
    share: Flag
    ignore_exif: Flag = False
    box_format: Text | None = Field(default=None, exclude_if=lambda name: name is None)


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

    id: Text
    image: Text
    width: Side
    height: Side
    answer: str
    refused: str | None = None
    tokens: Count
    kept_indices: tuple[Count, ...] = ()
    seconds: Amount

    @property
    def kept(self) -> int:
        """How many visual tokens were kept."""
        return len(self.kept_indices)


@dataclass(frozen=True)
class Answers:
    """The lines of a journal.

    Attributes:
        rows: one per line.
        digests: of the settings, and then of every line: the running one.
    """

    rows: list[AnswerRow]
    digests: list[str]


class Journal:
    """The opened folder.

    Args:
        folder: made or checked by `open_journal`.
        answers: what lies in it.
    """

    def __init__(self, folder: Path, answers: Answers) -> None:
        self.folder = folder
        self.rows = answers.rows
        self.known = {row.id for row in answers.rows}
        self.digest = answers.digests[-1]

    def add(self, rows: Sequence[AnswerRow]) -> None:
        """Keep answers; they are on the disk when this returns.

        Raises:
            BundleError: they cannot be written. What a full disk took of them is cut off when the journal is opened again.
        """
        lines, digest = [], self.digest
        for row in rows:
            line, digest = sealed(row, digest)
            lines.append(line + "\n")
        path = self.folder / ANSWERS
        hint = "what was answered before is kept: free disk space, and run the same command again"
        with writing(path, hint=hint), path.open("ab", buffering=0) as out:
            before = os.fstat(out.fileno()).st_size
            try:
                left = memoryview("".join(lines).encode())
                while left:
                    left = left[out.write(left) :]
                os.fsync(out.fileno())
            except (
                BaseException
            ):  # half of it, or all without a word that it is there, would end the chain of digests
                with suppress(OSError):
                    os.ftruncate(out.fileno(), before)
                raise
        self.digest = digest
        self.rows.extend(rows)
        self.known.update(row.id for row in rows)

    def check(self, expressions: Sequence[Expression], visual_tokens: int) -> None:
        """Refuse answers that are not to these expressions.

        Args:
            expressions: that are asked now; answers to others are not looked at.
            visual_tokens: of the model.

        Raises:
            BundleError: an answer about another image, or one of another size, or of tokens that there are not.
        """
        asked = {each.id: each for each in expressions}
        for number, row in enumerate(self.rows, 1):
            expression = asked.get(row.id)
            if expression is None:
                continue
            size = (
                row.width if expression.width is None else expression.width,
                expression.height or row.height,
            )
            wrong = ""
            if row.image != expression.image:
                wrong = f"image {row.image}, which is {expression.image} in the annotations"
            elif (row.width, row.height) != size:
                wrong = f"width and height {row.width}x{row.height}, which are {size[0]}x{size[1]} in the annotations"
            elif max(row.kept_indices, default=0) >= visual_tokens:
                wrong = f"kept_indices up to {max(row.kept_indices)}, and the model has {visual_tokens} visual tokens"
            if wrong:
                raise BundleError(
                    f"has {wrong} (expression {row.id})",
                    subject=f"{self.folder / ANSWERS}, line {number}",
                    hint=_START_AGAIN,
                )


def open_journal(folder: Path, settings: Settings, *, replace: bool = False) -> Journal:
    """Make the folder of an evaluation, or go on with it.

    Args:
        folder: absent, empty, or an evaluation's.
        settings: what its answers must have in common.
        replace: throw an evaluation of other settings away.

    Raises:
        BundleError: something else is there, an evaluation of other settings, or a damaged one.
    """
    _, there = open_result_folder(folder, settings, EVALUATION, replace=replace)
    path = folder / ANSWERS
    if not there or not os.path.lexists(path):
        return Journal(folder, Answers([], [first_digest(settings)]))
    content = _content(path, BundleError)
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):  # the end of a write that was cut short
        write_atomically(path, whole)
    return Journal(folder, _answers(whole, path, settings, BundleError))


def read_journal(folder: Path, settings: Settings) -> Answers | None:
    """The answers in a folder, where its journal is still there.

    Raises:
        InputError: it is damaged, or was changed.
    """
    path = folder / ANSWERS
    if not os.path.lexists(path):
        return None
    content = _content(path, InputError)
    return _answers(content[: content.rfind(b"\n") + 1], path, settings, InputError)


def read_settings(folder: Path) -> Settings | None:
    """Of the evaluation in a folder; None where answers came from a file.

    Raises:
        InputError: they are damaged.
    """
    path = folder / SETTINGS
    hint = "it is damaged or was written by another version: run the same evaluation again, with --replace"
    return Settings.read(path, hint=hint) if os.path.lexists(path) else None


_START_AGAIN = "start the evaluation again with --replace, or with another -o"


def _content(path: Path, error: type[GapExportError]) -> bytes:
    return read_bytes(path, changed(JOURNAL, error=error))


def _answers(whole: bytes, path: Path, settings: Settings, error: type[GapExportError]) -> Answers:
    """Rows of whole lines, each of which must follow from the one before."""
    rows, digests, known = list[AnswerRow](), [first_digest(settings)], set[str]()
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        subject = f"{path}, line {number}"
        try:
            content, digest = unsealed(line, digests[-1])
        except ValueError as reason:
            raise error(str(reason), subject=subject, hint=_START_AGAIN) from reason
        row = AnswerRow.parse(content, subject=subject, hint=_START_AGAIN, error=error)
        if row.id in known:
            raise error(
                f"holds the answer to {row.id} twice",
                subject=subject,
                hint=f"two evaluations wrote into it at once: {_START_AGAIN}",
            )
        known.add(row.id)
        rows.append(row)
        digests.append(digest)
    return Answers(rows, digests)
