"""`POST /v1/ground`: what expressions refer to in an image, as boxes in the frame of that image."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from gap_export.errors import GapExportError
from gap_export.positions import PositionPolicy
from gap_export.runtime.conversation.chat import AskOptions
from gap_export.serving.http.asking import Asking
from gap_export.serving.http.errors import HttpError, http_error, json_response
from gap_export.serving.http.fields import Body, Image, ImageUrl, KeepField, TextField, TokensField, checked
from gap_export.serving.http.json_body import json_body
from gap_export.serving.http.numbers import new_number
from gap_export.serving.http.replies import (
    FRAME,
    Opener,
    boxes_of,
    check_choices,
    evidence_of,
    image_of,
    keep_of,
    no_box_because,
    timings_of,
    usage_of,
)
from gap_export.serving.http.settings import HttpSettings
from gap_export.serving.images import MOST_IMAGES, RequestImages
from gap_export.serving.numbering import offered, placed_by
from gap_export.serving.service import Service
from gap_export.serving.work import Expression, Outcome, Result, Work

MOST_EXPRESSIONS = 16


class GroundRequest(Body):
    """What `/v1/ground` takes: one image, or as many as the bundle's prompt has; one expression, or several.

    Attributes:
        image: a data URL, or an object with it.
        images: in place of `image`, where the bundle's prompt has several.
        expression: what to find.
        expressions: in place of `expression`: each is answered by itself.
        keep: fraction of the visual tokens to keep, in bundles built with a range.
        max_new_tokens: longest answer.
        receipt: whether answers say what they were computed from.
        evidence: whether answers have the indices of the visual tokens that were kept.
        positions: how survivors are numbered; another way than the bundle's where the server allows baselines.
        model: its name, where that is to be checked.
    """

    image: Image | None = None
    images: Annotated[list[Image], Field(min_length=1, max_length=MOST_IMAGES, fail_fast=True)] | None = None
    expression: TextField | None = None
    expressions: (
        Annotated[list[TextField], Field(min_length=1, max_length=MOST_EXPRESSIONS, fail_fast=True)] | None
    ) = None
    keep: KeepField | None = None
    max_new_tokens: TokensField | None = None
    receipt: bool | None = None
    evidence: bool | None = None
    positions: Literal["gap", "shifted", "permuted"] | None = None
    model: str | None = None

    @property
    def asked(self) -> list[str]:
        """All expressions.

        Raises:
            HttpError: none, or given twice.
        """
        if (self.expression is None) == (self.expressions is None):
            raise HttpError(400, "expression: give either expression or expressions", param="expression")
        return [self.expression] if self.expression is not None else list(self.expressions or ())

    @property
    def shown(self) -> list[tuple[ImageUrl, str]]:
        """All images, each with its field.

        Raises:
            HttpError: none, or given twice.
        """
        if (self.image is None) == (self.images is None):
            raise HttpError(400, "image: give either image or images", param="image")
        if self.image is not None:
            return [(self.image, "image")]
        return [(image, f"images[{number}]") for number, image in enumerate(self.images or ())]


class Grounding:
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
        asked = await json_body(request, partial(checked, GroundRequest))
        expressions, receipt = asked.asked, bool(asked.receipt)
        check_choices(
            self._service,
            model=asked.model,
            keep=asked.keep,
            receipt=receipt,
            characters=sum(map(len, expressions)),
            most=self._settings.characters,
        )
        shown, positions = asked.shown, self._positions(asked)
        images = Opener(self._images, shown, digest=receipt)
        work = Work(
            tuple(map(Expression, expressions)),
            images,
            len(shown),
            fetch=images.fetch,
            keep=asked.keep,
            options=AskOptions.of(max_new_tokens=asked.max_new_tokens),
            deadline=self._settings.deadline,
            trace=receipt,
            perturb=placed_by(self._service.bundle.manifest, positions),
        )
        async with Asking(self._service.engine, [work], request.receive) as asking:
            ((*outcomes,),) = await asking.outcomes()
        check_answered(outcomes)
        results = [outcome for outcome in outcomes if isinstance(outcome, Result)]
        return json_response(
            {
                "id": f"ground-{new_number()}",
                "model": self._service.name,
                "frame": FRAME,
                "image": image_of(results),
                "results": [
                    await self._answer(asked, work, number, outcome)
                    for number, outcome in enumerate(outcomes)
                ],
                "usage": usage_of(results),
            }
        )

    def _positions(self, asked: GroundRequest) -> PositionPolicy | None:
        """The policy that a request chooses.

        Raises:
            HttpError: it is not offered, or a receipt is asked for besides, which says what is the bundle's own.
        """
        if asked.positions is None:
            return None
        manifest = self._service.bundle.manifest
        chosen = PositionPolicy(asked.positions)
        choices = offered(manifest, allow_baselines=self._settings.allow_baselines)
        if chosen not in choices:
            names = " or ".join(choices)
            raise HttpError(
                400,
                f"positions: must be {names} here; baselines are offered where the server allows them",
                param="positions",
            )
        if asked.receipt and chosen is not manifest.pruning.positions:
            raise HttpError(
                400, "receipt: is given for the position ids of the bundle alone", param="receipt"
            )
        return chosen

    async def _answer(
        self, asked: GroundRequest, work: Work, number: int, outcome: Outcome
    ) -> dict[str, Any]:
        question = work.questions[number]
        assert isinstance(question, Expression)
        if isinstance(outcome, GapExportError):
            return {"expression": question.text, "error": http_error(outcome, "expressions").error}
        return {
            "expression": question.text,
            "boxes": boxes_of(outcome, question.text),
            "raw": outcome.text,
            "reason": no_box_because(self._service, outcome),
            "finish_reason": outcome.finish_reason,
            "positions": asked.positions or str(self._service.bundle.manifest.pruning.positions),
            "keep": keep_of(outcome, asked.keep),
            "timings": timings_of(outcome),
            "usage": usage_of([outcome]),
            **await evidence_of(
                self._service,
                work,
                number,
                outcome,
                evidence=bool(asked.evidence),
                receipt=bool(asked.receipt),
            ),
        }


def check_answered(outcomes: list[Outcome]) -> None:
    """Refuse a request that the server failed to answer in any part, so that it is asked again as a whole; and one of which nothing was answered for one reason, as its image or its only expression.

    Args:
        outcomes: of all questions.

    Raises:
        GapExportError: the reason.
    """
    for outcome in outcomes:
        if isinstance(outcome, GapExportError) and http_error(outcome).status >= 500:
            raise outcome
    first = outcomes[0]
    if isinstance(first, GapExportError) and all(outcome is first for outcome in outcomes):
        raise first
