"""Many clients, mixed requests, one in ten hanging up: what is wrong, lost or leaked, and how much of what the core could answer was answered."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from serving.asked import KINDS, Request, mixture
from serving.bound import Costs, measure
from serving.known import learn
from serving.load import Load, Manners, Tally, idle_counts, metrics_of
from serving.process import cores, pinned
from serving.setup import ROWS, Outcome, Setup, Target, child_on

CLIENTS, SECONDS, HANG_UP = 200, 60.0, 0.1
LEAST_SHARE = 0.85
"""Of the bound."""
OWN_CORE = 0.9
"""Processor time as a share of the time, of the bound's process and of the server's: with less, others ran on that core, and nothing is compared."""


def load(setup: Setup) -> Outcome:
    """See the module."""
    requests = requests_of(setup)
    setup.console.print(f"load: {len(requests)} requests, one at a time, to know their answers")
    known = learn(setup.bundle, requests, setup.chosen)
    both = cores()
    rounds: list[dict[str, Any]] = []
    for number in range(setup.rounds):
        costs = None
        if both is not None:
            with child_on(both[0]) as child:
                costs = child.submit(measure, setup.bundle, requests, ROWS, setup.chosen).result()
        with setup.server() as server:
            server.wait_ready()
            clients = Load(server.port, requests, known, Manners(hang_up=HANG_UP), seed=number)
            with pinned(None if both is None else both[1]):
                before, began = server.cpu_seconds(), time.perf_counter()
                seconds = asyncio.run(clients.run(setup.clients or CLIENTS, setup.seconds or SECONDS))
                busy = (server.cpu_seconds() - before) / (time.perf_counter() - began)
                left = asyncio.run(idle_counts(server.port))
                counted = asyncio.run(metrics_of(server.port))
        rounds.append(_round(clients.tally, seconds, busy, left, counted, costs))
        setup.console.print(_words(rounds[-1]))
    shares = [each["share_of_bound"] for each in rounds if each["share_of_bound"] is not None]
    return Outcome(
        {
            "clients": setup.clients or CLIENTS,
            "hang_up": HANG_UP,
            "rows": ROWS,
            "requests": len(requests),
            "server_options": list(setup.server_options),
            "pinned": both is not None,
            "rounds": rounds,
        },
        (
            Target("wrong", sum(each["wrong"] for each in rounds), 0),
            Target("lost", sum(each["lost"] for each in rounds), 0),
            Target("rows leaked", sum(each["left"]["running"] for each in rounds), 0),
            Target("waiting, leaked", sum(each["left"]["waiting"] for each in rounds), 0),
            Target(
                "answered, as a share of the bound",
                statistics.median(shares) if shares else None,
                LEAST_SHARE,
                least=True,
            ),
        ),
    )


def requests_of(setup: Setup) -> list[Request]:
    """The mixture; where the server chooses fractions, without the endpoint that does not tell which."""
    return mixture(setup.images, tuple(kind for kind in KINDS if not (setup.chosen and kind == "infer")))


def _round(
    tally: Tally,
    seconds: float,
    busy: float,
    left: dict[str, float],
    counted: dict[str, float],
    costs: Costs | None,
) -> dict[str, Any]:
    per_second = tally.answered.total() / seconds
    own = None if costs is None else min(costs.core_share, busy)
    bound = costs.bound(tally.answered) if costs is not None and tally.answered else None
    share = None if bound is None or own is None or own < OWN_CORE else per_second / bound
    return {
        **tally.facts(),
        "seconds": round(seconds, 2),
        "left": left,
        "rows_of_a_step": round(
            counted["gap_decode_rows_sum"] / max(1.0, counted["gap_decode_rows_count"]), 2
        ),
        "images_decoded": int(counted["gap_images_decoded_total"]),
        "answered_per_second": round(per_second, 2),
        "bound_per_second": None if bound is None else round(bound, 2),
        "core_shares": None
        if costs is None
        else {"bound": round(costs.core_share, 3), "server": round(busy, 3)},
        "share_of_bound": None if share is None else round(share, 4),
        "bound": None if costs is None else bound_facts(costs, tally),
    }


def bound_facts(costs: Costs, tally: Tally) -> dict[str, float]:
    """What the bound is made of, in milliseconds, of the mean request."""
    total = max(1, tally.answered.total())
    mean_read = sum(costs.read[each] * count for each, count in tally.answered.items()) / total
    mean_steps = sum(costs.steps[each] * count for each, count in tally.answered.items()) / total
    return {
        "vision_and_prefill_ms": round(1e3 * mean_read, 3),
        "steps": round(mean_steps, 2),
        "step_of_all_rows_ms": round(1e3 * costs.step, 3),
        "step_of_one_row_ms": round(1e3 * costs.step_alone, 3),
        "one_expression_by_engine_ms": round(1e3 * costs.read_by_engine, 3),
        "one_expression_by_ground_ms": round(1e3 * costs.read_by_ground, 3),
    }


def _words(row: dict[str, Any]) -> str:
    share = row["share_of_bound"]
    return (
        f"load: {row['answered_per_second']:.1f} answered per second"
        + (
            f", {share:.3f} of the bound of {row['bound_per_second']:.1f}"
            if share is not None
            else ", not compared"
        )
        + f"; wrong {row['wrong']}, lost {row['lost']}, refused {row['refused']}, hung up {row['hung_up']}"
    )
