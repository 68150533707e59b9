"""Clients that leave, queues that are full, deadlines that pass, and servers that stop: rows are free, nothing is lost."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from gap_export.errors import GateError
from gap_export.serving.http.settings import HttpSettings
from gap_export.serving.service import Service
from gap_export.serving.work import Refused
from tests.serving.http.conftest import Serve, running_server
from tests.serving.http.serving_http import SECONDS, read_all, status_of, wait_for


@pytest.fixture(scope="module")
def bodies(scene_url: str) -> dict[str, tuple[str, bytes]]:
    """Name -> (path, body) of a request that is answered in ten tokens."""
    question = [
        {"type": "image_url", "image_url": {"url": scene_url}},
        {"type": "text", "text": "where is the red circle?"},
    ]
    chat = {"model": "shapes", "messages": [{"role": "user", "content": question}]}
    made = {
        "ground": ("/v1/ground", {"image": scene_url, "expression": "the red circle"}),
        "infer": (
            "/v1/infer",
            {"input": [{"type": "image_url", "url": scene_url}], "labels": ["the red circle"]},
        ),
        "chat": ("/v1/chat/completions", chat),
        "stream": ("/v1/chat/completions", {**chat, "stream": True}),
    }
    return {name: (path, json.dumps(body).encode()) for name, (path, body) in made.items()}


@pytest.mark.parametrize("kind", ["ground", "infer", "chat", "stream"])
def test_a_row_is_free_one_step_after_its_client_left(
    kind: str, own: Serve, bodies: dict[str, tuple[str, bytes]]
) -> None:
    server = own()
    gate, engine = server.hold(), server.engine
    path, body = bodies[kind]
    client = server.send(path, body)
    wait_for(lambda: engine.running == 1, "the request is computed")
    gate.let()
    wait_for(lambda: gate.made == 1, "a step is made")
    if kind == "stream":
        assert status_of(client.recv(65536)) == 200
    client.close()
    wait_for(lambda: server.tickets[0].cancelled, "the server sees that its client left")
    gate.let()
    wait_for(lambda: engine.running == 0, "the row is free")
    assert gate.made <= 2
    gate.open()
    answer = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200


def test_a_request_whose_client_left_while_it_waited_is_not_begun(
    own: Serve, bodies: dict[str, tuple[str, bytes]]
) -> None:
    server = own(rows=1, queue=2)
    gate, engine = server.hold(), server.engine
    path, body = bodies["ground"]
    first = server.send(path, body)
    wait_for(lambda: engine.running == 1 and not engine.waiting, "the first is computed")
    second = server.send(path, body)
    wait_for(lambda: engine.waiting == 1, "the second waits")
    second.close()
    wait_for(lambda: engine.waiting == 0, "its place is free")
    gate.open()
    with first:
        assert status_of(first.recv(65536)) == 200
    assert engine.prompts_read == 1


def test_a_full_queue_refuses_before_an_image_is_decoded(
    own: Serve, bodies: dict[str, tuple[str, bytes]]
) -> None:
    server = own(rows=1, queue=2)
    gate, engine = server.hold(), server.engine
    path, body = bodies["ground"]
    clients = [server.send(path, body)]
    wait_for(lambda: engine.running == 1 and not engine.waiting, "the first is computed")
    clients += [server.send(path, body) for _ in range(2)]
    wait_for(lambda: engine.waiting == 2, "two wait")
    wait_for(lambda: engine.images_decoded == 3, "their images are decoded")
    for kind in ("ground", "infer", "chat", "stream"):
        where, what = bodies[kind]
        answer = server.http.post(where, content=what, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "queue_full"
    assert engine.images_decoded == 3
    gate.open()
    for client in clients:
        with client:
            assert status_of(client.recv(65536)) == 200
    assert engine.images_decoded == 3


def test_of_several_images_all_have_a_place_or_none(own: Serve, scene_url: str) -> None:
    server = own(rows=1, queue=2)
    engine = server.engine
    hold = threading.Event()
    decode = engine._preparing.prepare

    def held(*arguments: Any) -> Any:
        hold.wait(SECONDS)
        return decode(*arguments)

    engine._preparing.prepare = held  # type: ignore[method-assign]
    body = {"input": [{"type": "image_url", "url": scene_url}] * 3, "labels": ["the red circle"]}
    answer = server.http.post("/v1/infer", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_full")
    wait_for(lambda: engine.waiting == 0, "places are given back")
    hold.set()


def test_a_deadline_is_504(own: Serve, bodies: dict[str, tuple[str, bytes]]) -> None:
    server = own(deadline=0.3)
    gate = server.hold()
    for kind in ("ground", "chat"):
        path, body = bodies[kind]
        with server.send(path, body, "Connection: close") as client:
            wait_for(lambda: server.engine.running == 1, "it is computed")
            wait_for(lambda: server.tickets[-1].expires < time.monotonic(), "time passes")
            gate.let()
            answer = read_all(client)
        assert status_of(answer) == 504
        assert b'"code":"deadline"' in answer
        wait_for(lambda: server.engine.running == 0, "the row is free")
    gate.open()


def test_a_stream_that_breaks_says_so_and_ends(own: Serve, bodies: dict[str, tuple[str, bytes]]) -> None:
    server = own(deadline=0.5)
    gate = server.hold()
    path, body = bodies["stream"]
    with server.send(path, body, "Connection: close") as client:
        wait_for(lambda: server.engine.running == 1, "it is computed")
        gate.let()
        wait_for(lambda: server.tickets[-1].expires < time.monotonic(), "time passes")
        gate.let()
        answer = read_all(client)
    assert status_of(answer) == 200
    assert b'data: {"error": {"message": "the request: was not answered within 0.5 s' in answer
    assert b"data: [DONE]" in answer
    gate.open()


def test_a_server_that_stops_finishes_what_it_admitted(
    own: Serve, bodies: dict[str, tuple[str, bytes]]
) -> None:
    server = own(rows=1, queue=4)
    gate, engine = server.hold(), server.engine
    clients = [server.send(*bodies[kind], "Connection: close") for kind in ("ground", "chat", "stream")]
    wait_for(lambda: engine.running == 1 and engine.waiting == 2, "one is computed and two wait")
    server.server.stop()
    wait_for(lambda: server.http.get("/health").status_code == 503, "it is ready no more")
    wait_for(lambda: engine.draining, "it admits nothing more")
    assert server.http.get("/healthz").status_code == 200
    path, body = bodies["ground"]
    late = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
    assert "retry-after" in late.headers
    gate.open()
    for client in clients:
        with client:
            assert status_of(read_all(client)) == 200
    wait_for(lambda: server.server.should_exit, "it ends")


def test_the_grace_answers_on(own: Serve, bodies: dict[str, tuple[str, bytes]]) -> None:
    server = own()
    path, body = bodies["ground"]
    with running_server(server.service, HttpSettings(), drain_grace=0.5) as other:
        other.server.stop()
        wait_for(lambda: other.http.get("/health").status_code == 503, "it is ready no more")
        answer = other.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200
        wait_for(lambda: other.server.should_exit, "it ends")


def test_nothing_is_answered_before_the_session_was_checked(serve: Serve, scene_url: str) -> None:
    go = threading.Event()
    server = serve(service={"check": lambda: go.wait(SECONDS)})
    body = {"image": scene_url, "expression": "the red circle"}
    assert server.http.get("/health").json() == {"status": "starting"}
    assert server.http.get("/healthz").status_code == 200
    answer = server.http.post("/v1/ground", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    go.set()
    wait_for(lambda: server.http.get("/v1/health/ready").status_code == 200, "it is ready")
    assert server.http.post("/v1/ground", json=body).status_code == 200


def test_a_session_that_is_not_right_never_serves(own: Serve) -> None:
    wrong = GateError("answers otherwise", subject="the session", hint="build it again")

    def check() -> None:
        raise wrong

    service = Service(own().engine, "shapes", check=check)
    with running_server(service, HttpSettings()) as server:
        wait_for(lambda: server.server.should_exit, "it ends by itself")
        assert service.state != "ready"
    assert server.server.failure is wrong


def test_refusals_survive_a_process_boundary() -> None:
    import pickle

    from gap_export.serving.remote_images import ImageRefused

    refused = Refused("is full", reason="full", retry_after=1.0)
    assert pickle.loads(pickle.dumps(refused)).retry_after == 1.0
    image = ImageRefused("is none", subject="image", hint="send one", status=422)
    assert pickle.loads(pickle.dumps(image)).status == 422
