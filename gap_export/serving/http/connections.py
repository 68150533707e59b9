"""Connections as uvicorn has them, bounded: how many, how long their header lines may take, and how long a client may read nothing."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from gap_export.serving.http.errors import HttpError
from gap_export.serving.http.settings import HttpSettings

_FAR_BEYOND = 2
"""Connections beyond so many times the limit are closed without a word."""


def bounded_protocol(settings: HttpSettings) -> type[H11Protocol]:
    """The protocol of a server, for uvicorn's `http`.

    Args:
        settings: the bounds.

    Returns:
        A class whose connections are counted together.
    """
    opened: Counter[str] = Counter()

    class BoundedProtocol(H11Protocol):
        """One connection."""

        _address = ""
        _header_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Count it."""
            super().connection_made(transport)
            self._address = self.client[0] if self.client else ""
            opened[self._address] += 1
            most, here = settings.connections_per_address, opened[self._address]
            if len(self.connections) > settings.connections:
                self.app = _refusal(503, "the server has as many connections as it takes: ask again later")
            elif most and here > most:
                self.app = _refusal(429, f"this address has more than {most} connections: close some")
            if len(self.connections) > _FAR_BEYOND * settings.connections or (
                most and here > _FAR_BEYOND * most
            ):
                transport.close()
                return
            self._watch_header()

        def connection_lost(self, exc: Exception | None) -> None:
            """Count it no more."""
            opened[self._address] -= 1
            if not opened[self._address]:
                del opened[self._address]
            self._stop_header_timer()
            self._stop_write_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Read, and see whether header lines are being sent."""
            super().data_received(data)
            self._watch_header()

        def on_response_complete(self) -> None:
            """The next request may have begun already."""
            super().on_response_complete()
            self._watch_header()

        def pause_writing(self) -> None:
            """The client reads nothing: it may do so for a while."""
            super().pause_writing()
            self._write_timer = self.loop.call_later(settings.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            """It reads again."""
            super().resume_writing()
            self._stop_write_timer()

        def send_400_response(self, msg: str) -> None:
            """Refuse what is no HTTP."""
            error = HttpError(400, "this is no valid HTTP request, or its header is too large")
            body = json.dumps(error.body).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            if self.conn.our_state is h11.IDLE or self.conn.our_state is h11.SEND_RESPONSE:
                for event in (
                    h11.Response(status_code=400, headers=headers),
                    h11.Data(data=body),
                    h11.EndOfMessage(),
                ):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _watch_header(self) -> None:
            """Have the connection closed where header lines do not come in time: the first ones from its beginning, others from their first byte."""
            # Where nothing was sent yet after an answer, the connection is idle: that lasts as long as it is kept alive.
            is_next = self.cycle is not None and self.cycle.response_complete and self.conn.trailing_data[0]
            waits = self.cycle is None or bool(is_next)
            if not waits or self.transport.is_closing():
                self._stop_header_timer()
            elif self._header_timer is None:
                self._header_timer = self.loop.call_later(settings.header_seconds, self.transport.close)

        def _stop_header_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _stop_write_timer(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

    return BoundedProtocol


def _refusal(status: int, message: str) -> ASGIApp:
    error = HttpError(status, message, retry_after=1.0, headers={"Connection": "close"})

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await error.response()(scope, receive, send)

    return refuse
