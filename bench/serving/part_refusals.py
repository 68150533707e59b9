"""A full queue of large images: how soon others are refused, and that nothing of theirs is decoded.

Fifty images of 8 megapixels wait or are decoded all the time, sent by clients that send the next when one is answered. One thread decodes images, so that with
two cores one has time to refuse. A few more such clients than there are places are refused, and ask again after the time that they are told; another one asks
with a small image all the time, and leaves where it is admitted. Refusals are timed from the first byte sent to the last one read. Images that the server
decoded are counted by its metrics: as many as it admitted, no more.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from serving.asked import Request, Shown, shown
from serving.load import metrics_of
from serving.setup import Outcome, Setup, Target, percentile
from serving.wire import Broken, Connection, Reply

IN_FLIGHT, MORE = 50, 20
SECONDS, PAUSE = 20.0, 0.05
MOST_MS = 20.0
_SIZE = (3464, 2309)
"""8.0 megapixels."""
_DECODED, _WAITING = "gap_images_decoded_total", "gap_num_requests_waiting"
ADMITTED_SECONDS = 0.5
"""Without a word for so long, a request was admitted: fifty are computed before it."""


@dataclass
class _Seen:
    """What clients were told.

    Attributes:
        milliseconds: of refusals, by what was asked with.
        statuses: of answers.
        left: requests that were admitted, and whose client left.
        waiting: requests in the queue.
    """

    milliseconds: dict[str, list[float]] = field(default_factory=lambda: {"small": [], "large": []})
    statuses: Counter[int] = field(default_factory=Counter)
    left: int = 0
    waiting: list[float] = field(default_factory=list)


def refusals(setup: Setup) -> Outcome:
    """See the module."""
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (289, 433, 3), dtype=np.uint8))
    large = shown(rough.resize(_SIZE, Image.Resampling.BICUBIC), "JPEG", quality=75)
    small = shown(rough.resize((96, 96)))
    rounds = []
    for _ in range(setup.rounds):
        with setup.server("--queue", str(IN_FLIGHT), "--image-threads", "1", core=None) as server:
            server.wait_ready()
            rounds.append(asyncio.run(_round(server.port, large, small, setup.seconds or SECONDS)))
        setup.console.print(f"refusals: {rounds[-1]}")
    p99 = [each["p99_ms"]["small"] for each in rounds if "small" in each["p99_ms"]]
    return Outcome(
        {
            "megapixels": round(_SIZE[0] * _SIZE[1] / 1e6, 2),
            "bytes_as_sent": len(large.url),
            "in_flight": IN_FLIGHT,
            "rounds": rounds,
        },
        (
            Target("refusal, p99, ms", percentile(p99, 0.5) if p99 else None, MOST_MS),
            Target(
                "images of refused requests that were decoded",
                sum(each["decoded_refused"] for each in rounds),
                0,
            ),
            Target("refusals", min(each["refusals"]["small"] for each in rounds), 100, least=True),
        ),
    )


async def _round(port: int, large: Shown, small: Shown, seconds: float) -> dict[str, Any]:
    before, seen, over = await _decoded(port), _Seen(), asyncio.Event()
    body = Request("ground", 0, large, ("the red circle",)).sent
    holders = [asyncio.create_task(_hold(port, body, over, seen)) for _ in range(IN_FLIGHT + MORE)]
    await _full(port)
    for each in seen.milliseconds.values():
        each.clear()
    request, probes = Request("ground", 0, small, ("the red circle",)).sent, []
    ends = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < ends:
        probes.append(asyncio.create_task(_probe(port, request, seen)))
        await asyncio.sleep(PAUSE)
        seen.waiting.append((await metrics_of(port))[_WAITING])
    await asyncio.gather(*probes)
    over.set()
    await asyncio.gather(*holders)
    decoded, answered = await _decoded(port) - before, seen.statuses[200]
    return {
        "p50_ms": _percentiles(seen, 0.5),
        "p99_ms": _percentiles(seen, 0.99),
        "refusals": {name: len(each) for name, each in seen.milliseconds.items()},
        "statuses": {str(status): count for status, count in sorted(seen.statuses.items())},
        "left": seen.left,
        "waiting_median": percentile(seen.waiting, 0.5),
        "decoded": decoded,
        "decoded_refused": max(0, decoded - answered - seen.left),
    }


async def _probe(port: int, request: bytes, seen: _Seen) -> None:
    """Ask once, and leave where that is admitted."""
    connection, began = Connection(port, fresh=True), time.perf_counter()
    try:
        async with asyncio.timeout(ADMITTED_SECONDS):
            _note(seen, "small", began, await connection.ask(request))
    except TimeoutError:
        seen.left += 1


def _note(seen: _Seen, kind: str, began: float, reply: Reply) -> None:
    seen.statuses[reply.status] += 1
    if reply.status == 503:
        seen.milliseconds[kind].append(1e3 * (time.perf_counter() - began))


def _percentiles(seen: _Seen, share: float) -> dict[str, float]:
    return {name: round(percentile(each, share), 2) for name, each in seen.milliseconds.items() if each}


async def _hold(port: int, request: bytes, over: asyncio.Event, seen: _Seen) -> None:
    """Have a large image in flight all the time."""
    connection = Connection(port)
    while not over.is_set():
        began = time.perf_counter()
        try:
            reply = await connection.ask(request)
        except Broken:
            seen.statuses[0] += 1
            continue
        _note(seen, "large", began, reply)
        if reply.status == 503:
            await asyncio.sleep(reply.retry_after or 1.0)
    connection.leave()


async def _full(port: int) -> None:
    """Wait until the queue is full."""
    while (await metrics_of(port))[_WAITING] < IN_FLIGHT:
        await asyncio.sleep(0.02)


async def _decoded(port: int) -> int:
    return int((await metrics_of(port))[_DECODED])
