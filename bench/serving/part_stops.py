"""A server that is told to stop under load, and one that is killed: what was admitted is answered, and clients that ask again lose nothing."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from typing import Any

from serving.asked import Request, mixture
from serving.known import Known, learn
from serving.load import Load, Manners
from serving.process import ServerProcess, free_port
from serving.setup import Outcome, Setup, Target
from serving.wire import Broken, get

CLIENTS, SECONDS = 40, 4.0
GRACE = 1.0
"""Seconds that the server is answering on after it said that it is not ready."""
END_SECONDS = 60.0
KILLS, KILL_CLIENTS, BETWEEN_KILLS = 3, 20, 12.0
"""Seconds: a server takes some to become ready again."""


def sigterm(setup: Setup) -> Outcome:
    """SIGTERM under load."""
    requests = mixture(4)
    known = learn(setup.bundle, requests)
    rounds = []
    for number in range(setup.rounds):
        with setup.server("--drain-grace", str(GRACE)) as server:
            server.wait_ready()
            rounds.append(
                asyncio.run(
                    terminated(
                        server, requests, known, setup.clients or CLIENTS, setup.seconds or SECONDS, number
                    )
                )
            )
        setup.console.print(f"sigterm: {rounds[-1]}")
    return Outcome(
        {"clients": setup.clients or CLIENTS, "grace_seconds": GRACE, "rounds": rounds},
        (
            Target("wrong", sum(each["wrong"] for each in rounds), 0),
            Target("admitted and not answered", sum(each["lost"] for each in rounds), 0),
            Target("exit code", max(each["exit_code"] for each in rounds), 0),
            Target(
                "stops in which a request was refused before readiness was",
                sum(not each["ready_first"] for each in rounds),
                0,
            ),
        ),
    )


async def terminated(
    server: ServerProcess,
    requests: Sequence[Request],
    known: Known,
    clients: int,
    seconds: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Stop a server in the middle of a load.

    Args:
        server: ready.
        requests: that are drawn from.
        known: their answers.
        clients: how many.
        seconds: of load before it is told to stop.
        seed: of what is drawn.

    Returns:
        What became of requests, and when what was said, in seconds after the signal.
    """
    load = Load(server.port, requests, known, Manners(until_draining=True, fresh=True), seed)
    running = asyncio.create_task(load.run(clients, seconds + END_SECONDS))
    await asyncio.sleep(seconds)
    before = load.tally.total
    told = time.monotonic()
    watching = asyncio.create_task(_not_ready(server.port))
    times: list[float] = []
    refused = asyncio.create_task(load.draining.wait())
    refused.add_done_callback(lambda _: times.append(time.monotonic()))
    server.signal(signal.SIGTERM)
    not_ready = await watching
    await running
    code = await asyncio.to_thread(server.wait, END_SECONDS)
    ended = time.monotonic()
    refused.cancel()
    first_refusal = times[0] if load.draining.is_set() and times else None
    return {
        **load.tally.facts(),
        "answered_after_the_signal": load.tally.total - before,
        "exit_code": -1 if code is None else abs(code),
        "not_ready_after": None if not_ready is None else round(not_ready - told, 3),
        "refused_after": None if first_refusal is None else round(first_refusal - told, 3),
        "ended_after": round(ended - told, 3),
        "ready_first": not_ready is not None and (first_refusal is None or not_ready <= first_refusal),
    }


async def _not_ready(port: int) -> float | None:
    """When a server first says that it is not ready; None where it never does."""
    while True:
        try:
            reply = await get(port, "/v1/health/ready")
        except Broken:
            return None
        if reply.status == 503:
            return time.monotonic()
        await asyncio.sleep(0.005)


def kill9(setup: Setup) -> Outcome:
    """SIGKILL under load, and the same server again on the same port."""
    requests = mixture(4)
    known = learn(setup.bundle, requests)
    found = asyncio.run(
        killed(setup, requests, known, setup.clients or KILL_CLIENTS, setup.seconds or BETWEEN_KILLS, KILLS)
    )
    return Outcome(
        {"clients": setup.clients or KILL_CLIENTS, **found},
        (
            Target("wrong", found["wrong"], 0),
            Target("lost", found["lost"], 0),
            Target("kills that a client noticed", found["noticed"], KILLS, least=True),
            Target("restarts after which there were answers", found["recovered"], KILLS, least=True),
        ),
    )


async def killed(
    setup: Setup, requests: Sequence[Request], known: Known, clients: int, between: float, kills: int
) -> dict[str, Any]:
    """Kill a server again and again in the middle of a load, each time to be started anew.

    Args:
        setup: starts servers.
        requests: that are drawn from.
        known: their answers.
        clients: how many; each asks until it has its answer.
        between: seconds of load between being ready and being killed.
        kills: how often.
    """
    port = free_port()
    server = setup.server(port=port)
    try:
        await asyncio.to_thread(server.wait_ready)
        load = Load(port, requests, known, Manners(again=True, stay=True))
        running = asyncio.create_task(load.run(clients, 3600.0))
        noticed = recovered = 0
        for _ in range(kills):
            await asyncio.sleep(between)
            broken = load.tally.broken
            server.signal(signal.SIGKILL)
            await asyncio.to_thread(server.wait, END_SECONDS)
            server = setup.server(port=port)
            await asyncio.to_thread(server.wait_ready)
            before = load.tally.total
            await asyncio.sleep(between)
            noticed += load.tally.broken > broken
            recovered += load.tally.total > before
        load.stop()
        await running
    finally:
        server.end()
    return {**load.tally.facts(), "kills": kills, "noticed": noticed, "recovered": recovered}
