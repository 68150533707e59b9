"""The folder of a finished evaluation: one row per expression, the record under each protocol, and where it all came from.

PROTOCOL-results.parquet    what was answered and how it scored
PROTOCOL-eval.json          the record; it is written last: where it is, all is
provenance.json             bundle, data and machine, for those who read the results later, and hashes of the two above

Whoever reads results need not be who wrote them. Nothing in them is believed that something else in them contradicts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gap_export.boxes.codecs import Box
from gap_export.environment import cpu_name, versions
from gap_export.errors import InputError, MissingRequirementError
from gap_export.evaluation.digests import sha256_of_bytes
from gap_export.evaluation.refer.annotations import SkippedRow
from gap_export.evaluation.refer.consistency import AGAIN, check_answers, check_record
from gap_export.evaluation.refer.dataset import Dataset
from gap_export.evaluation.refer.json_rows import escaped
from gap_export.evaluation.refer.protocols import check_protocol
from gap_export.evaluation.refer.result_table import ResultRow, read_table, table_of
from gap_export.evaluation.refer.run import EvalRecord, Scored
from gap_export.files import ListedFolder, read_bytes, results_kind, write_atomically
from gap_export.files.kinds import REPORT
from gap_export.records import Flag, Record, Text

PROVENANCE = "provenance.json"
SCORED = results_kind(
    "evaluation of answers from a file",
    PROVENANCE,
    frozenset({"data", "split", "processor", "versions"}),
    r"provenance\.json|[a-z-]+-(results\.parquet|eval\.json)",
)
"""How folders of scored answers from a file are told."""


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


@dataclass(frozen=True)
class EvalRun:
    """Results of an evaluation under one protocol.

    Attributes:
        folder: where they lie.
        record: of the evaluation.
        ids: of the expressions.
        images: that they are about.
        hits: [N] bool.
        boxes: None without one.
        rows: all of these, and what else is in the table.
    """

    folder: Path
    record: EvalRecord
    ids: list[str]
    images: list[str]
    hits: NDArray[np.bool_]
    boxes: list[Box | None]
    rows: tuple[ResultRow, ...] = ()


class Hashes(Record):
    """Of the results under one protocol.

    Attributes:
        results: SHA-256 of the table.
        record: SHA-256 of the record.
        answers: last digest of the journal; None where answers came from a file.
    """

    results: Text
    record: Text
    answers: Text | None


class Provenance(Record):
    """Where things were, and what answered.

    Attributes:
        bundle: folder; None where answers came from a file.
        data: as of `dataset.open_dataset`, a path made absolute.
        split: as of `dataset.open_dataset`.
        images: folder of images, where the data set does not bring them.
        ignore_exif: as of `dataset.open_dataset`.
        box_format: in which answers from a file were read; None for those of a model, whose settings say it.
        skipped: rows of the annotations that could not be used and were left out.
        processor: of the machine that scored.
        versions: of Python and of the packages that run bundles.
        hashes: protocol -> of its results.
    """

    bundle: str | None
    data: str
    split: str | None
    images: str | None
    ignore_exif: Flag = False
    box_format: Text | None = None
    skipped: tuple[SkippedRow, ...] = ()
    processor: str
    versions: dict[str, str]
    hashes: dict[str, Hashes] = Field(default_factory=dict)


def results_path(folder: Path, protocol: str) -> Path:
    """File of the rows under a protocol."""
    return folder / f"{protocol}-results.parquet"


def record_path(folder: Path, protocol: str) -> Path:
    """File of the record under a protocol."""
    return folder / f"{protocol}-eval.json"


def store_results(
    record: EvalRecord,
    scored: Sequence[Scored],
    dataset: Dataset,
    bundle: Path | None,
    folder: Path,
    *,
    answers: str | None = None,
) -> None:
    """Write where results are from, the results, and last the record.

    Args:
        record: of the evaluation.
        scored: every expression.
        dataset: that they are of.
        bundle: folder of the one that answered; None where answers came from a file.
        folder: of the evaluation.
        answers: last digest of the journal, where there is one.

    Raises:
        BundleError: it cannot be written.
    """
    table = table_of(map(_row, scored))
    text = record.text()
    hashes = Hashes(results=sha256_of_bytes(table), record=sha256_of_bytes(text.encode()), answers=answers)
    provenance = Provenance(
        bundle=None if bundle is None else escaped(str(bundle.absolute())),
        data=escaped(str(Path(dataset.data).absolute()) if os.path.exists(dataset.data) else dataset.data),
        split=dataset.split,
        images=None if dataset.images is None else escaped(str(dataset.images.absolute())),
        ignore_exif=dataset.ignore_exif,
        box_format=record.box_format if bundle is None else None,
        skipped=dataset.skipped,
        processor=cpu_name(),
        versions=versions(),
        hashes={record.protocol: hashes},
    )
    provenance = _with_other_protocols(provenance, folder)
    results = ListedFolder(folder, SCORED)
    results.write(PROVENANCE, provenance.text())
    results.write(results_path(folder, record.protocol).name, table)
    results.write(record_path(folder, record.protocol).name, text)


def _with_other_protocols(provenance: Provenance, folder: Path) -> Provenance:
    """Keep hashes of results that are from the same place under other protocols; those from elsewhere are not vouched for."""
    with suppress(InputError):
        before = read_provenance(folder)
        if all(getattr(before, name) == getattr(provenance, name) for name in _PLACES):
            return provenance.model_copy(update={"hashes": {**before.hashes, **provenance.hashes}})
    return provenance


_PLACES = ("bundle", "data", "split", "images", "ignore_exif", "box_format", "skipped")


def _row(each: Scored) -> ResultRow:
    return ResultRow(
        id=each.expression.id,
        image=each.expression.image,
        expression=each.expression.text,
        answer=each.row.answer,
        truth=each.expression.box,
        box=each.score.box,
        iou=each.score.iou,
        hit=each.score.hit,
        no_box_because=each.row.refused or each.score.reason,
        tokens=each.row.tokens,
        kept_indices=each.row.kept_indices,
        seconds=each.row.seconds,
    )


def write_results(scored: Sequence[Scored], path: Path) -> None:
    """The table alone, for those who need no more.

    Raises:
        BundleError: it cannot be written.
    """
    write_atomically(path, table_of(map(_row, scored)))


def open_run(folder: Path | str, protocol: str = "unc") -> EvalRun:
    """Read an evaluation.

    Raises:
        InputError: none there, not finished, or not under this protocol; or its files are damaged, were changed, or contradict each
            other.
    """
    check_protocol(protocol)
    folder = Path(folder)
    path, record_file = results_path(folder, protocol), record_path(folder, protocol)
    if not (os.path.lexists(path) and os.path.lexists(record_file)):
        raise InputError(
            f"holds no finished evaluation under {protocol}",
            subject=str(folder),
            hint="run gap-export eval with this --protocol and -o; rerun the same command to resume",
        )
    content = read_bytes(record_file, REPORT)
    record = EvalRecord.parse(content, subject=str(record_file), hint=AGAIN)
    if record.protocol != protocol:
        raise InputError(
            f"protocol is {record.protocol}, not {protocol}", subject=str(record_file), hint=AGAIN
        )
    rows, table = read_table(path)
    check_record(record, rows, record_file)
    hashes = read_provenance(folder).hashes.get(protocol)
    if hashes is None:
        raise InputError(
            f"hashes holds none of the results under {protocol}",
            subject=str(folder / PROVENANCE),
            hint=AGAIN,
        )
    for file, now, written in (
        (path, table, hashes.results),
        (record_file, content, hashes.record),
    ):
        if sha256_of_bytes(now) != written:
            raise InputError(
                f"was changed since it was written: its SHA-256 is not the one in {PROVENANCE}",
                subject=str(file),
                hint=AGAIN,
            )
    check_answers(record, rows, hashes.answers, folder)
    return EvalRun(
        folder=folder,
        record=record,
        ids=[row.id for row in rows],
        images=[row.image for row in rows],
        hits=np.array([row.hit for row in rows], np.bool_),
        boxes=[row.box for row in rows],
        rows=tuple(rows),
    )


def read_provenance(folder: Path) -> Provenance:
    """From the folder of an evaluation.

    Raises:
        InputError: it is missing or damaged.
    """
    return Provenance.read(
        folder / PROVENANCE,
        hint="it is missing or damaged: run the same evaluation again: what is answered is kept, and this file is written anew",
    )
