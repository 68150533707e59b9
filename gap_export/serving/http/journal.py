"""Outermost middleware: the number of a request, a line of it in the log, and an answer where something broke.

A line has method, path, status, seconds and number alone: neither texts nor images of a request, nor what an exception said of them.
"""

from __future__ import annotations

import logging
import re
import time
import traceback
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gap_export.serving.http.auth import METRICS
from gap_export.serving.http.errors import server_fault
from gap_export.serving.http.health import LIVE_ALIASES, READY_ALIASES
from gap_export.serving.http.numbers import new_number
from gap_export.terminal import one_line

LOG = logging.getLogger("gap_export.serving")
HEADER = "X-Request-Id"
LEFT = 499
"""Written in the log where a client left before it was answered."""
_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_LONGEST_PATH = 200
_QUIET = frozenset({METRICS, "/v1/health/live", "/v1/health/ready", *LIVE_ALIASES, *READY_ALIASES})
"""Looked at every few seconds: in the log where they fail."""


class Journal:
    """Numbers requests and writes them down.

    Args:
        app: behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, number = time.perf_counter(), request_id(scope)
        scope.setdefault("state", {})["request_id"] = number
        status = LEFT

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[HEADER] = number
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except ClientDisconnect:
            status = LEFT
        except Exception as error:  # whatever broke, the client gets an answer, and the others theirs
            LOG.error("request %s failed: %s", number, where(error))
            if status == LEFT:
                await server_fault().response()(scope, receive, sent)
        finally:
            if status >= 400 or scope["path"] not in _QUIET:
                path = one_line(scope["path"][:_LONGEST_PATH])
                seconds = time.perf_counter() - began
                LOG.info("%s %s %d %.4f %s", scope["method"], path, status, seconds, number)


def request_id(scope: MutableMapping[str, Any]) -> str:
    """The number that a client gave its request, or a new one where it gave none that can be repeated."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _ID.fullmatch(given[0]):
        return str(given[0].decode("ascii"))
    return new_number()


def where(error: BaseException) -> str:
    """What an exception is and where it was raised; what it says is left out, for it may repeat a request."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
