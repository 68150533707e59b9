"""A small HTTP/1.1 client on asyncio: hundreds of connections cost a fraction of a core, and it says what became of every request.

Libraries retry, pool and buffer; what is counted here is each request as it was sent and each answer as it came.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST_HEADER = 2**16
"""Bytes."""


class Broken(Exception):
    """The connection ended before the answer did.

    Args:
        message: how.
        sent: whether the request was sent, so that it may have been admitted.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        status: of it.
        headers: by their names in small letters.
        body: whole, chunks joined.
    """

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def retry_after(self) -> float | None:
        """Seconds after which to ask again; None where the answer does not say so."""
        value = self.headers.get("retry-after")
        return None if value is None else float(value)


def request_bytes(method: str, path: str, body: Any = None) -> bytes:
    """A request, ready to be sent as often as needed.

    Args:
        method: of it.
        path: of it.
        body: sent as JSON; none where None.
    """
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    content = b""
    if body is not None:
        content = json.dumps(body).encode()
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


class Connection:
    """A connection that is kept between requests, and made when it is first needed.

    Args:
        port: on 127.0.0.1.
        fresh: whether every request has a connection of its own. A server may close one that is kept at the very moment in which a request is sent on it,
            and then neither side knows whether the request arrived.
    """

    def __init__(self, port: int, *, fresh: bool = False) -> None:
        self._port, self._fresh = port, fresh
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes, on_event: Callable[[bytes], None] | None = None) -> Reply:
        """Send a request, and wait for the whole answer.

        Args:
            request: of `request_bytes`.
            on_event: told of every chunk of an answer that comes in chunks.

        Raises:
            Broken: there is no server, or the connection ended too early.
        """
        sent = False
        if self._reader is not None and self._reader.at_eof():
            self.leave()  # the server has closed it, as none was asked for so long
        try:
            if self._writer is None:
                self._reader, self._writer = await asyncio.open_connection(
                    "127.0.0.1", self._port, limit=MOST_HEADER
                )
            self._writer.write(request)
            sent = True
            reply = await self._read(on_event)
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            self.leave()
            raise Broken(f"{type(error).__name__}: {error}", sent=sent) from error
        except BaseException:
            self.leave()
            raise
        if self._fresh or reply.headers.get("connection", "").lower() == "close":
            self.leave()
        return reply

    def leave(self) -> None:
        """Close the connection at once, whatever was asked on it."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    async def _read(self, on_event: Callable[[bytes], None] | None) -> Reply:
        assert self._reader is not None
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {}
        for line in head[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("transfer-encoding") == "chunked":
            body = await self._chunks(on_event)
        else:
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        return Reply(int(head[0].split(" ", 2)[1]), headers, body)

    async def _chunks(self, on_event: Callable[[bytes], None] | None) -> bytes:
        assert self._reader is not None
        pieces: list[bytes] = []
        while size := int((await self._reader.readline()).strip() or b"-1", 16):
            if size < 0:
                raise EOFError("the answer ends within its chunks")
            pieces.append((await self._reader.readexactly(size + 2))[:-2])
            if on_event is not None:
                on_event(pieces[-1])
        await self._reader.readline()
        return b"".join(pieces)


async def get(port: int, path: str) -> Reply:
    """Ask once, on a connection of its own.

    Args:
        port: on 127.0.0.1.
        path: of it.

    Raises:
        Broken: there is no answer.
    """
    return await Connection(port, fresh=True).ask(request_bytes("GET", path))


def metric_values(text: str) -> dict[str, float]:
    """What Prometheus reads: name with its labels, as they are written -> value.

    Args:
        text: in Prometheus' text format.
    """
    values = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name] = float(value)
    return values
