"""Annotations of one small data set in every format, and where real ones lie."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gap_export.evaluation.refer.annotations import Expression

REFCOCO = Path(os.environ.get("GAP_EXPORT_REFCOCO", "../shared/data/refcoco"))
"""Folder with `refcoco_val.json`, where there is one."""

FORMATS = ("minigpt4", "shikra", "internvl", "refer", "mdetr", "parquet")


@pytest.fixture(scope="session")
def refcoco() -> Path:
    """The real annotations of RefCOCO val, which are not part of this project."""
    folder = REFCOCO if REFCOCO.is_absolute() else Path(__file__).resolve().parents[3] / REFCOCO
    path = folder / "refcoco_val.json"
    if not path.is_file():
        pytest.skip(f"no RefCOCO annotations at {path} (set GAP_EXPORT_REFCOCO)")
    return path


@pytest.fixture(scope="session")
def few() -> list[Expression]:
    """Five expressions about three objects in two images."""
    first, second = "COCO_train2014_000000000001.jpg", "COCO_train2014_000000000002.jpg"
    return [
        Expression("a", first, "the red mug", (10.5, 20.25, 60.5, 80.25), 640, 480),
        Expression("b", first, "mug on the left", (10.5, 20.25, 60.5, 80.25), 640, 480),
        Expression("c", first, "caf\u00e9 sign", (100.0, 0.0, 640.0, 479.0), 640, 480),
        Expression("d", second, "dog", (0.0, 0.0, 50.0, 60.0), 100, 200),
        Expression("e", second, "brown dog", (0.0, 0.0, 50.0, 60.0), 100, 200),
    ]


def _extents(each: Expression) -> list[float]:
    x1, y1, x2, y2 = each.box
    return [x1, y1, x2 - x1, y2 - y1]


def _objects(expressions: Sequence[Expression]) -> dict[tuple[str, Any], int]:
    """(image, box) -> a running number."""
    numbers: dict[tuple[str, Any], int] = {}
    for each in expressions:
        numbers.setdefault((each.image, each.box), len(numbers) + 1)
    return numbers


def write_as(name: str, expressions: Sequence[Expression], folder: Path) -> Path:
    """The same expressions in one of the formats; what to give as `--data`."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = _objects(expressions)
    if name == "minigpt4":
        path = folder / "eval.json"
        rows = [
            {
                "img_id": f"{each.image.removesuffix('.jpg')}_{numbers[each.image, each.box]}",
                "sents": each.text,
                "bbox": _extents(each),
                "height": each.height,
                "width": each.width,
            }
            for each in expressions
        ]
        path.write_text(json.dumps(rows))
        return path
    if name in ("shikra", "internvl"):
        path = folder / f"{name}.jsonl"
        keys = ("img_path", "expression") if name == "shikra" else ("image", "sent")
        rows = [
            {
                keys[0]: each.image,
                keys[1]: each.text,
                "bbox": list(each.box),
                "width": each.width,
                "height": each.height,
            }
            for each in expressions
        ]
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
        return path
    if name == "refer":
        return _refer(expressions, folder)
    if name == "mdetr":
        path = folder / "finetune.json"
        path.write_text(json.dumps(_mdetr(expressions)))
        return path
    return _parquet(expressions, folder)


def _refer(expressions: Sequence[Expression], folder: Path) -> Path:
    numbers, images = _objects(expressions), {}
    sentences: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for count, each in enumerate(expressions):
        images.setdefault(each.image, (len(images) + 1, each.width, each.height))
        sentence = {"sent_id": count, "sent": each.text, "raw": each.text, "tokens": each.text.split()}
        sentences.setdefault((each.image, each.box), []).append(sentence)
    references = [
        {
            "ref_id": number,
            "ann_id": number,
            "image_id": images[image][0],
            "split": "val",
            "category_id": 1,
            "file_name": f"{image.removesuffix('.jpg')}_{number}.jpg",
            "sent_ids": [each["sent_id"] for each in sentences[image, box]],
            "sentences": sentences[image, box],
        }
        for (image, box), number in numbers.items()
    ]
    instances = {
        "images": [
            {"id": number, "file_name": image, "width": width, "height": height}
            for image, (number, width, height) in images.items()
        ],
        "annotations": [
            {"id": number, "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
            for (_, box), number in numbers.items()
        ],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    with (folder / "refs(unc).p").open("wb") as file:
        pickle.dump(references, file, protocol=2)
    return folder


def _mdetr(expressions: Sequence[Expression]) -> dict[str, Any]:
    return {
        "images": [
            {
                "id": number,
                "file_name": each.image,
                "caption": each.text,
                "width": each.width,
                "height": each.height,
                "original_id": 7,
                "dataset_name": "refcoco",
            }
            for number, each in enumerate(expressions)
        ],
        "annotations": [
            {"id": number, "image_id": number, "bbox": _extents(each), "category_id": 1}
            for number, each in enumerate(expressions)
        ],
        "categories": [],
    }


def _parquet(expressions: Sequence[Expression], folder: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    answers: dict[tuple[str, Any], list[str]] = {}
    for each in expressions:
        answers.setdefault((each.image, each.box), []).append(each.text)
    sizes = {each.image: (each.width or 1, each.height or 1) for each in expressions}
    rows = [
        {
            "question_id": str(number),
            "image": {"bytes": encoded(sizes[image]), "path": None},
            "question": "Please carefully observe the area",
            "answer": answers[image, box],
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "iscrowd": 0,
            "file_name": f"{image.removesuffix('.jpg')}_{number}.jpg",
        }
        for (image, box), number in _objects(expressions).items()
    ]
    parquet.write_table(
        pyarrow.Table.from_pylist(rows), folder / "val-00000-of-00001.parquet", row_group_size=2
    )
    return folder


def encoded(size: tuple[int, int]) -> bytes:
    """An image of one colour."""
    content = io.BytesIO()
    Image.new("RGB", size, (size[0] % 256, size[1] % 256, 7)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(params=FORMATS)
def format_name(request: pytest.FixtureRequest) -> str:
    """Each of the formats."""
    return str(request.param)


Writer = Callable[[str, Sequence[Expression], Path], Path]


@pytest.fixture(scope="session")
def writer() -> Writer:
    """`writer(format, expressions, folder)`: see `write_as`."""
    return write_as
