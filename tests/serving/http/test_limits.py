"""Limits: bodies that are too long, lie about it or take for ever; header lines; connections."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.serving.http.conftest import Serve
from tests.serving.http.serving_http import SECONDS, read_all, status_of, wait_for

PATH = "/v1/ground"
KIB = 2**10


def test_long_bodies_are_refused_before_they_are_read(serve: Serve) -> None:
    server = serve(body_bytes=64 * KIB)
    announced = server.send(PATH, b"", f"Content-Length: {10**9}")
    with announced:
        assert status_of(announced.recv(4096)) == 413
    huge = server.send(PATH, b"", f"Content-Length: {'9' * 40}")
    with huge:
        assert status_of(huge.recv(4096)) in (400, 413)
    answer = server.http.post(PATH, content=b"x" * (100 * KIB), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")
    assert answer.json()["error"]["message"].startswith("the body has more than 65.5 kB")

    def pieces() -> object:
        for _ in range(100):
            yield b"x" * KIB

    chunked = server.http.post(PATH, content=pieces(), headers={"Content-Type": "application/json"})  # type: ignore[arg-type]
    assert chunked.status_code == 413
    assert (
        server.http.post(
            PATH, content=b" " * (63 * KIB), headers={"Content-Type": "application/json"}
        ).status_code
        == 400
    )


def test_lies_about_the_length(serve: Serve) -> None:
    server = serve(body_bytes=64 * KIB, body_seconds=0.3)
    short = server.send(PATH, b"{}", "Content-Length: 1000")
    with short:
        assert status_of(short.recv(4096)) == 408
    longer = server.send(PATH, b'{"a": 1} and more', "Content-Length: 8")
    with longer:
        answers = read_all(longer)
    assert status_of(answers) == 400
    assert answers.count(b"HTTP/1.1 ") == 2  # what follows is no request
    both = server.send(PATH, b"2\r\n{}\r\n0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked")
    with both:
        assert status_of(both.recv(4096)) == 400
    bad = server.send(PATH, b"zz\r\n{}\r\n", "Transfer-Encoding: chunked")
    with bad:
        assert status_of(bad.recv(4096)) == 400


@pytest.mark.long
def test_slow_bodies_and_header_lines_end(serve: Serve) -> None:
    server = serve(body_seconds=0.3, header_seconds=0.3)
    began = time.monotonic()
    slow = server.send(PATH, b"{", "Content-Length: 1000")
    silent, half = server.connect(), server.connect()
    half.sendall(b"POST /v1/ground HTTP/1.1\r\nHost:")
    with slow, silent, half:
        assert status_of(read_all(slow)) == 408
        assert read_all(silent) == b""
        assert read_all(half) == b""
    assert time.monotonic() - began < 10


def test_header_lines_are_bounded(serve: Serve) -> None:
    server = serve(header_bytes=4 * KIB)
    for value in ("x" * 5 * KIB, "x" * 64 * KIB):
        answer = server.http.get("/healthz", headers={"X-Long": value})
        assert answer.status_code in (400, 431)
        assert "header" in answer.json()["error"]["message"]
    assert server.http.get("/healthz", headers={"X-Long": "x" * KIB}).status_code == 200


def test_connections_of_one_address_are_counted(serve: Serve) -> None:
    server = serve(connections_per_address=3)
    server.http.get("/healthz")
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(server.connect())
        fourth = stack.enter_context(server.connect())
        fourth.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        head, _, body = read_all(fourth).partition(b"\r\n\r\n")
        assert status_of(head) == 429
        assert b"retry-after: 1" in head.lower()
        assert json.loads(body)["error"]["code"] == "too_many_connections"
    wait_for(lambda: len(server.server.server_state.connections) <= 1, "connections end")
    with server.connect() as again:
        again.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert status_of(read_all(again)) == 200


def test_bodies_of_all_requests_are_counted_together(serve: Serve) -> None:
    server = serve(bodies_bytes=64 * KIB, body_seconds=5.0)
    holder = server.send(PATH, b"x" * (40 * KIB), f"Content-Length: {50 * KIB}")
    with holder:

        def refused() -> bool:
            answer = server.http.post(
                PATH, content=b"x" * (30 * KIB), headers={"Content-Type": "application/json"}
            )
            return answer.status_code == 503 and answer.headers["retry-after"] == "1"

        wait_for(refused, "the second body is one too many")

    def taken() -> bool:
        answer = server.http.post(
            PATH, content=b"x" * (30 * KIB), headers={"Content-Type": "application/json"}
        )
        return answer.status_code == 400

    wait_for(taken, "the bytes of the first are given back")


def test_one_address_holds_a_part_of_all_bodies_alone(serve: Serve) -> None:
    server = serve(body_bytes=16 * KIB, bodies_bytes=64 * KIB, body_seconds=20.0)
    kind = {"Content-Type": "application/json"}

    def answered(source: str) -> httpx.Response:
        transport = httpx.HTTPTransport(local_address=source)
        with httpx.Client(base_url=server.url, transport=transport, timeout=SECONDS) as http:
            return http.post(PATH, content=b"x" * (12 * KIB), headers=kind)

    holder = server.send(PATH, b"x" * (12 * KIB), f"Content-Length: {15 * KIB}")
    with holder:
        wait_for(lambda: answered("127.0.0.1").status_code == 429, "its address has no more")
        refused = answered("127.0.0.1")
        assert refused.json()["error"]["code"] == "too_many_bytes"
        assert refused.headers["retry-after"] == "1"
        assert answered("127.0.0.2").status_code == 400, "others are read"
    wait_for(lambda: answered("127.0.0.1").status_code == 400, "its bytes are given back")


def test_behind_a_proxy_all_have_one_address(serve: Serve) -> None:
    server = serve(body_bytes=16 * KIB, bodies_bytes=64 * KIB, body_seconds=20.0, connections_per_address=0)
    kind = {"Content-Type": "application/json"}
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(server.send(PATH, b"x" * (14 * KIB), f"Content-Length: {15 * KIB}"))
        wait_for(
            lambda: server.http.post(PATH, content=b"x" * (9 * KIB), headers=kind).status_code == 503,
            "all together hold as much as may be",
        )


def test_the_clock_of_header_lines_begins_with_their_first_byte(serve: Serve) -> None:
    server = serve(header_seconds=0.2)
    request = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    with server.connect() as connection:

        def answer() -> bytes:
            connection.sendall(request)
            came = b""
            while not came.endswith(b"}"):
                came += connection.recv(4096)
            return came

        assert status_of(answer()) == 200
        protocol: Any = next(iter(server.server.server_state.connections))
        wait_for(lambda: protocol.timeout_keep_alive_task is not None, "it is kept alive")
        assert protocol._header_timer is None
        time.sleep(0.4)
        assert status_of(answer()) == 200
        connection.sendall(request[:20])
        assert read_all(connection) == b"", "half a request ends"


def test_small_answers_are_sent_at_once(serve: Serve) -> None:
    """Without TCP_NODELAY each answer waits 40 ms for the client's acknowledgement."""
    server = serve()
    server.http.get("/healthz")
    (connection,) = server.server.server_state.connections
    plain = connection.transport.get_extra_info("socket")
    assert plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
