"""What a client is told of a failure: OpenAI's error object, a status, and one line in words of this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from gap_export.errors import GapExportError, InputError, RecipeError, first_line, in_one_line
from gap_export.serving.remote_images import ImageRefused
from gap_export.serving.service import NotAsStated
from gap_export.serving.work import Refused

_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_image",
    429: "too_many_connections",
    431: "header_too_large",
    503: "unavailable",
    504: "deadline",
}
_REASONS = {"full": "queue_full", "broken": "server_fault"}
"""Why a request was refused -> its code, where that has another name."""
_DOUBTFUL_SECONDS = 60.0
"""After which a server is asked again whose answer was not what the manifest says: by then another stands in its place."""
LONGEST_MESSAGE = 400
"""Characters."""


class HttpError(Exception):
    """A failure as a client is told of it.

    Args:
        status: of the answer.
        message: one sentence in words of this package.
        param: the field that it is about.
        code: in one word; the status's own where left out.
        retry_after: seconds after which it is worth to ask again.
        headers: further ones of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, in_one_line(message, LONGEST_MESSAGE), param
        self.code = code or _CODES.get(status, "invalid_request")
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after)))

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": self.error}

    @property
    def error(self) -> dict[str, Any]:
        """What is inside of it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def response(self) -> Response:
        """The answer."""
        return json_response(self.body, self.status, self.headers)


def json_response(
    body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer in JSON.

    Args:
        body: of it; numbers are finite.
        status: of it.
        headers: further ones.
    """
    return Response(
        json.dumps(body, allow_nan=False, separators=(",", ":")).encode(),
        status,
        headers=dict(headers or {}),
        media_type="application/json",
    )


def server_fault() -> HttpError:
    """What is said of a failure that is the server's own; what it was stands in the server's log, by its kind alone."""
    return HttpError(
        503,
        "the server failed to answer this request; others are not affected",
        code="server_fault",
        retry_after=1.0,
    )


def http_error(error: GapExportError, param: str | None = None) -> HttpError:
    """What a client is told of an error of this package.

    Args:
        error: of it.
        param: the field that it is about, where that is known.
    """
    if isinstance(error, Refused):
        if error.reason == "deadline":
            return HttpError(504, _sentence(error), code="deadline")
        code = _REASONS.get(error.reason, error.reason)
        return HttpError(503, _sentence(error), code=code, retry_after=error.retry_after or 1.0)
    if isinstance(error, NotAsStated):
        return HttpError(
            503,
            "the answer was not computed as the manifest says, and is not given: ask another server",
            code="not_computed_as_stated",
            retry_after=_DOUBTFUL_SECONDS,
        )
    if isinstance(error, ImageRefused):
        return HttpError(error.status, _sentence(error), param=error.subject)
    if isinstance(error, InputError | RecipeError):
        return HttpError(400, _sentence(error), param=param)
    return server_fault()


def _sentence(error: GapExportError) -> str:
    """Subject, message and hint; of a message that repeats what a library said, what stands before that."""
    cause, message = error.__cause__, error.message
    if cause is not None and not isinstance(cause, GapExportError):
        for said in (first_line(cause), in_one_line(first_line(cause))):
            message = message.partition(said)[0].rstrip(": ")
    return f"{error.subject}: {message or 'cannot be used'} ({error.hint})"
