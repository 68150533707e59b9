"""Servers for tests: one that most share, and others with settings of their own over the same engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from gap_export.boxes.scenes import cases
from gap_export.bundle.folder import Bundle
from gap_export.runtime.model import load
from gap_export.serving.engine import Engine
from gap_export.serving.http.settings import HttpSettings
from gap_export.serving.limits import EngineLimits
from gap_export.serving.server import Server, ServerOptions, address_of, listen
from gap_export.serving.service import Service
from tests.serving.http.serving_http import SECONDS, Running, data_url

Serve = Callable[..., Running]


@contextmanager
def running_server(service: Service, settings: HttpSettings, **options: Any) -> Iterator[Running]:
    """A server in a thread, as it is in a process; at the end it does not empty its engine, which others use."""
    listening, up = listen(ServerOptions(port=0)), threading.Event()
    server = Server(service, settings, ServerOptions(port=0, **options), on_listening=lambda _: up.set())
    thread = threading.Thread(target=server.run, args=([listening],), name="server")
    thread.start()
    assert up.wait(SECONDS)
    url = address_of(listening)
    with httpx.Client(base_url=url, timeout=SECONDS) as http:
        yield Running(url, service, server, http)
    server.should_exit = True
    thread.join(SECONDS)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def http_engine(shapes_bundle: Bundle) -> Iterator[Engine]:
    """Four rows, and four requests that wait."""
    with load(shapes_bundle, threads=1) as model:
        limits = EngineLimits(rows=4, queue=4, image_threads=1)
        with Engine(model, limits) as engine:
            yield engine


@pytest.fixture(scope="session")
def running(http_engine: Engine) -> Iterator[Running]:
    """A server with the settings that it has by itself."""
    with running_server(Service(http_engine, "shapes", aliases=("grounder",)), HttpSettings()) as server:
        yield server


@pytest.fixture
def serve(http_engine: Engine) -> Iterator[Serve]:
    """`serve(options={}, service={}, **settings)`: another server over the same engine."""
    with ExitStack() as stack:

        def started(
            options: dict[str, Any] | None = None, service: dict[str, Any] | None = None, **settings: Any
        ) -> Running:
            served = Service(http_engine, "shapes", **(service or {}))
            made = running_server(served, HttpSettings(**settings), **(options or {}))
            return stack.enter_context(made)

        yield started


@pytest.fixture
def own(shapes_bundle: Bundle) -> Iterator[Serve]:
    """`own(rows=..., queue=..., **settings)`: a server over an engine of its own, which notes all tickets."""
    with ExitStack() as stack:

        def started(rows: int = 1, queue: int = 2, **settings: Any) -> Running:
            model = stack.enter_context(load(shapes_bundle, threads=1))
            engine = stack.enter_context(Engine(model, EngineLimits(rows=rows, queue=queue, image_threads=1)))
            made = stack.enter_context(running_server(Service(engine, "shapes"), HttpSettings(**settings)))
            submit_all = engine.submit_all

            def noted(*arguments: Any) -> Any:
                tickets = submit_all(*arguments)
                made.tickets.extend(tickets)
                return tickets

            engine.submit_all = noted  # type: ignore[method-assign]
            stack.callback(lambda: [gate.open() for gate in made.gates])
            return made

        yield started


@pytest.fixture(scope="session")
def scene() -> tuple[Image.Image, str]:
    """An image, and an expression that fits one object in it."""
    case = next(iter(cases(1)))
    return case.image, case.expression


@pytest.fixture(scope="session")
def scene_url(scene: tuple[Image.Image, str]) -> str:
    """The image as a data URL."""
    return data_url(scene[0])


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two keys."""
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text("# of the first client\nfirst-key-0123456789\n\n  second-key-0123456789  \n")
    path.chmod(0o600)
    return path
