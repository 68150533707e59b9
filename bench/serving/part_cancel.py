"""Clients that leave in the middle of an answer: how many steps of decoding are still computed for them.

A server whose steps take long enough to be told apart: each waits 100 ms first. Steps are counted by its metrics. They are read until one has just ended, so that
the next has begun; then the client leaves, and that step is the last that may be computed.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from PIL import Image

from gap_export.boxes.scenes import DEV_SEED, make_scene
from serving.asked import Kind, Request, shown
from serving.load import metrics_of
from serving.process import ALTERED
from serving.setup import Outcome, Setup, Target
from serving.wire import Broken, Connection

TRIALS = 10
"""Of each kind in a round."""
MOST_STEPS = 1
_STEPS, _RUNNING = "gap_decode_rows_count", "gap_num_requests_running"


def cancel(setup: Setup) -> Outcome:
    """See the module."""
    image = shown(Image.fromarray(make_scene(DEV_SEED, 0).pixels))
    rounds: list[dict[str, Any]] = []
    with setup.server(program=("-P", str(ALTERED), "slow")) as server:
        server.wait_ready()
        for _ in range(setup.rounds):
            steps: dict[Kind, list[int]] = {"ground": [], "stream": []}
            seconds: list[float] = []
            for kind in steps:
                request = Request(kind, 0, image, ("where is the red circle",))
                for _ in range(TRIALS):
                    further, taken = asyncio.run(_trial(server.port, request))
                    steps[kind].append(further)
                    seconds.append(taken)
            rounds.append({"steps": steps, "row_free_p50_ms": round(1e3 * statistics.median(seconds), 2)})
            setup.console.print(f"cancel: {rounds[-1]}")
    worst = max(step for each in rounds for kind in each["steps"].values() for step in kind)
    return Outcome(
        {"rounds": rounds, "row_free_p50_ms": statistics.median(each["row_free_p50_ms"] for each in rounds)},
        (Target("steps computed after a client left", worst, MOST_STEPS),),
    )


async def _trial(port: int, request: Request) -> tuple[int, float]:
    """Ask, leave when a step has begun, and see how many more there are.

    Returns:
        (steps that ended after the client left, seconds until its row was free).
    """
    connection = Connection(port)
    asking = asyncio.create_task(connection.ask(request.sent))
    first = (await _counts(port))[_STEPS]
    while (now := await _counts(port))[_STEPS] < first + 2:
        if asking.done():
            raise SystemExit(f"an answer ended too early: {asking.result().body[:300]!r}")
    last = now[_STEPS]
    while (now := await _counts(port))[_STEPS] == last:
        continue
    connection.leave()
    left = time.perf_counter()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    while (await _counts(port))[_RUNNING]:
        continue
    taken = time.perf_counter() - left
    await asyncio.sleep(0.2)
    return int((await _counts(port))[_STEPS] - now[_STEPS]), taken


async def _counts(port: int) -> dict[str, float]:
    try:
        return await metrics_of(port)
    except Broken as error:
        raise SystemExit(f"the server is gone: {error}") from error
