"""Images of requests that wait: what is fetched holds up nobody else, and nothing is held for longer than it is needed."""

from __future__ import annotations

import gc
import json
import socket
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from PIL import Image

from gap_export.serving.engine import Engine
from gap_export.serving.http import replies
from gap_export.serving.http.replies import Opener
from gap_export.serving.images import RequestImages
from gap_export.serving.receipts import image_digest, receipt_of
from gap_export.serving.remote_images import RemoteImages
from tests.serving.http.conftest import Serve
from tests.serving.http.serving_http import SECONDS, Running, wait_for

HOST = "images.example.org"


@dataclass
class Slow:
    """A network whose hosts do not answer until they are let go, and then with a closed door.

    Attributes:
        go: lets them.
        dialled: seconds within which each was to answer.
    """

    go: threading.Event = field(default_factory=threading.Event)
    dialled: list[float] = field(default_factory=list)

    @property
    def remote(self) -> RemoteImages:
        return RemoteImages([HOST], resolve=lambda *_: ["93.184.216.34"], dial=self.dial)

    def dial(self, address: str, port: int, seconds: float) -> socket.socket:
        self.dialled.append(seconds)
        self.go.wait(SECONDS)
        raise OSError


@pytest.fixture
def slow() -> Iterator[Slow]:
    made = Slow()
    yield made
    made.go.set()


def asking(*images: str, **fields: Any) -> bytes:
    """A request for a box in images."""
    return json.dumps({"images": images, "expression": "the red circle", **fields}).encode()


def ask(server: Running, body: bytes) -> tuple[int, Any]:
    answer = server.http.post("/v1/ground", content=body, headers={"Content-Type": "application/json"})
    return answer.status_code, answer.json()


def test_requests_with_their_images_do_not_wait_for_slow_addresses(
    own: Serve, slow: Slow, scene_url: str
) -> None:
    server = own(queue=20, remote=slow.remote)
    engine = server.engine
    threads = engine.limits.fetch_threads
    clients = [server.send("/v1/ground", asking(f"http://{HOST}/a.png")) for _ in range(threads + 2)]
    wait_for(lambda: len(slow.dialled) == threads, "as many are fetched as may")
    wait_for(lambda: engine.waiting == len(clients), "others wait for those")
    assert ask(server, asking(scene_url))[0] == 200
    assert engine.oldest_wait() == 0, "no request waits for another to be begun"
    assert len(slow.dialled) == threads
    slow.go.set()
    for client in clients:
        with client:
            assert client.recv(65536).startswith(b"HTTP/1.1 422 ")


def test_what_is_waited_for_no_more_is_not_fetched(own: Serve, slow: Slow) -> None:
    server = own(queue=2, remote=slow.remote)
    client = server.send("/v1/ground", asking(*[f"http://{HOST}/a.png"] * 4))
    wait_for(lambda: slow.dialled, "the first image is fetched")
    client.close()
    wait_for(lambda: server.engine.waiting == 0, "its place is free")
    slow.go.set()
    wait_for(lambda: server.engine._queue._fetched == 0, "its fetch ends")
    assert len(slow.dialled) == 1


def test_images_are_fetched_within_the_deadline(own: Serve, slow: Slow) -> None:
    server = own(queue=2, remote=slow.remote, deadline=0.3)
    status, answer = ask(server, asking(f"http://{HOST}/a.png"))
    assert (status, answer["error"]["code"]) == (504, "deadline")
    assert 0 < slow.dialled[0] <= 0.3
    assert server.engine.waiting == 0


def test_a_refused_request_fetches_nothing(own: Serve, slow: Slow, scene_url: str) -> None:
    server = own(rows=1, queue=1, remote=slow.remote)
    engine, gate = server.engine, server.hold()
    with server.send("/v1/ground", asking(scene_url)):
        wait_for(lambda: engine.running == 1 and not engine.waiting, "the first is computed")
        with server.send("/v1/ground", asking(scene_url)):
            wait_for(lambda: engine.waiting == 1, "the second waits")
            assert ask(server, asking(f"http://{HOST}/a.png"))[0] == 503
            assert slow.dialled == []
            gate.open()
            wait_for(lambda: not engine.waiting and not engine.running, "both are answered")


def test_an_engine_that_is_closed_waits_for_no_fetch(
    own: Serve, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gap_export.serving.engine._FETCH_JOIN_SECONDS", 0.1)
    server = own(queue=2, remote=slow.remote)
    with server.send("/v1/ground", asking(f"http://{HOST}/a.png")) as client:
        wait_for(lambda: slow.dialled, "an image is fetched")
        server.engine.close()
        assert not slow.go.is_set()
        assert client.recv(65536).startswith(b"HTTP/1.1 503 ")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Image.Image]]:
    """Notes all images that are decoded."""
    found: list[weakref.ref[Image.Image]] = []
    before = RequestImages.open

    def noted(*arguments: Any) -> list[Image.Image]:
        images = before(*arguments)
        found.extend(map(weakref.ref, images))
        return images

    monkeypatch.setattr(RequestImages, "open", noted)
    return found


def test_receipts_hold_no_image_and_digest_it_once(
    own: Serve,
    opened: list[weakref.ref[Image.Image]],
    scene_url: str,
    scene: tuple[Image.Image, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digested: list[str] = []

    def noted(image: Image.Image) -> Any:
        digested.append(threading.current_thread().name)
        return image_digest(image)

    monkeypatch.setattr(replies, "image_digest", noted)
    server = own()
    server.service._receipt_of = receipt_of
    gate, engine = server.hold(), server.engine
    expressions = ["a", "b", "of no use: <image>", "c"]
    body = json.dumps({"image": scene_url, "expressions": expressions, "receipt": True}).encode()
    with server.send("/v1/ground", body, "Connection: close") as client:
        wait_for(lambda: engine.running == 1, "it is computed")
        gc.collect()
        assert [image() for image in opened] == [None]
        gate.open()
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    results = json.loads(answer.partition(b"\r\n\r\n")[2])["results"]
    expected = image_digest(scene[0]).model_dump(mode="json")
    assert ["error" in each for each in results] == [False, False, True, False]
    assert [each["receipt"]["images"] for each in results if "receipt" in each] == [[expected]] * 3
    assert digested == ["gap-images-0"]


@pytest.fixture
def openers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Opener]]]:
    """Notes who holds what was sent, while nothing is looked for that holds itself."""
    found: list[weakref.ref[Opener]] = []
    before = Opener.__init__

    def noted(self: Opener, *arguments: Any, **named: Any) -> None:
        before(self, *arguments, **named)
        found.append(weakref.ref(self))

    monkeypatch.setattr(Opener, "__init__", noted)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


@pytest.mark.parametrize(
    "path",
    [
        "/v1/ground",
        *(pytest.param(path, marks=pytest.mark.long) for path in ("/v1/infer", "/v1/chat/completions")),
    ],
)
@pytest.mark.parametrize("how", ["answered", "deadline", "left", "broken"])
def test_what_was_sent_is_dropped_with_its_request(
    how: str, path: str, own: Serve, openers: list[weakref.ref[Opener]], scene_url: str
) -> None:
    server = own(queue=1, **({"deadline": 0.3} if how == "deadline" else {}))
    engine, clients = server.engine, list[socket.socket]()
    _keep_no_tickets(engine)
    if how == "broken":
        scene_url = scene_url[:60]
    body = _bodies(scene_url)[path]
    if how in ("deadline", "left"):
        server.hold()
        clients.append(server.send(path, body))
        wait_for(lambda: engine.running == 1 and not engine.waiting, "the first is computed")
    client = server.send(path, body)
    if how == "left":
        wait_for(lambda: engine.waiting == 1, "the second waits")
        client.close()
        wait_for(lambda: engine.waiting == 0, "its place is free")
    else:
        status = {"answered": b"200", "deadline": b"504", "broken": b"400"}[how]
        with client:
            assert client.recv(65536).split()[1] == status
    wait_for(lambda: openers[-1]() is None, "what was sent is held by nobody")
    for waiting in clients:
        waiting.close()


def _keep_no_tickets(engine: Engine) -> None:
    """Have tests note none."""
    for name in ("submit", "submit_all"):
        vars(engine).pop(name, None)


def _bodies(url: str) -> dict[str, bytes]:
    content: Sequence[Any] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "a circle?"},
    ]
    return {
        "/v1/ground": asking(url),
        "/v1/infer": json.dumps({"input": [{"type": "image_url", "url": url}], "labels": ["a"]}).encode(),
        "/v1/chat/completions": json.dumps(
            {"model": "shapes", "messages": [{"role": "user", "content": content}]}
        ).encode(),
    }
