"""Answers from elsewhere, read from a file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from gap_export.boxes.codecs import Size
from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import Expression
from gap_export.evaluation.refer.annotations.format import shown
from gap_export.evaluation.refer.image_source import Source
from gap_export.evaluation.refer.journal import AnswerRow
from gap_export.evaluation.refer.json_rows import JsonRow, escaped, json_rows
from gap_export.files.kinds import PREDICTIONS


def read_predictions(
    path: Path,
    expressions: Sequence[Expression],
    source: Source | None,
    *,
    not_asked: Collection[str] = (),
) -> list[AnswerRow]:
    """Answers from elsewhere: JSON lines, or a JSON list, of {id, answer}.

    Args:
        path: of the file.
        expressions: that answers are to be scored of.
        source: of images, for data sets that do not tell how large those are.
        not_asked: ids of further expressions of the data set, whose answers are passed over.

    Returns:
        Answers in the order of the file; lone surrogates in them are written as escapes.

    Raises:
        InputError: a line that cannot be used, an id that the data set does not have or that comes twice, an image whose size is
            not known.
    """
    known = {expression.id: expression for expression in expressions}
    passed_over = frozenset(not_asked)
    seen: set[str] = set()
    rows = []
    for row in json_rows(path, replace(PREDICTIONS, hint="mend the line that is not {id, answer}")):
        identity, answer = _fields(row)
        if identity in seen:
            raise _unusable(row, f"answers {identity} again")
        seen.add(identity)
        expression = known.get(identity)
        if expression is not None:
            width, height = _size(expression, source)
            rows.append(
                AnswerRow(
                    id=identity,
                    image=expression.image,
                    width=width,
                    height=height,
                    answer=escaped(answer),
                    tokens=0,
                    seconds=0.0,
                )
            )
        elif identity not in passed_over:
            raise _unusable(row, f"answers {identity}, which the data set does not have")
    return rows


def _fields(row: JsonRow) -> tuple[str, str]:
    """Id and answer of a row; an id may be a whole number, as data sets have them."""
    given = row.value
    if not isinstance(given, dict) or not {"id", "answer"} <= given.keys():
        raise InputError("is not {id, answer}", subject=row.where, hint="one answer per line")
    identity, answer = given["id"], given["answer"]
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise _unusable(row, f"has the id {shown(identity)}, which is neither a text nor a whole number")
    if isinstance(identity, int) and not -(2**63) <= identity < 2**63:
        raise _unusable(row, "has an id of more than 64 bits")
    if not isinstance(answer, str):
        raise _unusable(row, "has an answer that is no text")
    return str(identity), answer


def _size(expression: Expression, source: Source | None) -> Size:
    if expression.width is not None and expression.height is not None:
        return expression.width, expression.height
    if source is None:
        raise InputError(
            "has a size that is not in the annotations",
            subject=f"image {expression.image}",
            hint="give the images (--images)",
        )
    return source.size(expression.image)


def _unusable(row: JsonRow, message: str) -> InputError:
    return InputError(
        escaped(message), subject=row.where, hint="answers go by the ids of the same data set and split"
    )
