"""Annotations of referring expressions, in the formats that data sets are published in. The contract, and which format a file has.

    format      file                                                        boxes
    minigpt4    JSON list of {img_id, sents, bbox, height, width}           x, y, width, height
    shikra      JSON lines of {img_path, expression, bbox}                  x1, y1, x2, y2
    internvl    JSON lines of {image, sent, bbox, width, height}            x1, y1, x2, y2 (Qwen's are the same)
    refer       folder with refs(unc).p and instances.json                  x, y, width, height
    parquet     files with columns question_id, image, answer, bbox         x, y, width, height; images inside (lmms-lab's)

All boxes are pixels of the original image. A format is told by what a file holds, never by its name alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gap_export.boxes.codecs import Box
from gap_export.errors import InputError


@dataclass(frozen=True)
class Expression:
    """One referring expression.

    Attributes:
        id: unique in its data set.
        image: the image's name.
        text: what to find.
        box: the true one, (x1, y1, x2, y2) in pixels.
        width: of the image, where the annotations tell.
        height: the same.
    """

    id: str
    image: str
    text: str
    box: Box
    width: int | None = None
    height: int | None = None


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
        format: name in the table above.
        expressions: in the order of the file, ids unique.
        images: where the data set brings them.
    """

    format: str
    expressions: tuple[Expression, ...]
    images: EmbeddedImages | None = None


def read_annotations(path: Path, *, split: str | None = None) -> Annotations:
    """Read a data set.

    Args:
        path: a file, or the folder of a data set in several files.
        split: where the format holds several; others have one, which any name stands for.

    Raises:
        InputError: missing, of no known format (with what was found), a row that cannot be used (with its number), ids that come
            twice, a split that is not there (with those that are).
        MissingRequirementError: parquet, and pyarrow is not installed.
    """
    if not path.exists():
        raise InputError("does not exist", subject=str(path), hint="give the annotation file (--data)")
    if path.is_dir():
        return _of_folder(path, split)
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:4] == b"PAR1":
        from gap_export.evaluation.refer.annotations.parquet import read_parquet

        return _checked(read_parquet([path]), path)
    if path.suffix == ".p" or head[:1] == b"\x80" or head[:2] in (b"(l", b"]q"):
        from gap_export.evaluation.refer.annotations.refer import read_refer

        return _checked(read_refer(path, split), path)
    from gap_export.evaluation.refer.annotations.json_formats import read_json

    return _checked(read_json(path), path)


def _of_folder(folder: Path, split: str | None) -> Annotations:
    tables, pickles = sorted(folder.rglob("*.parquet")), sorted(folder.glob("refs*.p"))
    if pickles:
        from gap_export.evaluation.refer.annotations.refer import read_refer

        if len(pickles) > 1:
            raise InputError(
                f"holds annotations by several: {', '.join(each.name for each in pickles)}",
                subject=str(folder),
                hint="give the path of one of them",
            )
        return _checked(read_refer(pickles[0], split), folder)
    if tables:
        from gap_export.evaluation.refer.annotations.parquet import read_parquet

        wanted = [each for each in tables if split is None or each.name.partition("-")[0] == split]
        if not wanted:
            there = sorted({each.name.partition("-")[0] for each in tables})
            raise InputError(
                f"is not there; there are {', '.join(there)}",
                subject=f"split {split} of {folder}",
                hint="choose one of them (--split)",
            )
        return _checked(read_parquet(wanted), folder)
    found = sorted(each.name for each in folder.iterdir())[:5]
    raise InputError(
        f"holds neither refs(...).p nor .parquet files, but {', '.join(found) or 'nothing'}",
        subject=str(folder),
        hint="give the annotation file itself (--data)",
    )


def _checked(annotations: Annotations, path: Path) -> Annotations:
    """Refuse ids that come twice: an answer could not be told to belong to one of them."""
    seen: set[str] = set()
    twice = [each.id for each in annotations.expressions if each.id in seen or seen.add(each.id)]  # type: ignore[func-returns-value]
    if twice:
        raise InputError(
            f"has expression ids that come twice: {', '.join(dict.fromkeys(twice[:5]))}",
            subject=str(path),
            hint="ids must be unique; two files may have been put together",
        )
    if not annotations.expressions:
        raise InputError("holds no expressions", subject=str(path), hint="the file is empty: get it again")
    return annotations


def shown(value: object) -> str:
    """What was found, short, for messages."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
