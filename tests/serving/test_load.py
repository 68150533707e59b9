"""Many clients at once, as `bench/serve.py` measures them, in short: nothing wrong, nothing lost, no row left in use. Counted, never timed."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.folder import Bundle
from gap_export.runtime.model import load
from gap_export.serving.engine import Engine
from gap_export.serving.http.settings import HttpSettings
from gap_export.serving.limits import EngineLimits
from gap_export.serving.metrics import ServerMetrics
from gap_export.serving.server import Server, ServerOptions, listen
from gap_export.serving.service import Service

BENCH = Path(__file__).parents[2] / "bench"
SECONDS = 600.0
"""After which a load has failed to end by its number of requests."""


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients are those of the measurement."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in [name for name in sys.modules if name.partition(".")[0] == "serving"]:
        monkeypatch.delitem(sys.modules, name)


@dataclass
class Served:
    """A server in a thread of this process.

    Attributes:
        port: of it.
        engine: behind it.
        server: itself.
    """

    port: int
    engine: Engine
    server: Server


@pytest.fixture
def served(shapes_bundle: Bundle) -> Iterator[Served]:
    """Two rows, and a queue that eight clients fill."""
    metrics, up = ServerMetrics(), threading.Event()
    with ExitStack() as stack:
        model = stack.enter_context(load(shapes_bundle, threads=1))
        limits = EngineLimits(rows=2, queue=4, image_threads=1)
        engine = stack.enter_context(Engine(model, limits, observer=metrics))
        metrics.watch(engine)
        listening = listen(ServerOptions(port=0))
        server = Server(
            Service(engine, "shapes", metrics=metrics),
            HttpSettings(connections_per_address=0),
            ServerOptions(port=0),
            on_listening=lambda _: up.set(),
        )
        thread = threading.Thread(target=server.run, args=([listening],), name="server")
        thread.start()
        assert up.wait(SECONDS)
        yield Served(listening.getsockname()[1], engine, server)
        server.stop()
        thread.join(SECONDS)
        assert not thread.is_alive()


def test_all_answers_are_those_of_one_client(served: Served, shapes_bundle: Bundle) -> None:
    from serving.asked import mixture
    from serving.known import learn
    from serving.load import Load, Manners, idle_counts

    requests = mixture(1, keeps=(None, 0.1, 1.0))
    clients = Load(served.port, requests, learn(shapes_bundle.folder, requests), Manners(hang_up=0.1))
    asyncio.run(clients.run(8, SECONDS, most=6))
    left = asyncio.run(idle_counts(served.port))
    tally = clients.tally
    assert (tally.wrong, tally.lost, tally.broken, tally.expired) == ([], [], 0, 0)
    assert tally.total + tally.hung_up == 8 * 6
    assert left == {"running": 0, "waiting": 0}
    assert tally.refused  # more came than may wait
    assert served.engine.images_decoded <= tally.total + tally.hung_up


def test_an_answer_of_another_is_noticed(served: Served, shapes_bundle: Bundle) -> None:
    """Where a row was read by another request, its answer would be that one's."""
    from serving.asked import mixture
    from serving.known import learn
    from serving.load import Load

    requests = mixture(1, keeps=(0.1, 1.0))
    known = learn(shapes_bundle.folder, requests)

    def of_another(request: Any, used: float | None) -> Any:
        return known(requests[(requests.index(request) + 3) % len(requests)], None)

    clients = Load(served.port, requests, of_another)
    asyncio.run(clients.run(1, SECONDS, most=12))
    assert clients.tally.wrong


@pytest.fixture
def setup(shapes_bundle: Bundle, tmp_path: Path) -> Any:
    """Servers in processes of their own."""
    from serving.setup import Setup

    return Setup(shapes_bundle.folder, tmp_path, pin=False)


@pytest.mark.long
def test_fifty_clients(setup: Any) -> None:
    from serving.asked import mixture
    from serving.known import learn
    from serving.load import Load, Manners, idle_counts

    requests = mixture(4)
    with setup.server() as server:
        server.wait_ready()
        clients = Load(server.port, requests, learn(setup.bundle, requests), Manners(hang_up=0.1))
        asyncio.run(clients.run(50, 20.0))
        left = asyncio.run(idle_counts(server.port))
    tally = clients.tally
    assert (tally.wrong, tally.lost, tally.expired, left) == ([], [], 0, {"running": 0, "waiting": 0})
    assert tally.total > 50


@pytest.mark.long
def test_sigterm_finishes_what_was_admitted(setup: Any) -> None:
    from serving.asked import mixture
    from serving.known import learn
    from serving.part_stops import terminated

    requests = mixture(2)
    with setup.server("--drain-grace", "0.5") as server:
        server.wait_ready()
        found = asyncio.run(terminated(server, requests, learn(setup.bundle, requests), 20, 2.0))
    assert (found["wrong"], found["lost"], found["exit_code"], found["told"]) == (0, 0, 0, [])
    assert found["ready_first"]
    assert found["answered_after_the_signal"]


@pytest.mark.long
def test_clients_that_ask_again_lose_nothing_when_a_server_is_killed(setup: Any) -> None:
    from serving.asked import mixture
    from serving.known import learn
    from serving.part_stops import killed

    requests = mixture(2)
    known = learn(setup.bundle, requests)
    found = asyncio.run(killed(setup, requests, known, clients=10, between=4.0, kills=2))
    assert (found["wrong"], found["lost"], found["told"]) == (0, 0, [])
    assert (found["noticed"], found["recovered"]) == (2, 2)


@pytest.mark.long
def test_memory_stays_and_a_leak_is_noticed(setup: Any) -> None:
    from serving.asked import mixture
    from serving.known import learn
    from serving.part_memory import MOST_GROWTH_MB, watched
    from serving.process import ALTERED

    requests = mixture(2)
    known = learn(setup.bundle, requests)
    grown = {}
    for name, program in {"sound": ("-m", "gap_export"), "leaking": ("-P", str(ALTERED), "leak")}.items():
        with setup.server(program=program) as server:
            server.wait_ready()
            found = asyncio.run(watched(server, requests, known, 20, SECONDS, most=300))
        assert (found["wrong"], found["lost"], found["told"]) == (0, 0, [])
        grown[name] = found["growth_mb"]
    assert grown["sound"] <= MOST_GROWTH_MB < grown["leaking"], grown
