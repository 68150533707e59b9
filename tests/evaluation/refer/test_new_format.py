"""A format of annotations from outside the package: one module, one row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import (
    FORMATS,
    AnnotationFile,
    AnnotationFormat,
    Annotations,
    read_annotations,
    register,
)
from gap_export.evaluation.refer.annotations.rows import RowReader
from gap_export.evaluation.refer.dataset import open_dataset
from gap_export.evaluation.refer.evaluate import evaluate_predictions
from gap_export.evaluation.refer.results import open_run

HEADER = "id,image,text,x1,y1,x2,y2"


def recognizes(file: AnnotationFile) -> bool:
    return file.head.startswith(HEADER.encode())


def read(file: AnnotationFile, split: str | None) -> Annotations:
    expressions = []
    for number, row in enumerate(csv.DictReader(io.StringIO(file.path.read_text())), 1):
        reader = RowReader(
            file.path, number, {**row, "bbox": [row[edge] for edge in ("x1", "y1", "x2", "y2")]}
        )
        box = reader.corners("bbox")
        expressions.append(
            reader.expression(reader.text("id"), reader.text("image"), reader.text("text"), box)
        )
    return Annotations("toy", tuple(expressions))


TOY = AnnotationFormat(
    name="toy",
    files=f"a table with the columns {HEADER}",
    published_by="nobody",
    images="`--images`",
    suffixes=(".csv",),
    recognizes=recognizes,
    read=read,
)


@pytest.fixture
def toy() -> Iterator[None]:
    register(TOY)
    yield
    del FORMATS["toy"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "refs.csv"
    path.write_text(f"{HEADER}\na,1.png,the red mug,1,2,30,40\nb,1.png,a cat,5,5,6,7.5\n")
    return path


@pytest.mark.usefixtures("toy")
def test_its_files_are_read_like_any_other(table: Path, tmp_path: Path) -> None:
    dataset = open_dataset(str(table), images=tmp_path)
    assert dataset.name == "refs.csv (toy)"
    assert [(each.id, each.text, each.box) for each in dataset.expressions] == [
        ("a", "the red mug", (1.0, 2.0, 30.0, 40.0)),
        ("b", "a cat", (5.0, 5.0, 6.0, 7.5)),
    ]
    assert len(dataset.identity) == 64


@pytest.mark.usefixtures("toy")
def test_its_expressions_are_scored(table: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "1.png")
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": "a", "answer": "[0.02, 0.16, 0.47, 0.75]"}\n{"id": "b", "answer": "none"}\n')
    dataset = open_dataset(table, images=tmp_path)
    record = evaluate_predictions(answers, dataset, "llava", out=tmp_path / "run")
    assert (record.expressions, record.accuracy, record.unparsable) == (2, 0.5, 1)
    run = open_run(tmp_path / "run")
    assert (run.ids, run.hits.tolist()) == (["a", "b"], [True, False])


@pytest.mark.usefixtures("toy")
def test_its_mistakes_are_named_by_row(table: Path) -> None:
    table.write_text(table.read_text() + "c,1.png,dog,9,9,3,3\n")
    with pytest.raises(InputError, match="has no area") as caught:
        read_annotations(table)
    assert "row 3" in caught.value.subject
    table.write_text(table.read_text().replace("c,1.png,dog,9,9,3,3", "a,1.png,dog,1,1,3,3"))
    with pytest.raises(InputError, match="come twice: a"):
        read_annotations(table)


@pytest.mark.usefixtures("toy")
def test_a_name_is_taken_once(table: Path) -> None:
    with pytest.raises(ValueError, match="'toy' is in the table already"):
        register(TOY)
    with pytest.raises(ValueError, match="'shikra'"):
        register(FORMATS["shikra"])


def test_without_the_row_it_is_of_no_known_format(table: Path) -> None:
    with pytest.raises(InputError, match="is not JSON"):
        read_annotations(table)
