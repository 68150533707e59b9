"""The folder of a finished evaluation: one row per expression, the record under each protocol, and where it all came from.

PROTOCOL-results.parquet    what was answered and how it scored
PROTOCOL-eval.json          the record; it is written last: where it is, all is
provenance.json             bundle, data and machine, for those who read the results later
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gap_export.boxes.codecs import Box
from gap_export.environment import cpu_name, versions
from gap_export.errors import InputError, MissingRequirementError, first_line
from gap_export.evaluation.refer.annotations import SkippedRow
from gap_export.evaluation.refer.dataset import Dataset
from gap_export.evaluation.refer.json_rows import escaped
from gap_export.evaluation.refer.run import EvalRecord, Scored
from gap_export.files import FolderKind, write_atomically
from gap_export.records import Record

PROVENANCE = "provenance.json"
SCORED = FolderKind(
    "evaluation",
    PROVENANCE,
    frozenset({"data", "split", "processor", "versions"}),
    lambda _: [re.compile(r"provenance\.json|[a-z-]+-(results\.parquet|eval\.json)")],
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
    """

    folder: Path
    record: EvalRecord
    ids: list[str]
    images: list[str]
    hits: NDArray[np.bool_]
    boxes: list[Box | None]


class Provenance(Record):
    """Where things were, and what answered.

    Attributes:
        bundle: folder; None where answers came from a file.
        data: as of `dataset.open_dataset`, a path made absolute.
        split: as of `dataset.open_dataset`.
        images: folder of images, where the data set does not bring them.
        ignore_exif: as of `dataset.open_dataset`.
        skipped: rows of the annotations that could not be used and were left out.
        processor: of the machine that scored.
        versions: of Python and of the packages that run bundles.
    """

    bundle: str | None
    data: str
    split: str | None
    images: str | None
    ignore_exif: bool = False
    skipped: tuple[SkippedRow, ...] = ()
    processor: str
    versions: dict[str, str]


def results_path(folder: Path, protocol: str) -> Path:
    """File of the rows under a protocol."""
    return folder / f"{protocol}-results.parquet"


def record_path(folder: Path, protocol: str) -> Path:
    """File of the record under a protocol."""
    return folder / f"{protocol}-eval.json"


def store_results(
    record: EvalRecord, scored: Sequence[Scored], dataset: Dataset, bundle: Path | None, folder: Path
) -> None:
    """Write where results are from, the results, and last the record.

    Args:
        record: of the evaluation.
        scored: every expression.
        dataset: that they are of.
        bundle: folder of the one that answered; None where answers came from a file.
        folder: of the evaluation.

    Raises:
        BundleError: it cannot be written.
    """
    provenance = Provenance(
        bundle=None if bundle is None else escaped(str(bundle.absolute())),
        data=escaped(str(Path(dataset.data).absolute()) if Path(dataset.data).exists() else dataset.data),
        split=dataset.split,
        images=None if dataset.images is None else escaped(str(dataset.images.absolute())),
        ignore_exif=dataset.ignore_exif,
        skipped=dataset.skipped,
        processor=cpu_name(),
        versions=versions(),
    )
    provenance.write(folder / PROVENANCE)
    write_results(scored, results_path(folder, record.protocol))
    record.write(record_path(folder, record.protocol))


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


def open_run(folder: Path | str, protocol: str = "unc") -> EvalRun:
    """Read an evaluation.

    Raises:
        InputError: none there, not finished, or not under this protocol.
    """
    from pyarrow import ArrowException, parquet

    folder = Path(folder)
    path, record = results_path(folder, protocol), record_path(folder, protocol)
    if not (path.is_file() and record.is_file()):
        raise InputError(
            f"holds no finished evaluation under {protocol}",
            subject=str(folder),
            hint="run gap-export eval with this --protocol and -o; rerun the same command to resume",
        )
    stored = EvalRecord.read(record, hint="run the evaluation again")
    try:
        rows = parquet.read_table(path, columns=["id", "image", "hit", "box"]).to_pylist()
    except (OSError, ArrowException) as error:
        raise InputError(
            f"cannot be read: {first_line(error)}",
            subject=str(path),
            hint="run the evaluation again",
        ) from error
    return EvalRun(
        folder=folder,
        record=stored,
        ids=[row["id"] for row in rows],
        images=[row["image"] for row in rows],
        hits=np.array([row["hit"] for row in rows], np.bool_),
        boxes=[None if row["box"] is None else tuple(row["box"]) for row in rows],
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
