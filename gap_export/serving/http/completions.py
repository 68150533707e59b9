"""`POST /v1/chat/completions`: free questions in OpenAI's shape, as a whole or as a stream of events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gap_export.errors import GapExportError
from gap_export.inputs.chat.conversation import check_conversation
from gap_export.serving.http.asking import Asking
from gap_export.serving.http.errors import HttpError, http_error, json_response
from gap_export.serving.http.fields import checked
from gap_export.serving.http.json_body import json_body
from gap_export.serving.http.numbers import new_number
from gap_export.serving.http.openai_fields import NOT_IMPLEMENTED, ChatRequest, GapOptions, conversation_of
from gap_export.serving.http.replies import (
    FRAME,
    Opener,
    boxes_of,
    check_choices,
    evidence_of,
    image_of,
    keep_of,
    timings_of,
    usage_of,
)
from gap_export.serving.http.settings import HttpSettings
from gap_export.serving.images import RequestImages
from gap_export.serving.service import Service
from gap_export.serving.work import Conversation, Outcome, Result, Work


class Completions:
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
        asked = await json_body(request, partial(checked, ChatRequest, not_implemented=NOT_IMPLEMENTED))
        if asked.stream_options is not None and not asked.stream:
            raise HttpError(400, "stream_options: belongs to stream: true", param="stream_options")
        gap = asked.gap or GapOptions()
        work = self._work(asked, gap)
        one = _One(self._service, work, gap, f"chatcmpl-{new_number()}", int(time.time()))
        asking = Asking(self._service.engine, [work], request.receive, listen=bool(asked.stream))
        try:
            if asked.stream:
                first = await asking.piece()  # a request that fails at once has a status that says so
                if first is None:
                    _answer_of(await asking.outcomes())
                usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
                return _Events(asking, first, one, include_usage=usage)
            result = _answer_of(await asking.outcomes())
        except BaseException:
            await asking.close()
            raise
        await asking.close()
        return json_response(await one.whole(result))

    def _work(self, asked: ChatRequest, gap: GapOptions) -> Work:
        turns, given = conversation_of(asked)
        check_conversation(turns)
        check_choices(
            self._service,
            model=asked.model,
            keep=gap.keep,
            receipt=bool(gap.receipt),
            characters=sum(len(turn.text) for turn in turns),
            most=self._settings.characters,
        )
        images = Opener(self._images, given, digest=bool(gap.receipt))
        return Work(
            (Conversation(turns),),
            images,
            len(given),
            fetch=images.fetch,
            keep=gap.keep,
            options=asked.options,
            deadline=self._settings.deadline,
            trace=bool(gap.receipt),
        )


def _answer_of(outcomes: list[list[Outcome]]) -> Result:
    """The one answer.

    Raises:
        GapExportError: there is none.
    """
    ((outcome,),) = outcomes
    if isinstance(outcome, GapExportError):
        raise outcome
    return outcome


@dataclass(frozen=True)
class _One:
    """One answer, as OpenAI has it."""

    service: Service
    work: Work
    gap: GapOptions
    number: str
    created: int

    async def whole(self, result: Result) -> dict[str, Any]:
        """All of it at once."""
        message = {"role": "assistant", "content": result.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": result.finish_reason}
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": usage_of([result]),
            "gap": await self.ours(result),
        }

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of it."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage(self, result: Result) -> dict[str, Any]:
        """The piece behind the last: usage alone."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage_of([result])}

    async def ours(self, result: Result) -> dict[str, Any]:
        """What only this server has."""
        return {
            "frame": FRAME,
            "image": image_of([result]),
            "boxes": boxes_of(result),
            "keep": keep_of(result, self.gap.keep),
            "timings": timings_of(result),
            **await evidence_of(
                self.service,
                self.work,
                0,
                result,
                evidence=bool(self.gap.evidence),
                receipt=bool(self.gap.receipt),
            ),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.number, "object": kind, "created": self.created, "model": self.service.name}


class _Events(Response):
    """An answer as server-sent events, a piece of text each; the row is given up when the client leaves.

    Args:
        asking: whose first piece was taken.
        first: that piece; None where the answer is complete, and empty.
        one: the answer.
        include_usage: whether usage follows the last piece.
    """

    def __init__(self, asking: Asking, first: str | None, one: _One, *, include_usage: bool) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._asking, self._first, self._one, self._include_usage = asking, first, one, include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for event in self._events():
                body = f"data: {event}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._asking.close()

    async def _events(self) -> AsyncIterator[str]:
        try:
            async for event in self._chunks():
                yield json.dumps(event, allow_nan=False, separators=(",", ":"))
        except ClientDisconnect:
            raise
        except GapExportError as error:
            yield json.dumps(http_error(error).body)
        yield "[DONE]"

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        # With usage asked for, every piece has the field, and the last one alone a value.
        usage: dict[str, Any] = {"usage": None} if self._include_usage else {}
        yield {**self._one.chunk({"role": "assistant", "content": ""}), **usage}
        piece = self._first
        while piece is not None:
            yield {**self._one.chunk({"content": piece}), **usage}
            piece = await self._asking.piece()
        result = _answer_of(await self._asking.outcomes())
        yield {
            **self._one.chunk({}, result.finish_reason),
            **usage,
            "gap": await self._one.ours(result),
        }
        if self._include_usage:
            yield self._one.usage(result)
