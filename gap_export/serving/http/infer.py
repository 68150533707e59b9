"""`POST /v1/infer`: the shape in which object detectors of NVIDIA NIM are asked, with free texts for labels."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from gap_export.errors import GapExportError
from gap_export.runtime.conversation.chat import AskOptions
from gap_export.serving.http.asking import Asking
from gap_export.serving.http.errors import HttpError, http_error, json_response
from gap_export.serving.http.fields import (
    LONGEST_URL,
    Body,
    ImageUrl,
    KeepField,
    TextField,
    TokensField,
    checked,
)
from gap_export.serving.http.ground import MOST_EXPRESSIONS, check_answered
from gap_export.serving.http.json_body import json_body
from gap_export.serving.http.replies import Opener, check_choices, fractions, usage_of
from gap_export.serving.http.settings import HttpSettings
from gap_export.serving.images import MOST_IMAGES, RequestImages
from gap_export.serving.service import Service
from gap_export.serving.work import Expression, Outcome, Result, Work

CONFIDENCE = 1.0
"""Detectors give one; an answer in words has none, and the shape requires the field."""


class InferImage(Body):
    """An image of `/v1/infer`."""

    type: Literal["image_url"]
    url: Annotated[str, Field(max_length=LONGEST_URL)]


class InferRequest(Body):
    """What `/v1/infer` takes.

    Attributes:
        input: images; each is answered by itself.
        labels: what to find in each.
        keep: fraction of the visual tokens to keep.
        max_new_tokens: longest answer.
        model: its name, where that is to be checked.
    """

    input: Annotated[list[InferImage], Field(min_length=1, max_length=MOST_IMAGES, fail_fast=True)]
    labels: Annotated[list[TextField], Field(min_length=1, max_length=MOST_EXPRESSIONS, fail_fast=True)]
    keep: KeepField | None = None
    max_new_tokens: TokensField | None = None
    model: str | None = None


class Inference:
    """The endpoint.

    Args:
        service: that answers.
        settings: of the server.
        images: bounds of images.
    """

    def __init__(self, service: Service, settings: HttpSettings, images: RequestImages) -> None:
        self._service, self._settings, self._images = service, settings, images

    async def __call__(self, request: Request) -> Response:
        """Answer a request.

        Args:
            request: as it came.

        Raises:
            HttpError: it cannot be answered.
            GapExportError: for another reason.
        """
        self._service.check_open()
        asked = await json_body(request, partial(checked, InferRequest))
        # Each image is computed by itself, and takes a place in the queue.
        most = min(self._images.bounds.images, self._service.engine.most_waiting)
        if len(asked.input) > most:
            raise HttpError(
                400,
                f"input: {len(asked.input)} images are given, and a request may have {most}",
                param="input",
            )
        if len(set(asked.labels)) < len(asked.labels):
            raise HttpError(400, "labels: one stands twice", param="labels")
        check_choices(
            self._service,
            model=asked.model,
            keep=asked.keep,
            receipt=False,
            characters=sum(map(len, asked.labels)),
            most=self._settings.characters,
        )
        images = [
            Opener(self._images, [(ImageUrl(url=image.url), f"input[{number}].url")])
            for number, image in enumerate(asked.input)
        ]
        works = [
            Work(
                tuple(map(Expression, asked.labels)),
                image,
                1,
                fetch=image.fetch,
                keep=asked.keep,
                options=AskOptions.of(max_new_tokens=asked.max_new_tokens),
                deadline=self._settings.deadline,
            )
            for image in images
        ]
        async with Asking(self._service.engine, works, request.receive) as asking:
            answered = await asking.outcomes()
        for outcomes in answered:
            check_answered(outcomes)
        results = [result for outcomes in answered for result in outcomes if isinstance(result, Result)]
        sizes = sum(
            len(image.url) - image.url.find(",") - 1 for image in asked.input if image.url[:5] == "data:"
        )
        return json_response(
            {
                "data": [_detected(index, asked.labels, outcomes) for index, outcomes in enumerate(answered)],
                "usage": {"images_size_mb": sizes * 3 / 4 / 2**20, **usage_of(results)},
            }
        )


def _detected(index: int, labels: list[str], outcomes: list[Outcome]) -> dict[str, Any]:
    """Boxes of an image, label by label."""
    faults = {
        label: http_error(outcome, "labels").error
        for label, outcome in zip(labels, outcomes, strict=True)
        if isinstance(outcome, GapExportError)
    }
    boxes = {
        label: [{**fractions(box, result), "confidence": CONFIDENCE} for box in result.boxes]
        for label, result in zip(labels, outcomes, strict=True)
        if isinstance(result, Result)
    }
    return {"index": index, "bounding_boxes": boxes, **({"errors": faults} if faults else {})}
