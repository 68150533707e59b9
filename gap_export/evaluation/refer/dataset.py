"""What `--data` means: a file of annotations with its images, or scenes made on the spot."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gap_export.boxes import scenes
from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import FORMATS, Expression, SkippedRow, read_annotations
from gap_export.evaluation.refer.image_source import Embedded, Folder, Scenes, Source
from gap_export.files import is_file, opened
from gap_export.files.kinds import ANNOTATION_TABLE

SCENES = 2000
_PIECE_BYTES = 2**20
_SCENES = re.compile(r"scenes(?::([1-9]\d*))?")


@dataclass(frozen=True)
class Dataset:
    """Expressions and where their images are.

    Attributes:
        name: for people.
        identity: sha256 of the annotations, or the name of scenes, which are the same every time.
        expressions: in order.
        source: of the images; None where there are none at hand.
        data: what it was opened by.
        split: that was asked for; None for all there is.
        images: folder of images that was given.
        ignore_exif: whether images are taken as they are stored.
        skipped: rows of the annotations that were left out.
    """

    name: str
    identity: str
    expressions: tuple[Expression, ...]
    source: Source | None
    data: str = ""
    split: str | None = None
    images: Path | None = None
    ignore_exif: bool = False
    skipped: tuple[SkippedRow, ...] = ()


def open_dataset(
    data: str | Path,
    *,
    split: str | None = None,
    images: Path | str | None = None,
    ignore_exif: bool = False,
    skip_bad_rows: bool = False,
) -> Dataset:
    """Open a data set.

    Args:
        data: path of annotations; `scenes`, 2000 held-out scenes with one expression each; or `scenes:7`, with seven each.
        split: name of a split, where the data set has several.
        images: folder of the images, where the data set does not bring them.
        ignore_exif: take images as they are stored; by default they are upright, as their EXIF orientation says.
        skip_bad_rows: leave out annotations that cannot be used; they are listed in the result's `skipped`.

    Raises:
        InputError: annotations that cannot be read, a split of scenes, or no folder of images.
    """
    data, images = str(data), None if images is None else Path(images)
    built_in = _SCENES.fullmatch(data)
    if built_in:
        if split is not None:
            raise InputError(
                "is not there: scenes have no splits", subject=f"split {split}", hint="leave --split out"
            )
        per_scene = int(built_in[1] or 1)
        expressions = tuple(_scenes(per_scene))
        return Dataset(data, data, expressions, Scenes(SCENES), data=data, split=split, images=images)
    path = Path(data)
    annotations = read_annotations(path, split=split, skip_bad_rows=skip_bad_rows)
    source: Source | None = None if images is None else Folder(images, upright=not ignore_exif)
    if source is None and annotations.images is not None:
        source = Embedded(annotations.images, upright=not ignore_exif)
    name = f"{path.name} ({annotations.format})"
    identity = _sha256(path, FORMATS[annotations.format].suffixes)
    return Dataset(
        name,
        identity,
        annotations.expressions,
        source,
        data=data,
        split=split,
        images=images,
        ignore_exif=ignore_exif,
        skipped=annotations.skipped,
    )


def _scenes(per_scene: int) -> Iterator[Expression]:
    """Held-out scenes with as many different expressions each as were asked for, or as the scene allows."""
    for index in range(SCENES):
        objects, name = scenes.objects_of(scenes.HELD_OUT_SEED, index), Scenes.name_of(index)
        draw = np.random.default_rng((scenes.HELD_OUT_SEED, index, 1))
        for number, query in enumerate(scenes.sample_queries(draw, objects, per_scene, repeat=False)):
            x1, y1, x2, y2 = (float(edge) for edge in objects[query.target].box)
            size = (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE)
            yield Expression(f"{name}.{number}", name, query.expression, (x1, y1, x2, y2), *size)


def _sha256(path: Path, suffixes: Sequence[str]) -> str:
    """Of a file, or of all files of a folder with these suffixes, in the order of their names.

    Raises:
        InputError: one of them cannot be read.
    """
    found = [path] if is_file(path) else sorted(each for each in path.rglob("*") if each.suffix in suffixes)
    digest = hashlib.sha256()
    for file in found:
        if is_file(file):  # else a folder of such a name, or a link to nothing
            with opened(file, ANNOTATION_TABLE) as content:
                while piece := content.read(_PIECE_BYTES):
                    digest.update(piece)
    return digest.hexdigest()
