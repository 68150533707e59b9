"""Memory of a server that is asked for half an hour, beside one that keeps something of every answer, which must be noticed."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from typing import Any

from serving.asked import Request, mixture
from serving.known import Known, learn
from serving.load import Load, Manners
from serving.process import ALTERED, ServerProcess, cores, pinned
from serving.setup import IMAGES, Outcome, Setup, Target

CLIENTS, HANG_UP = 20, 0.1
MOST_GROWTH_MB = 20.0
SAMPLE_SECONDS = 2.0
WARM_UP, LONGEST_WARM_UP = 0.25, 180.0
"""Share of the time, and seconds."""


def memory(setup: Setup) -> Outcome:
    """See the module."""
    requests = mixture(IMAGES)
    known = learn(setup.bundle, requests)
    both = cores()
    found: dict[str, dict[str, Any]] = {}
    programs = {
        "as it is": (("-m", "gap_export"), setup.minutes),
        "with a leak": (("-P", str(ALTERED), "leak"), setup.control_minutes),
    }
    for name, (program, minutes) in programs.items():
        with setup.server(program=program) as server:
            server.wait_ready()
            with pinned(None if both is None else both[1]):
                found[name] = asyncio.run(
                    watched(server, requests, known, setup.clients or CLIENTS, 60 * minutes)
                )
        setup.console.print(f"memory, {name}: {found[name]['growth_mb']:.1f} MB after {minutes:g} minutes")
    sound, leaking = found["as it is"], found["with a leak"]
    return Outcome(
        {
            "clients": setup.clients or CLIENTS,
            **{name.replace(" ", "_"): facts for name, facts in found.items()},
        },
        (
            Target("wrong", sound["wrong"] + leaking["wrong"], 0),
            Target("lost", sound["lost"] + leaking["lost"], 0),
            Target("growth, MB", sound["growth_mb"], MOST_GROWTH_MB),
            Target("growth of the control, MB", leaking["growth_mb"], MOST_GROWTH_MB, least=True),
        ),
    )


async def watched(
    server: ServerProcess,
    requests: Sequence[Request],
    known: Known,
    clients: int,
    seconds: float,
    most: int | None = None,
) -> dict[str, Any]:
    """Ask a server for a while, and weigh it meanwhile.

    Args:
        server: ready.
        requests: that are drawn from.
        known: their answers.
        clients: how many.
        seconds: in all.
        most: requests of one client, where time does not end it before.

    Returns:
        What became of requests, resident memory in MB all along, and by how much it grew after the warm-up.
    """
    load = Load(server.port, requests, known, Manners(hang_up=HANG_UP))
    running = asyncio.create_task(load.run(clients, seconds, most))
    samples: list[float] = []
    while not running.done():
        await asyncio.wait((running,), timeout=SAMPLE_SECONDS)
        samples.append(server.rss_bytes() / 2**20)
    await running
    return {
        **load.tally.facts(),
        "minutes": seconds / 60,
        "growth_mb": round(growth(samples), 2),
        "rss_mb": [round(each, 1) for each in thinned(samples, 60)],
    }


def growth(samples: Sequence[float]) -> float:
    """By how much the last tenth of the samples lies above the tenth that follows the warm-up, in medians.

    Args:
        samples: at the same distance; at least 10.
    """
    warm = min(int(WARM_UP * len(samples)), int(LONGEST_WARM_UP / SAMPLE_SECONDS))
    tenth = max(1, len(samples) // 10)
    return statistics.median(samples[-tenth:]) - statistics.median(samples[warm : warm + tenth])


def thinned(samples: Sequence[float], most: int) -> list[float]:
    """At most so many of them, the first and the last among them.

    Args:
        samples: at least one.
        most: at least 2.
    """
    if len(samples) <= most:
        return list(samples)
    return [samples[round(step * (len(samples) - 1) / (most - 1))] for step in range(most)]
