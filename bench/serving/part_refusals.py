"""A full queue of large images: how soon others are refused, and that nothing of theirs is decoded.

Fifty images of 8 megapixels wait or are decoded all the time, sent by clients that send the next when one is answered. One thread decodes images, so that with
two cores one has time to refuse. Meanwhile a client asks again and again, with a small image and with a large one in turn, and its refusals are timed from
the first byte sent to the last one read. Images that the server decoded are counted by its metrics: as many as it admitted, no more.
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
from serving.setup import Outcome, Setup, Target, percentile
from serving.wire import Broken, Connection, get, metric_values

IN_FLIGHT, MORE = 50, 12
SECONDS, PAUSE = 20.0, 0.05
MOST_MS = 20.0
_SIZE = (3464, 2309)
"""8.0 megapixels."""
_DECODED = "gap_images_decoded_total"


@dataclass
class _Probes:
    """What was told to the client that is refused."""

    milliseconds: dict[str, list[float]] = field(default_factory=lambda: {"small": [], "large": []})
    statuses: Counter[int] = field(default_factory=Counter)
    waiting: list[float] = field(default_factory=list)


def refusals(setup: Setup) -> Outcome:
    """See the module."""
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (289, 433, 3), dtype=np.uint8))
    large = shown(rough.resize(_SIZE, Image.Resampling.BICUBIC), "JPEG", quality=90)
    small = shown(rough.resize((96, 96)))
    rounds = []
    for _ in range(setup.rounds):
        with setup.server("--queue", str(IN_FLIGHT), "--image-threads", "1", core=None) as server:
            server.wait_ready()
            rounds.append(asyncio.run(_round(server.port, large, small, setup.seconds or SECONDS)))
        setup.console.print(f"refusals: {rounds[-1]}")
    worst = [max(each["p99_ms"].values()) for each in rounds if each["p99_ms"]]
    return Outcome(
        {
            "megapixels": round(_SIZE[0] * _SIZE[1] / 1e6, 2),
            "bytes_as_sent": len(large.url),
            "in_flight": IN_FLIGHT,
            "rounds": rounds,
        },
        (
            Target("refusal, p99, ms", percentile(worst, 0.5) if worst else float("inf"), MOST_MS),
            Target(
                "images of refused requests that were decoded",
                sum(each["decoded_refused"] for each in rounds),
                0,
            ),
            Target("refusals", min(each["refused"] for each in rounds), 50, least=True),
        ),
    )


async def _round(port: int, large: Shown, small: Shown, seconds: float) -> dict[str, Any]:
    before = await _decoded(port)
    probes, admitted = _Probes(), Counter[int]()
    ends = asyncio.get_running_loop().time() + seconds
    body = Request("ground", 0, large, ("the red circle",)).sent
    holders = [asyncio.create_task(_hold(port, body, ends, admitted)) for _ in range(IN_FLIGHT + MORE)]
    await _full(port)
    asked = {"small": Request("ground", 0, small, ("the red circle",)).sent, "large": body}
    connections = {name: Connection(port) for name in asked}
    while asyncio.get_running_loop().time() < ends:
        for name, request in asked.items():
            began = time.perf_counter()
            reply = await connections[name].ask(request)
            taken = time.perf_counter() - began
            probes.statuses[reply.status] += 1
            if reply.status == 503:
                probes.milliseconds[name].append(1e3 * taken)
            await asyncio.sleep(PAUSE)
        probes.waiting.append(
            metric_values((await get(port, "/metrics")).body.decode())["gap_num_requests_waiting"]
        )
    await asyncio.gather(*holders)
    decoded = await _decoded(port) - before
    answered = admitted[200] + probes.statuses[200]
    return {
        "p50_ms": _percentiles(probes, 0.5),
        "p99_ms": _percentiles(probes, 0.99),
        "refused": probes.statuses[503],
        "refused_with_large_images": admitted[503],
        "answered": answered,
        "statuses": {str(status): count for status, count in sorted((admitted + probes.statuses).items())},
        "waiting_median": percentile(probes.waiting, 0.5),
        "decoded": decoded,
        "decoded_refused": max(0, decoded - answered),
    }


def _percentiles(probes: _Probes, share: float) -> dict[str, float]:
    return {name: round(percentile(each, share), 2) for name, each in probes.milliseconds.items() if each}


async def _hold(port: int, request: bytes, ends: float, statuses: Counter[int]) -> None:
    """Have a large image in flight all the time."""
    loop, connection = asyncio.get_running_loop(), Connection(port)
    while loop.time() < ends:
        try:
            reply = await connection.ask(request)
        except Broken:
            statuses[0] += 1
            continue
        statuses[reply.status] += 1
        if reply.status == 503:
            await asyncio.sleep(reply.retry_after or 1.0)
    connection.leave()


async def _full(port: int) -> None:
    """Wait until the queue is full."""
    while metric_values((await get(port, "/metrics")).body.decode())["gap_num_requests_waiting"] < IN_FLIGHT:
        await asyncio.sleep(0.02)


async def _decoded(port: int) -> int:
    return int(metric_values((await get(port, "/metrics")).body.decode())[_DECODED])
