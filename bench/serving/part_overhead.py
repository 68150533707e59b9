"""What HTTP costs one client: its requests over HTTP, beside the same handed to an engine in a process of its own on the same core."""

from __future__ import annotations

import asyncio
import statistics
import time
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from serving.asked import Request, mixture
from serving.process import cores, pinned
from serving.setup import IMAGES, ROWS, Outcome, Setup, Target, child_on
from serving.wire import Connection

MOST_MS = 2.0
REQUESTS, WARM_UP, BLOCK = 200, 20, 10


class _Alone:
    """An engine in a process of its own; kept between calls."""

    def __init__(self, bundle: Path) -> None:
        from gap_export.runtime.model import load
        from gap_export.serving.engine import Engine
        from gap_export.serving.images import ImageBounds, RequestImages
        from gap_export.serving.limits import EngineLimits

        self._engine = Engine(load(bundle, threads=1), EngineLimits(rows=ROWS))
        self._images = RequestImages(ImageBounds())

    def seconds(self, requests: list[Request]) -> list[float]:
        """Of every request, from its data URL to its answer."""
        from gap_export.serving.work import Expression, Work

        taken = []
        for request in requests:
            began = time.perf_counter()
            content = self._images.content(request.shown.url, "image")
            work = Work(
                tuple(map(Expression, request.texts)),
                lambda content=content: self._images.open([content], ["image"]),  # type: ignore[misc]
                1,
                keep=request.keep,
            )
            self._engine.submit(work).result()
            taken.append(time.perf_counter() - began)
        return taken


_KEPT: list[_Alone] = []
"""In the child: the engine, once it was loaded."""


def _alone(bundle: Path, requests: list[Request]) -> list[float]:
    if not _KEPT:
        _KEPT.append(_Alone(bundle))
    return _KEPT[0].seconds(requests)


def overhead(setup: Setup) -> Outcome:
    """See the module."""
    requests = [
        request for request in mixture(IMAGES, ("ground",), (None,)) for _ in range(REQUESTS // IMAGES)
    ]
    both = cores()
    rounds: list[dict[str, Any]] = []
    with child_on(None if both is None else both[0]) as child, setup.server() as server:
        server.wait_ready()
        child.submit(_alone, setup.bundle, requests[:WARM_UP]).result()
        with pinned(None if both is None else both[1]):
            asyncio.run(_over_http(server.port, requests[:WARM_UP]))
            for _ in range(setup.rounds):
                rounds.append(_round(child, setup.bundle, server.port, requests))
    added = statistics.median(each["http_p50_ms"] - each["engine_p50_ms"] for each in rounds)
    return Outcome(
        {"requests": len(requests), "pinned": both is not None, "rounds": rounds},
        (Target("HTTP beyond the engine, p50, ms", round(added, 3) if both is not None else None, MOST_MS),),
    )


def _round(child: Executor, bundle: Path, port: int, requests: list[Request]) -> dict[str, float]:
    """Both ways, a few requests in turn, so that what else the machine does is the same for both."""
    own: list[float] = []
    wall: list[float] = []
    beyond: list[float] = []
    for first in range(0, len(requests), BLOCK):
        block = requests[first : first + BLOCK]
        own += child.submit(_alone, bundle, block).result()
        seconds, by_server = asyncio.run(_over_http(port, block))
        wall += seconds
        beyond += [each - timed for each, timed in zip(seconds, by_server, strict=True)]
    return {
        "engine_p50_ms": round(1e3 * statistics.median(own), 3),
        "http_p50_ms": round(1e3 * statistics.median(wall), 3),
        "beyond_own_timings_p50_ms": round(1e3 * statistics.median(beyond), 3),
    }


async def _over_http(port: int, requests: list[Request]) -> tuple[list[float], list[float]]:
    """Seconds of every request as its client sees it, and as the server's own timings have it."""
    connection = Connection(port)
    wall, own = [], []
    for request in requests:
        began = time.perf_counter()
        reply = await connection.ask(request.sent)
        wall.append(time.perf_counter() - began)
        own.append(reply.json["results"][0]["timings"]["total"])
    connection.leave()
    return wall, own
