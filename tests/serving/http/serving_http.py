"""A real server on 127.0.0.1 for tests: its client, its engine, and a gate that holds decoding steps."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from gap_export.serving.engine import Engine
from gap_export.serving.server import Server
from gap_export.serving.service import Service
from gap_export.serving.work import Ticket

SECONDS = 20.0


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    """An image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def noise(width: int, height: int) -> Image.Image:
    """An image of noise."""
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def wait_for(true: Callable[[], Any], what: str) -> None:
    """Wait until something is so."""
    ends = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < ends, f"{what}: not within {SECONDS:g} s"
        time.sleep(0.002)


@dataclass
class Running:
    """A server that runs.

    Attributes:
        url: of it.
        service: behind it.
        server: itself.
        http: a client.
        tickets: of all requests that were admitted.
    """

    url: str
    service: Service
    server: Server
    http: httpx.Client
    tickets: list[Ticket] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)

    def hold(self) -> Gate:
        """Hold the engine before every step; it is let go at the end of the test."""
        self.gates.append(Gate(self.engine))
        return self.gates[-1]

    @property
    def engine(self) -> Engine:
        return self.service.engine

    @property
    def address(self) -> tuple[str, int]:
        parts = httpx.URL(self.url)
        return parts.host, parts.port or 0

    def connect(self) -> socket.socket:
        made = socket.create_connection(self.address, SECONDS)
        made.settimeout(SECONDS)
        return made

    def send(self, path: str, body: bytes, *lines: str) -> socket.socket:
        """A connection over which a request was sent, and nothing was read."""
        made = self.connect()
        head = [f"POST {path} HTTP/1.1", "Host: here", "Content-Type: application/json", *lines]
        if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
            head.append(f"Content-Length: {len(body)}")
        made.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        return made


class Gate:
    """Holds an engine before every decoding step until it is let through.

    Args:
        engine: to hold.

    Attributes:
        made: steps that were made.
    """

    def __init__(self, engine: Engine) -> None:
        self._steps, self._lane = threading.Semaphore(0), engine._lane
        self._step = self._lane.step
        self._open, self.made = False, 0
        self._lane.step = self._held  # type: ignore[method-assign]

    def _held(self, *arguments: Any) -> Any:
        if not self._open:
            self._steps.acquire()
        found = self._step(*arguments)
        self.made += 1
        return found

    def let(self, steps: int = 1) -> None:
        """Let steps through."""
        self._steps.release(steps)

    def open(self) -> None:
        """Hold nothing more."""
        self._open = True
        self._steps.release(1000)
        self._lane.step = self._step  # type: ignore[method-assign]


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    pieces = []
    while piece := connection.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def status_of(answer: bytes) -> int:
    """Of an answer as it came."""
    return int(answer.split(b" ", 2)[1])
