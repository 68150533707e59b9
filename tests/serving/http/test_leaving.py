"""Clients that leave, queues that are full, deadlines that pass, and servers that stop: rows are free, nothing is lost."""

from __future__ import annotations

import json
import signal
import threading
import time
from functools import partial
from typing import Any

import pytest

from gap_export.errors import GateError
from gap_export.serving.http.settings import HttpSettings
from gap_export.serving.metrics import ServerMetrics
from gap_export.serving.observer import NoObserver
from gap_export.serving.service import NotReady, Service
from gap_export.serving.work import Refused, Result
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
    gate, engine, metrics = server.hold(), server.engine, ServerMetrics()
    engine._observer = metrics

    def infer(images: int) -> bytes:
        image = {"type": "image_url", "url": scene_url}
        return json.dumps({"input": [image] * images, "labels": ["the red circle"]}).encode()

    first = server.send("/v1/infer", infer(1))
    wait_for(lambda: engine.running == 1 and not engine.waiting, "the first is computed")
    second = server.send("/v1/infer", infer(1))
    wait_for(lambda: engine.images_decoded == 2, "the second waits, decoded")
    kind = {"Content-Type": "application/json"}
    answer = server.http.post("/v1/infer", content=infer(2), headers=kind)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_full")
    assert (engine.waiting, len(server.tickets)) == (1, 2)
    gate.open()
    with first, second:
        assert status_of(first.recv(65536)) == status_of(second.recv(65536)) == 200
    assert engine.images_decoded == 2
    count = metrics.registry.get_sample_value
    assert count("gap_admission_rejections_total", {"reason": "full"}) == 1
    assert count("gap_request_failure_total", {"reason": "cancelled"}) == 0
    assert server.http.post("/v1/infer", content=infer(2), headers=kind).status_code == 200


def test_more_images_than_can_ever_wait_are_no_matter_of_time(own: Serve, scene_url: str) -> None:
    server = own(rows=1, queue=4)
    body = {"input": [{"type": "image_url", "url": scene_url}] * 5, "labels": ["the red circle"]}
    answer = server.http.post("/v1/infer", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "input")
    assert error["message"] == "input: 5 images are given, and a request may have 4"
    assert "retry-after" not in answer.headers
    assert server.engine.images_decoded == 0


@pytest.mark.parametrize("path", ["/v1/ground", "/v1/infer"])
def test_a_deadline_amid_several_answers_is_504(path: str, own: Serve, scene_url: str) -> None:
    """One question is answered, and the other is not: a client asks again for both."""
    server = own(rows=1, queue=4)
    gate, labels = server.hold(), ["the red circle", "the blue square"]
    body: dict[str, Any] = {
        "/v1/ground": {"image": scene_url, "expressions": labels},
        "/v1/infer": {"input": [{"type": "image_url", "url": scene_url}] * 2, "labels": labels[:1]},
    }[path]
    with server.send(path, json.dumps(body).encode(), "Connection: close") as client:
        wait_for(lambda: server.engine.running == 1 and server.tickets, "the first is computed")
        outcomes = [outcome for ticket in server.tickets for outcome in ticket._outcomes]
        assert outcomes == [None, None]
        steps = 0
        while not any(any(ticket._outcomes) for ticket in server.tickets):
            gate.let()
            steps += 1
            wait_for(partial(lambda made: gate.made == made, steps), "a step is made")
        for ticket in server.tickets:
            ticket.admitted -= ticket.work.deadline
        gate.open()
        answer = read_all(client)
    outcomes = [outcome for ticket in server.tickets for outcome in ticket.result(0)]
    assert {type(outcome) for outcome in outcomes} == {Result, Refused}
    assert (status_of(answer), b'"code":"deadline"' in answer) == (504, True)


@pytest.mark.parametrize("path", ["/v1/ground", "/v1/infer"])
def test_a_fault_of_the_session_is_503_for_all(
    path: str, own: Serve, scene_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = (server := own(rows=1, queue=4)).engine
    step, answered = engine._lane.step, threading.Event()

    def fails(*arguments: Any) -> Any:
        if answered.is_set():
            raise RuntimeError("a device is gone")
        return step(*arguments)

    monkeypatch.setattr(engine._lane, "step", fails)
    monkeypatch.setattr(engine, "_observer", told := NoObserver())
    monkeypatch.setattr(told, "answered", lambda _: answered.set(), raising=False)
    labels = ["the red circle", "the blue square"]
    image = {"type": "image_url", "url": scene_url}
    body = (
        {"image": scene_url, "expressions": labels}
        if path == "/v1/ground"
        else {"input": [image], "labels": labels}
    )
    answer = server.http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_fault")
    assert "retry-after" in answer.headers
    assert answered.is_set(), "the first was answered"


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
    metrics = ServerMetrics()
    server = serve(service={"check": lambda: go.wait(SECONDS), "metrics": metrics})
    body = {"image": scene_url, "expression": "the red circle"}
    assert server.http.get("/health").json() == {"status": "starting"}
    assert server.http.get("/healthz").status_code == 200
    answer = server.http.post("/v1/ground", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert 'gap_admission_rejections_total{reason="not_ready"} 1.0' in server.http.get("/metrics").text
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


def test_one_that_stops_before_it_was_checked_answers_only_after_that(
    own: Serve, bodies: dict[str, tuple[str, bytes]]
) -> None:
    go = threading.Event()
    service = Service(own().engine, "shapes", check=lambda: go.wait(SECONDS))
    path, body = bodies["ground"]
    headers = {"Content-Type": "application/json"}
    with running_server(service, HttpSettings(), drain_grace=SECONDS) as server:
        server.server.stop()
        wait_for(lambda: service.state == "stopping", "it is told to stop")
        answer = server.http.post(path, content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        go.set()
        wait_for(lambda: server.http.post(path, content=body, headers=headers).status_code == 200, "proven")
        assert service.state == "stopping"


def test_one_that_was_found_wrong_answers_nothing_while_it_stops(own: Serve) -> None:
    def check() -> None:
        raise GateError("answers otherwise", subject="the session", hint="build it again")

    service = Service(own().engine, "shapes", check=check)
    with pytest.raises(GateError):
        service.prove()
    service.stop()
    with pytest.raises(NotReady):
        service.check_open()


def test_one_whose_engine_has_failed_is_ready_no_more(
    own: Serve, bodies: dict[str, tuple[str, bytes]]
) -> None:
    server = own()
    assert server.http.get("/v1/health/ready").status_code == 200
    server.engine._sweep = lambda: 1 // 0  # type: ignore[method-assign,assignment]
    path, body = bodies["ground"]
    answer = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_fault")
    for where in ("/v1/health/ready", "/health", "/v2/health/ready", "/v1/health/live"):
        answer = server.http.get(where)
        assert (answer.status_code, answer.json()) == (503, {"status": "failed"})


def test_a_second_signal_gives_up_what_is_left(own: Serve, bodies: dict[str, tuple[str, bytes]]) -> None:
    server = own(rows=1, queue=4)
    gate, engine = server.hold(), server.engine
    clients = [server.send(*bodies["ground"]) for _ in range(3)]
    wait_for(lambda: engine.running == 1 and engine.waiting == 2, "one is computed and two wait")
    server.server.handle_exit(signal.SIGTERM, None)
    wait_for(lambda: engine.draining, "it admits nothing more")
    gate.let()
    wait_for(lambda: gate.made == 1, "it computes on")
    server.server.handle_exit(signal.SIGTERM, None)
    wait_for(lambda: engine._stopping, "it is told again")
    gate.let()
    wait_for(lambda: not engine._thread.is_alive(), "the engine ends")
    assert gate.made <= 2
    outcomes = [each for ticket in server.tickets for each in ticket.result(0)]
    assert [each.reason for each in outcomes if isinstance(each, Refused)] == ["draining"] * 3
    for client in clients:
        client.close()


def test_refusals_survive_a_process_boundary() -> None:
    import pickle

    from gap_export.serving.remote_images import ImageRefused

    refused = Refused("is full", reason="full", retry_after=1.0)
    assert pickle.loads(pickle.dumps(refused)).retry_after == 1.0
    image = ImageRefused("is none", subject="image", hint="send one", status=422)
    assert pickle.loads(pickle.dumps(image)).status == 422
