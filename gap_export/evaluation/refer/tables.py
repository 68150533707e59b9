"""Results as files: one row per expression in Parquet, answers from elsewhere as JSON lines."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from gap_export.errors import InputError, MissingRequirementError
from gap_export.evaluation.refer.annotations import Expression
from gap_export.evaluation.refer.image_source import Source
from gap_export.evaluation.refer.journal import AnswerRow
from gap_export.evaluation.refer.run import Scored
from gap_export.files import write_atomically


def check_pyarrow() -> None:
    """Refuse before long work where its results could not be written.

    Raises:
        MissingRequirementError: pyarrow is not installed.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise MissingRequirementError(
            "is needed for results", subject="pyarrow", hint="pip install 'gap-export[eval]'"
        ) from error


def write_results(scored: Sequence[Scored], path: Path) -> None:
    """One row per expression: id, image, expression, answer, true box, box, IoU, whether it hits, why there is no box, tokens
    generated, raster indices of the visual tokens kept, seconds."""
    import pyarrow
    from pyarrow import parquet

    box = pyarrow.list_(pyarrow.float64(), 4)
    schema = pyarrow.schema(
        [
            ("id", pyarrow.string()),
            ("image", pyarrow.string()),
            ("expression", pyarrow.string()),
            ("answer", pyarrow.string()),
            ("truth", box),
            ("box", box),
            ("iou", pyarrow.float64()),
            ("hit", pyarrow.bool_()),
            ("no_box_because", pyarrow.string()),
            ("tokens", pyarrow.int64()),
            ("kept_indices", pyarrow.list_(pyarrow.int32())),
            ("seconds", pyarrow.float64()),
        ]
    )
    rows = [
        {
            "id": each.expression.id,
            "image": each.expression.image,
            "expression": each.expression.text,
            "answer": each.row.answer,
            "truth": list(each.expression.box),
            "box": None if each.score.box is None else list(each.score.box),
            "iou": each.score.iou,
            "hit": each.score.hit,
            "no_box_because": each.row.refused or each.score.reason,
            "tokens": each.row.tokens,
            "kept_indices": list(each.row.kept_indices),
            "seconds": each.row.seconds,
        }
        for each in scored
    ]
    target = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), target)
    write_atomically(path, target.getvalue())


def read_predictions(path: Path, expressions: Sequence[Expression], source: Source | None) -> list[AnswerRow]:
    """Answers from elsewhere: JSON lines of {id, answer}.

    Args:
        path: of the file.
        expressions: of the data set, by whose ids answers are given.
        source: of images, for data sets that do not tell how large those are.

    Raises:
        InputError: a line that cannot be used, an id that the data set does not have or that comes twice, an image whose size is
            not known.
    """
    known = {expression.id: expression for expression in expressions}
    rows: dict[str, AnswerRow] = {}
    if not path.is_file():
        raise InputError("is not a file", subject=str(path), hint="give a file of JSON lines: id, answer")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            given = json.loads(line)
            identity, answer = str(given["id"]), given["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError("is not {id, answer}", subject=where, hint="one answer per line") from error
        expression = known.get(identity)
        if expression is None or identity in rows or not isinstance(answer, str):
            wrong = (
                f"answers {identity}, which the data set does not have"
                if expression is None
                else f"answers {identity} again"
                if identity in rows
                else "has an answer that is no text"
            )
            raise InputError(
                wrong, subject=where, hint="answers go by the ids of the same data set and split"
            )
        width, height = expression.width, expression.height
        if width is None or height is None:
            if source is None:
                raise InputError(
                    "has a size that is not in the annotations",
                    subject=f"image {expression.image}",
                    hint="give the images (--images)",
                )
            width, height = source.open(expression.image).size
        rows[identity] = AnswerRow(
            id=identity,
            image=expression.image,
            width=width,
            height=height,
            answer=answer,
            tokens=0,
            seconds=0.0,
        )
    return list(rows.values())
