"""Whether the files of an evaluation say the same: the record what the table adds up to, and the table what the model answered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gap_export.boxes import metrics
from gap_export.errors import InputError
from gap_export.evaluation.refer.journal import ANSWERS, read_journal, read_settings
from gap_export.evaluation.refer.result_table import ResultRow
from gap_export.evaluation.refer.run import EvalRecord
from gap_export.evaluation.result_folder import SETTINGS

AGAIN = "it is damaged, was changed, or is of another version: run the evaluation again"
"""What to do about files that do not."""


def check_record(record: EvalRecord, rows: Sequence[ResultRow], path: Path) -> None:
    """Hold a record against the table that it sums up.

    Raises:
        InputError: it says something else, with the field.
    """
    hits = np.array([row.hit for row in rows])
    accuracy = metrics.accuracy(hits.astype(np.float64), comparator=">")
    low, high = accuracy.interval()
    counted: dict[str, float] = {
        "expressions": len(rows),
        "images": len({row.image for row in rows}),
        "accuracy": accuracy.value,
        "low": low,
        "high": high,
        "mean_iou": float(np.mean([row.iou for row in rows])),
        "unparsable": sum(row.box is None for row in rows),
        "mean_kept": float(np.mean([len(row.kept_indices) for row in rows])),
    }
    for name, value in counted.items():
        stored = getattr(record, name)
        if not math.isclose(stored, value, rel_tol=1e-9, abs_tol=1e-9):
            raise InputError(
                f"{name} is {stored:g}, and the table has {value:g}", subject=str(path), hint=AGAIN
            )


def check_answers(record: EvalRecord, rows: Sequence[ResultRow], digest: str | None, folder: Path) -> None:
    """Hold results against the answers that they were made of, where the journal is still there.

    Args:
        record: of the evaluation.
        rows: of its table.
        digest: last of the journal when they were written; None where answers came from a file.
        folder: of the evaluation.

    Raises:
        InputError: settings or answers are damaged, missing, or others.
    """
    settings = read_settings(folder)
    if (settings is None) != (digest is None):
        raise InputError(
            "is missing, and belongs to these results"
            if settings is None
            else "is of a model, and answers came from a file",
            subject=str(folder / SETTINGS),
            hint=AGAIN,
        )
    if settings is None:
        return
    for name in ("backend", "split"):
        if getattr(settings, name) != getattr(record, name):
            raise InputError(
                f"{name} is {getattr(settings, name)}, and {getattr(record, name)} in the record",
                subject=str(folder / SETTINGS),
                hint=AGAIN,
            )
    if settings.box_format not in (None, record.box_format):
        raise InputError(
            f"box_format is {settings.box_format}, and {record.box_format} in the record",
            subject=str(folder / SETTINGS),
            hint=AGAIN,
        )
    answers = read_journal(folder, settings)
    if answers is None:
        return
    if digest not in answers.digests:
        raise InputError(
            "was changed since the results were written: no line has their digest",
            subject=str(folder / ANSWERS),
            hint=AGAIN,
        )
    given = {each.id: each for each in answers.rows}
    for row in rows:
        answer = given.get(row.id)
        for name in ("image", "answer", "tokens", "kept_indices", "seconds"):
            if answer is None or getattr(answer, name) != getattr(row, name):
                raise InputError(
                    f"{name} of expression {row.id} is another one in the table",
                    subject=str(folder / ANSWERS),
                    hint=AGAIN,
                )
