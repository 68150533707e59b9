"""Expressions that a page shows, and what is laid over their images: true box, boxes of both runs, patches that were pruned."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gap_export.boxes.draw import TINY, patch_edges
from gap_export.boxes.metrics import box_overlaps
from gap_export.bundle.manifest import Manifest
from gap_export.errors import GapExportError, InputError
from gap_export.evaluation.refer.compare import Disagreement
from gap_export.evaluation.refer.image_source import Source
from gap_export.evaluation.report.runs import Answer, ReportedRuns

LONG_SIDE = 480
"""Of an image on the page, at most; a page with thirty of them stays below two megabytes."""

_SEED = 0


@dataclass(frozen=True)
class ShownImage:
    """An image of the page, stored once however often it is shown.

    Attributes:
        key: that elements of the page refer to it by.
        width: of the original, pixels.
        height: of the original, pixels.
        uri: the image in base64; empty where it is not at hand.
        enlarged: whether pixels are to be seen as squares.
        lacks: why it is not at hand.
    """

    key: str
    width: float
    height: float
    uri: str
    enlarged: bool
    lacks: str = ""


@dataclass(frozen=True)
class Case:
    """One expression.

    Attributes:
        image: that it is about.
        reference: answer of the reference run.
        subject: answer of the run that the page is about.
        between: IoU of both boxes; None on pages about one run.
        pruned: SVG path of what the subject did not see of the image; empty where that is not known.
    """

    image: ShownImage
    reference: Answer
    subject: Answer
    between: float | None
    pruned: str


class Album:
    """Images by name, each encoded once.

    Args:
        source: None where there are none.
    """

    def __init__(self, source: Source | None) -> None:
        self._source = source
        self._images: dict[str, ShownImage] = {}

    @property
    def images(self) -> list[ShownImage]:
        """All that were asked for."""
        return list(self._images.values())

    def original(self, name: str) -> Image.Image | None:
        """The original, if it is at hand."""
        try:
            return self._source.open(name) if self._source is not None and self._source.has(name) else None
        except GapExportError:  # shown as missing, by name
            return None

    def shown(self, answer: Answer) -> ShownImage:
        """The one that an answer is about."""
        if answer.image not in self._images:
            key = f"image{len(self._images)}"
            image = self.original(answer.image)
            if image is None:
                width, height = (
                    max(1.0, *(box[edge] for box in (answer.truth, answer.box) if box)) for edge in (2, 3)
                )
                self._images[answer.image] = ShownImage(key, width, height, "", False, "image not at hand")
            else:
                tiny = max(image.size) <= TINY
                self._images[answer.image] = ShownImage(key, *image.size, data_uri(image, tiny=tiny), tiny)
        return self._images[answer.image]


def data_uri(image: Image.Image, *, tiny: bool = False) -> str:
    """An image inside the page: PNG where every pixel counts, JPEG otherwise."""
    content = io.BytesIO()
    if tiny:
        image.save(content, "PNG", optimize=True)
    else:
        small = image.convert("RGB")
        small.thumbnail((LONG_SIDE, LONG_SIDE))
        small.save(content, "JPEG", quality=82)
    kind = "png" if tiny else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def worst_cases(
    reported: ReportedRuns, album: Album, worst: Sequence[Disagreement], count: int
) -> list[Case]:
    """Where both runs differ most; on pages about one run, where it is farthest from the truth."""
    if len(reported.runs) > 1:
        return [_case(reported, album, each.id) for each in worst[:count]]
    answers = sorted(reported.subject.answers.values(), key=lambda answer: answer.iou)
    return [_case(reported, album, answer.id) for answer in answers[:count]]


def random_cases(reported: ReportedRuns, album: Album, count: int) -> list[Case]:
    """Drawn by a fixed seed, so that they cannot have been chosen by hand."""
    ids = reported.reference.run.ids
    drawn = np.random.default_rng(_SEED).permutation(len(ids))[:count]
    return [_case(reported, album, ids[place]) for place in sorted(drawn)]


def _case(reported: ReportedRuns, album: Album, identity: str) -> Case:
    reference, subject = reported.reference.answers[identity], reported.subject.answers[identity]
    image = album.shown(subject)
    between = None if len(reported.runs) == 1 else float(box_overlaps([reference.box], [subject.box])[0])
    bundle = reported.subject.bundle
    pruned = ""
    if bundle is not None and subject.kept_indices and not image.lacks:
        pruned = pruned_path(subject.kept_indices, int(image.width), int(image.height), bundle.manifest)
    return Case(image, reference, subject, between, pruned)


def token_grid(width: int, height: int, manifest: Manifest) -> tuple[int, int] | None:
    """(rows, columns) of an image's visual tokens; None where they do not lie on one grid."""
    return manifest.layout.token_grid((width, height)) or manifest.spec.grid


def pruned_path(kept_indices: Sequence[int], width: int, height: int, manifest: Manifest) -> str:
    """What a model did not see of an image, as an SVG path to be filled by the even-odd rule.

    The path is the whole image and, as holes in it, runs of kept patches in each row.

    Args:
        kept_indices: raster indices.
        width: of the image, pixels.
        height: of the image, pixels.
        manifest: of the bundle.

    Returns:
        Empty where tokens do not lie on one grid, or all were kept.

    Raises:
        InputError: an index lies beyond the grid.
    """
    grid = token_grid(width, height, manifest)
    if grid is None:
        return ""
    rows, columns = grid
    if max(kept_indices) >= rows * columns:
        raise InputError(
            f"keep visual token {max(kept_indices)}, and an image of {width}x{height} pixels has {rows * columns}",
            subject="kept_indices",
            hint="run the evaluation again, with the images that were answered",
        )
    kept_RC = np.zeros(rows * columns, np.bool_)
    kept_RC[np.array(kept_indices, np.int64)] = True
    if kept_RC.all():
        return ""
    columns_x, rows_y = patch_edges(width, height, grid, manifest.layout)
    path = [f"M0 0H{width}V{height}H0Z"]
    for row, kept_C in enumerate(kept_RC.reshape(rows, columns)):
        steps = np.diff(np.r_[0, kept_C.astype(np.int8), 0])
        for start, end in zip(np.flatnonzero(steps > 0), np.flatnonzero(steps < 0), strict=True):
            # Parts of a padded square that lie beyond the image are no holes in it.
            left, right = (float(np.clip(columns_x[edge], 0, width)) for edge in (start, end))
            top, bottom = (float(np.clip(rows_y[edge], 0, height)) for edge in (row, row + 1))
            path.append(f"M{left:g} {top:g}H{right:g}V{bottom:g}H{left:g}Z")
    return "".join(path)
