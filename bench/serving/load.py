"""Clients that ask without pause, compare every answer with the one that they know, and now and then hang up."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.asked import Request, Said, equal, said_in, weights
from serving.wire import Broken, Connection, Reply, get, metric_values

ANSWER_SECONDS = 120.0
"""After which a request counts as lost: twice the deadline after which a server refuses it."""
_TOLD = 5
"""Faults that are told in words."""
_RECENT = 100
"""Answers that tell how long one takes."""
_REFUSALS = frozenset({503})
Expect = Callable[[Request, float | None], Sequence[Said]]
"""(request, fraction that its answer reports; None where the endpoint does not tell) -> its answer as it is when it is the only one."""


Answered = tuple[int, float | None]


@dataclass
class Tally:
    """What became of requests.

    Attributes:
        answered: (number of a request in the list, fraction of the visual tokens that its answer reports; None where it does not tell) -> how often it was answered
            within the time of the load.
        late: answered after that time.
        wrong: not what is known, in words.
        lost: neither an answer nor a refusal, in words.
        refused: 503 with a time after which to ask again.
        expired: 504.
        hung_up: clients that left.
        broken: connections that ended early, where clients ask again.
        seconds: of answers.
        keeps: fractions of the visual tokens that were reported.
    """

    answered: Counter[Answered] = field(default_factory=Counter)
    late: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    refused: int = 0
    expired: int = 0
    hung_up: int = 0
    broken: int = 0
    seconds: list[float] = field(default_factory=list)
    keeps: Counter[float] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Answers, early and late."""
        return self.answered.total() + self.late

    def facts(self) -> dict[str, Any]:
        """As it is recorded."""
        return {
            "answered": self.answered.total(),
            "late": self.late,
            "wrong": len(self.wrong),
            "lost": len(self.lost),
            "refused": self.refused,
            "expired": self.expired,
            "hung_up": self.hung_up,
            "broken": self.broken,
            "seconds_p50": round(statistics.median(self.seconds), 4) if self.seconds else None,
            "keeps": {f"{keep:g}": count for keep, count in sorted(self.keeps.items())},
            "told": (self.wrong + self.lost)[:_TOLD],
        }


@dataclass(frozen=True)
class Manners:
    """How clients behave.

    Attributes:
        hang_up: share of requests whose client leaves at a random moment.
        again: whether a request whose connection broke is asked again, as a client does that survives a restart; it counts as lost otherwise.
        until_draining: whether clients end at the first refusal of a server that stops.
        fresh: whether every request has a connection of its own.
        stay: whether refused clients ask again until they have their answer, beyond the time of the load.
    """

    hang_up: float = 0.0
    again: bool = False
    until_draining: bool = False
    fresh: bool = False
    stay: bool = False


class Load:
    """Clients of one server.

    Args:
        port: on 127.0.0.1.
        requests: that are drawn from.
        expect: gives answers that are known.
        manners: of all clients.
        seed: of what is drawn.

    Attributes:
        tally: of all requests so far.
        draining: set when a client was told that the server stops.
    """

    def __init__(
        self,
        port: int,
        requests: Sequence[Request],
        expect: Expect,
        manners: Manners = Manners(),
        seed: int = 0,
    ) -> None:
        self._port, self._requests, self._expect, self._manners, self._seed = (
            port, requests, expect, manners, seed,
        )  # fmt: skip
        self._weights = weights(requests)
        self.tally = Tally()
        self.draining = asyncio.Event()
        self._ends = 0.0

    async def run(self, clients: int, seconds: float, most: int | None = None) -> float:
        """Ask, all clients at once, until the time is over and the last answer there.

        Args:
            clients: how many.
            seconds: after which none asks anew.
            most: requests of one client, where time does not end it before.

        Returns:
            Seconds until the time was over, or the last client had made its requests.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._ends = began + seconds
        await asyncio.gather(*(self._client(number, most) for number in range(clients)))
        return min(seconds, loop.time() - began)

    def stop(self) -> None:
        """Have no client ask anew."""
        self._ends = 0.0

    @property
    def _over(self) -> bool:
        return asyncio.get_running_loop().time() >= self._ends

    async def _client(self, number: int, most: int | None) -> None:
        draw = random.Random(f"{self._seed} {number}")
        connection = Connection(self._port, fresh=self._manners.fresh)
        made = 0
        while not self._over and (most is None or made < most):
            made += 1
            (place,) = draw.choices(range(len(self._requests)), self._weights)
            leaves = draw.random() < self._manners.hang_up
            if not await self._one(connection, place, self._patience(draw) if leaves else None):
                break
        connection.leave()

    def _patience(self, draw: random.Random) -> float:
        """Seconds after which a client leaves: any moment of an answer of twice the typical time."""
        recent = self.tally.seconds[-_RECENT:]
        typical = statistics.median(recent) if recent else 0.1
        return draw.uniform(0.0, 2.0 * typical)

    async def _one(self, connection: Connection, place: int, leaves_after: float | None) -> bool:
        """Ask until there is an answer, or no more to be done.

        Returns:
            Whether this client shall ask anything further.
        """
        request, tally, loop = self._requests[place], self.tally, asyncio.get_running_loop()
        while True:
            began, stopped = loop.time(), self.draining.is_set()
            try:
                async with asyncio.timeout(ANSWER_SECONDS if leaves_after is None else leaves_after):
                    reply = await connection.ask(request.sent)
            except TimeoutError:
                if leaves_after is None:
                    tally.lost.append(f"{request.name}: nothing within {ANSWER_SECONDS:g} s")
                else:
                    tally.hung_up += 1
                return True
            except Broken as error:
                tally.broken += 1
                if self._manners.until_draining and (stopped or (self.draining.is_set() and not error.sent)):
                    return False  # nothing was admitted any more when it was sent, or there was no server
                if not self._manners.again:
                    tally.lost.append(f"{request.name}: {error}")
                    return True
                await asyncio.sleep(0.1)
                continue
            if reply.status in _REFUSALS:
                if not self._take_refusal(request, reply):
                    return True
                if self._manners.until_draining and self.draining.is_set():
                    return False
                await asyncio.sleep(reply.retry_after or 0.0)
                if self._over and not self._manners.stay:
                    return True  # it has its refusal
                continue
            self._take(place, reply, loop.time() - began)
            return True

    def _take_refusal(self, request: Request, reply: Reply) -> bool:
        """Count a refusal; whether it is one."""
        if reply.retry_after is None or "error" not in reply.json:
            self.tally.wrong.append(f"{request.name}: a refusal without Retry-After")
            return False
        self.tally.refused += 1
        if reply.json["error"]["code"] == "draining":
            self.draining.set()
        return True

    def _take(self, place: int, reply: Reply, seconds: float) -> None:
        request, tally = self._requests[place], self.tally
        if reply.status == 504:
            tally.expired += 1
            return
        if reply.status != 200:
            tally.wrong.append(f"{request.name}: {reply.status} {reply.body[:200].decode(errors='replace')}")
            return
        try:
            said, used = said_in(request, reply)
        except (ValueError, KeyError, TypeError) as error:
            tally.wrong.append(f"{request.name}: cannot be read: {type(error).__name__}: {error}")
            return
        if not equal(said, self._expect(request, used)):
            tally.wrong.append(f"{request.name}, with keep {used}: {said}")
        if used is not None:
            tally.keeps[used] += 1
        tally.seconds.append(seconds)
        if self._over:
            tally.late += 1
        else:
            tally.answered[place, used] += 1


async def idle_counts(port: int, seconds: float = 5.0) -> dict[str, float]:
    """Requests that wait and rows in use, once the clients have gone: what is left after that time has leaked.

    Args:
        port: of the server.
        seconds: that it may take.
    """
    loop = asyncio.get_running_loop()
    ends = loop.time() + seconds
    while True:
        values = await metrics_of(port)
        found = {
            "running": values["gap_num_requests_running"],
            "waiting": values["gap_num_requests_waiting"],
        }
        if not any(found.values()) or loop.time() > ends:
            return found
        await asyncio.sleep(0.05)


async def metrics_of(port: int) -> dict[str, float]:
    """All metrics of a server.

    Args:
        port: of it.
    """
    return metric_values((await get(port, "/metrics")).body.decode())
