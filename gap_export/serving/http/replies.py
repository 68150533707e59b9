"""What answers have in common: boxes with their frame, visual tokens kept, seconds, and usage; and the work that requests ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from gap_export.boxes.codecs import CODECS, Box
from gap_export.runtime.keep import check_keep
from gap_export.serving.http.errors import HttpError
from gap_export.serving.http.fields import ImageUrl
from gap_export.serving.images import Content, RequestImages
from gap_export.serving.receipts import ImageDigest, image_digest
from gap_export.serving.remote_images import RemoteImage, SecondsLeft
from gap_export.serving.service import Service, no_receipts
from gap_export.serving.work import Result, Work

FRAME = "image as displayed"
"""What boxes are in: the image as it was sent, turned upright as its EXIF data say."""


def check_choices(
    service: Service, *, model: str | None, keep: float | None, receipt: bool, characters: int, most: int
) -> None:
    """Refuse, before a request is admitted, what can be told to be wrong without its images.

    Args:
        service: that answers.
        model: that is asked for.
        keep: fraction of visual tokens.
        receipt: whether one is asked for.
        characters: of all texts.
        most: characters that they may have.

    Raises:
        HttpError: another model, or too much text.
        GapExportError: a fraction that the bundle was not built for, or receipts that are not given.
    """
    if not service.check_model(model):
        raise HttpError(
            404,
            f"there is no model of this name: it is {service.name}",
            param="model",
            code="model_not_found",
        )
    check_keep(service.bundle.manifest.pruning, service.bundle.manifest.spec, keep)
    if receipt and not service.gives_receipts:
        raise no_receipts()
    if characters > most:
        raise HttpError(400, f"the texts have {characters} characters, and may have {most}")


class Opener:
    """Fetches and decodes the images of a request, once it was admitted.

    Args:
        images: their bounds.
        given: each with the field that it stands in.
        digest: whether they are digested, for receipts.

    Attributes:
        digests: of the images as they were decoded; empty before, and where they are not digested.

    Raises:
        HttpError: too many.
        ImageRefused: one that is none, by its address alone.
    """

    def __init__(
        self, images: RequestImages, given: Sequence[tuple[ImageUrl, str]], *, digest: bool = False
    ) -> None:
        if len(given) > images.bounds.images:
            raise HttpError(
                400, f"{len(given)} images are given, and a request may have {images.bounds.images}"
            )
        self._images, self._digest = images, digest
        self._subjects = [subject for _, subject in given]
        self._contents: Sequence[Content | RemoteImage] = [
            images.content(image.url, subject) for image, subject in given
        ]
        self.digests: tuple[ImageDigest, ...] = ()

    def __call__(self) -> list[Image.Image]:
        """The images, RGB, upright.

        Raises:
            ImageRefused: one cannot be used.
        """
        contents, self._contents = self._contents, ()  # what was sent is not held while it is answered
        here = [content for content in contents if not isinstance(content, RemoteImage)]
        opened = self._images.open(here, self._subjects)
        if self._digest:
            self.digests = tuple(map(image_digest, opened))
        return opened

    @property
    def fetch(self) -> Callable[[SecondsLeft], None] | None:
        """Fetches those that lie on other servers, see `Work.fetch`; None where none does."""
        remote = any(isinstance(content, RemoteImage) for content in self._contents)
        return self._fetch if remote else None

    def _fetch(self, left: SecondsLeft) -> None:
        self._contents = [
            _content_of(content.fetch(left)) if isinstance(content, RemoteImage) else content
            for content in self._contents
        ]


def _content_of(file: bytes) -> Content:
    return lambda: file


def boxes_of(result: Result, label: str | None = None) -> list[dict[str, Any]]:
    """Every box of an answer.

    Args:
        result: the answer.
        label: what the boxes are of; left out where that is not known.

    Returns:
        Of each the edges as fractions of the image, 0..1 from its top left corner, and in pixels; a box that is handed on by itself says what it is in.
    """
    named = {} if label is None else {"label": label}
    return [
        {**named, **fractions(box, result), "pixels": list(map(float, box)), "frame": FRAME}
        for box in result.boxes
    ]


def fractions(box: Box, result: Result) -> dict[str, float]:
    """Edges of a box as fractions of the image."""
    width, height = result.image_size or (1, 1)
    left, top, right, bottom = (
        min(1.0, max(0.0, float(edge) / side)) for edge, side in zip(box, (width, height) * 2, strict=True)
    )
    return {"x_min": left, "y_min": top, "x_max": right, "y_max": bottom}


def no_box_because(service: Service, result: Result) -> str | None:
    """Why an answer has no box; None where it has one."""
    if result.boxes:
        return None
    if result.finish_reason == "length":
        return f"the answer was cut off after {len(result.ids)} tokens, and no box of it can be read"
    example = CODECS[service.bundle.manifest.box.codec].example
    return f"the answer has no box on the image of the form {example}"


def keep_of(result: Result, requested: float | None) -> dict[str, Any]:
    """Visual tokens: the fraction asked for, the one used, how many entered the decoder, and of how many."""
    return {
        "requested": requested,
        "used": result.keep,
        "tokens": result.kept,
        "of": result.visual_tokens,
    }


def timings_of(result: Result) -> dict[str, float]:
    """Seconds of an answer, phase by phase."""
    spent = result.spent
    return {
        "queue": spent.queue,
        "decode_image": spent.decode_image,
        "vision": spent.vision,
        "prefill": spent.prefill,
        "decode": spent.decode,
        "per_token": spent.decode / max(1, len(result.ids) - 1),
        "total": spent.total,
    }


def usage_of(results: Sequence[Result]) -> dict[str, Any]:
    """Tokens of answers, all together; those of the prompt are text and the visual tokens that were kept."""
    text = sum(result.prompt_tokens for result in results)
    kept = sum(result.kept for result in results)
    made = sum(len(result.ids) for result in results)
    return {
        "prompt_tokens": text + kept,
        "completion_tokens": made,
        "total_tokens": text + kept + made,
        "prompt_tokens_details": {
            "text_tokens": text,
            "visual_tokens": kept,
            "visual_tokens_before_pruning": sum(result.visual_tokens for result in results),
        },
    }


def image_of(results: Sequence[Result]) -> dict[str, int] | None:
    """Size of the image that boxes are on, pixels as displayed; None without one."""
    size = next((result.image_size for result in results if result.image_size is not None), None)
    return None if size is None else {"width": size[0], "height": size[1]}


def patches_of(service: Service, result: Result) -> dict[str, Any] | None:
    """Where the visual tokens lie on the image that boxes are on: index = row * columns + column.

    Args:
        service: that answered.
        result: the answer.

    Returns:
        Rows, columns and the area that they cover, [left, top, width, height] in pixels of the image: beyond it where the model saw padding, less of it
        where a part was cut off. None where the tokens lie on no grid.
    """
    manifest, size = service.bundle.manifest, result.image_size
    grid = None if size is None else manifest.layout.token_grid(size) or manifest.spec.grid
    if grid is None or size is None:
        return None
    return {"rows": grid[0], "columns": grid[1], "area": list(manifest.layout.seen_area(size))}


async def evidence_of(
    service: Service,
    work: Work,
    number: int,
    result: Result,
    *,
    evidence: bool,
    receipt: bool,
) -> dict[str, Any]:
    """What a request may ask for besides the answer: indices of kept tokens, and a receipt.

    Args:
        service: that answered.
        work: of the request, whose images an `Opener` opened.
        number: of the question.
        result: the answer.
        evidence: whether indices are asked for.
        receipt: whether a receipt is.
    """
    found: dict[str, Any] = {}
    if evidence:
        found["kept_indices"] = result.kept_indices.tolist()
        found["patches"] = patches_of(service, result)
    if receipt:
        assert isinstance(work.open_images, Opener)
        digests = work.open_images.digests
        found["receipt"] = await asyncio.to_thread(service.receipt, work, number, digests, result)
    return found
