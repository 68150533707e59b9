"""Middleware that bounds what a request may send, before anything reads it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gap_export.files import readable_size
from gap_export.serving.http.errors import HttpError
from gap_export.serving.http.settings import HttpSettings

_SHARES = 4
"""One address may hold such a part of what bodies may take together, so that others are answered whatever it sends."""
_LINGER_SECONDS = 2.0
"""How long a refused client may send on, so that it reads the refusal and not that the connection was reset."""
_LINGER_BODIES = 2
"""How much it may send meanwhile, in bodies of the largest size."""


class Limits:
    """Bounds header lines, bodies, and how long they take.

    Args:
        app: behind it.
        settings: the bounds.
    """

    def __init__(self, app: ASGIApp, settings: HttpSettings) -> None:
        self._app, self._settings = app, settings
        self._held: Counter[str] = Counter()  # bytes of bodies of all open requests, by address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, bounded, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        address = scope["client"][0] if scope.get("client") else ""
        body = _Body(self, self._settings, receive, address, comes=_has_body(scope))
        answer = _Answer(body, send, self._settings.body_bytes)
        try:
            self._check_headers(scope)
            await self._app(scope, body.receive, answer.send)
        except HttpError as error:
            await error.response()(scope, receive, answer.send)
        finally:
            self._held[address] -= body.held
            if not self._held[address]:
                del self._held[address]

    def _check_headers(self, scope: Scope) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._settings.header_bytes:
            raise HttpError(431, f"the header has more than {readable_size(self._settings.header_bytes)}")
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if len(lengths) > 1 or not all(length.isdigit() for length in lengths):
            raise HttpError(400, "Content-Length must be one number")
        if lengths and (len(lengths[0]) > 15 or int(lengths[0]) > self._settings.body_bytes):
            raise _too_long(self._settings)

    def hold(self, count: int, address: str) -> None:
        """Count bytes of bodies.

        Args:
            count: of them.
            address: that they come from.

        Raises:
            HttpError: all together are too many, or those of the address.
        """
        settings = self._settings
        # One body may come, however small the share; behind a proxy all have its address.
        share = max(settings.body_bytes, settings.bodies_bytes // _SHARES)
        if settings.connections_per_address and self._held[address] + count > share:
            raise _too_much(429, "this address sends too much at once: ask again later")
        if self._held.total() + count > settings.bodies_bytes:
            raise _too_much(503, "too much is being sent at once: ask again later")
        self._held[address] += count


class _Body:
    """A request's body, counted while it comes."""

    def __init__(
        self, limits: Limits, settings: HttpSettings, receive: Receive, address: str, *, comes: bool
    ) -> None:
        self._limits, self._settings, self._receive, self._address = limits, settings, receive, address
        self._ends = time.monotonic() + settings.body_seconds
        self.held = 0
        self.complete = not comes

    async def receive(self) -> Message:
        """The next piece.

        Raises:
            HttpError: it is too long, or takes too long.
        """
        if self.complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._ends - time.monotonic()))
        except TimeoutError:
            raise HttpError(
                408,
                f"the body has not come within {self._settings.body_seconds:g} s",
                headers={"Connection": "close"},
            ) from None
        if message["type"] != "http.request":
            self.complete = True
            return message
        size = len(message.get("body", b""))
        if self.held + size > self._settings.body_bytes:
            raise _too_long(self._settings)
        self._limits.hold(size, self._address)
        self.held += size
        self.complete = not message.get("more_body", False)
        return message

    async def discard(self, most: int) -> None:
        """Read what a refused client still sends, within bounds, and forget it."""
        ends = time.monotonic() + _LINGER_SECONDS
        while not self.complete and most > 0:
            try:
                message = await asyncio.wait_for(self._receive(), max(0.0, ends - time.monotonic()))
            except TimeoutError:
                return
            most -= len(message.get("body", b""))
            self.complete = message["type"] != "http.request" or not message.get("more_body", False)


class _Answer:
    """An answer. One that comes before the body has is the connection's last."""

    def __init__(self, body: _Body, send: Send, body_bytes: int) -> None:
        self._body, self._send, self._most = body, send, _LINGER_BODIES * body_bytes

    async def send(self, message: Message) -> None:
        """Send a part of it."""
        if message["type"] == "http.response.start" and not self._body.complete:
            names = {name.lower() for name, _ in message["headers"]}
            if b"connection" not in names:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if is_last and not self._body.complete:
            await self._send({**message, "more_body": True})
            await self._body.discard(self._most)
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)


def _has_body(scope: Scope) -> bool:
    """Whether a request says that a body follows."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
        for name, value in scope["headers"]
    )


def _too_much(status: int, message: str) -> HttpError:
    return HttpError(status, message, code="too_many_bytes", retry_after=1.0)


def _too_long(settings: HttpSettings) -> HttpError:
    return HttpError(413, f"the body has more than {readable_size(settings.body_bytes)}")
