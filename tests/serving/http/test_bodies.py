"""Bodies: JSON as its standard has it, of bounded size and depth, with the right headers; and errors of one form."""

from __future__ import annotations

import base64
import binascii
import json
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gap_export.serving.http.errors import HttpError
from gap_export.serving.http.ground import GroundRequest
from gap_export.serving.http.infer import InferRequest
from gap_export.serving.http.json_body import MOST_VALUES, parse_object
from gap_export.serving.http.openai_fields import ChatRequest
from gap_export.serving.images import _PIECE, _from_base64
from gap_export.serving.metrics import ServerMetrics
from tests.serving.http.conftest import Serve
from tests.serving.http.serving_http import Running, read_all, status_of

REFUSED = {
    "nothing": (b"", "is not JSON"),
    "no object": (b"[1]", "is not a JSON object"),
    "NaN": (b'{"a": NaN}', "has NaN, which is no number"),
    "infinity": (b'{"a": -Infinity}', "has -Infinity"),
    "overflow": (b'{"a": 1e999}', "too large"),
    "digits": (b'{"a": ' + b"9" * 500 + b"}", "too many digits"),
    "long fraction": (b'{"a": 0.' + b"9" * 500 + b"}", "too long"),
    "key twice": (b'{"a": 1, "b": {"c": 1, "c": 1}}', "has the key 'c' twice"),
    "deep": (b'{"a":' * 33 + b"1" + b"}" * 33, "more than 32 deep"),
    "very deep": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "more than 32 deep"),
    "brackets": (b'{"a": ' + b"[" * 50_000, "is not JSON|more than 32 deep"),
    "many values": (b'{"a": [' + b"0," * MOST_VALUES + b"0]}", "has more than 100000 values"),
    "many keys": (b"{" + b",".join(b'"%d":1' % n for n in range(101)) + b"}", "more than 100 keys"),
    "many keys within": (
        b'{"a":{' + b",".join(b'"%d":1' % n for n in range(101)) + b"}}",
        "more than 100 keys",
    ),
    "half a pair": (rb'{"a": "\ud800"}', "half of a surrogate pair"),
    "half a pair in a list": (rb'{"a": [["\uDFFF\uD83D"]]}', "half of a surrogate pair"),
    "half a pair as key": (rb'{"\udc00": 1}', "half of a surrogate pair"),
    "no UTF-8": (b'{"a": "\xff"}', "is not UTF-8"),
    "surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', "is not UTF-8"),
    "behind it": (b'{"a": 1} x', "is not JSON"),
    "two": (b'{"a": 1}{"b": 2}', "is not JSON"),
    "single quotes": (b"{'a': 1}", "is not JSON"),
    "comma": (b'{"a": 1,}', "is not JSON"),
    "control character": (b'{"a": "\x01"}', "is not JSON"),
    "mark": (b"\xef\xbb\xbf{}", "is not JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_json_is_refused_in_a_line(name: str) -> None:
    body, named = REFUSED[name]
    began = time.process_time()
    with pytest.raises(HttpError, match=named) as refused:
        parse_object(body)
    assert time.process_time() - began < 1
    assert refused.value.status == 400
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 200


def test_what_is_json_is_read() -> None:
    text = {"a": [1, -0.5, 1e10, True, None, '\U0001f600 é \\ "', {"b": {}}]}
    for ascii_alone in (True, False):
        assert parse_object(json.dumps(text, ensure_ascii=ascii_alone).encode()) == text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": "application/json; charset=latin-1"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 400),
        ({"Content-Type": "Application/JSON"}, 400),
    ],
    ids=str,
)
def test_content_types(headers: dict[str, str], status: int, running: Running) -> None:
    answer = running.http.post("/v1/ground", content=b"{}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/ground", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/completions", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/..%2f..%2fetc/passwd", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("OPTIONS", "/v1/ground", 405, "method_not_allowed"),
        ("POST", "/v1/health/live", 405, "method_not_allowed"),
    ],
)
def test_paths_and_methods(method: str, path: str, status: int, code: str, running: Running) -> None:
    answer = running.http.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_no_http_is_refused_in_the_same_form(running: Running) -> None:
    for sent in (
        b"HELLO\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nbad line\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 70_000,
    ):
        with running.connect() as connection:
            connection.sendall(sent)
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert status_of(head) in (400, 431)
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_request_numbers_are_repeated_or_made(running: Running) -> None:
    given = running.http.get("/healthz", headers={"X-Request-Id": "from-the-client.1"})
    assert given.headers["x-request-id"] == "from-the-client.1"
    made = {
        running.http.get("/healthz", headers={"X-Request-Id": number}).headers["x-request-id"]
        for number in ("", "a b", "x" * 129, "<script>")
    }
    assert len(made) == 4
    assert all(len(number) == 32 and number.isalnum() for number in made)


def test_the_schema_is_told(running: Running) -> None:
    schema = running.http.get("/openapi.json").json()
    assert schema["paths"]["/v1/ground"]["post"]["requestBody"]["required"] is True
    names = set(schema["components"]["schemas"])
    assert {"GroundRequest", "InferRequest", "ChatRequest", "Error"} <= names
    references = {part.split('"')[0] for part in json.dumps(schema).split("#/components/schemas/")[1:]}
    assert references <= names
    for path in ("/v1/ground", "/v1/infer", "/v1/chat/completions"):
        assert {"400", "401", "413", "422", "503", "504"} <= set(schema["paths"][path]["post"]["responses"])


def test_what_is_looked_at_answers_without_a_body_too(serve: Serve) -> None:
    http = serve(service={"metrics": ServerMetrics()}).http
    for path in ("/v1/health/live", "/v1/health/ready", "/health", "/ping", "/metrics", "/v1/models"):
        whole, head = http.get(path), http.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-type"] == whole.headers["content-type"]


def test_large_bodies_are_checked_on_another_thread(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def noted(*_: object) -> None:
        threads.append(threading.current_thread().name)
        raise HttpError(400, "is enough")

    monkeypatch.setattr(GroundRequest, "model_validate", noted)
    for size in (10, 100_000):
        assert running.http.post("/v1/ground", json={"expression": "x" * size}).status_code == 400
    assert [name == "server" for name in threads] == [True, False]


def test_faults_of_a_body_are_few() -> None:
    """Of lists the first one: what a body may hold of them would take long to write down."""
    bad = {str(number): 1 for number in range(90)}
    for model, body in (
        (GroundRequest, {"images": [bad] * 50, "expressions": [1] * 16}),
        (InferRequest, {"input": [bad] * 50, "labels": [1] * 16}),
        (ChatRequest, {"model": "m", "messages": [{"content": [bad] * 60, **bad}] * 200, "stop": [1] * 9}),
    ):
        with pytest.raises(ValidationError) as caught:
            model.model_validate(body)
        assert caught.value.error_count() < 300


@pytest.mark.parametrize("path", ["/v1/ground", "/v1/infer"])
def test_long_lists_of_images_are_refused_at_their_field(path: str, running: Running) -> None:
    image = {"type": "image_url", "url": "data:"}
    name, body = {
        "/v1/ground": ("images", {"images": ["a"] * 90_000, "expression": "a"}),
        "/v1/infer": ("input", {"input": [image] * 10_000, "labels": ["a"]}),
    }[path]
    error = running.http.post(path, json=body).json()["error"]
    assert (error["message"], error["param"]) == (f"{name}: must have at most 64", name)


def test_health_and_models(running: Running) -> None:
    for path in ("/v1/health/live", "/healthz", "/ping", "/v2/health/live"):
        assert running.http.get(path).json() == {"status": "live"}
    for path in ("/v1/health/ready", "/health", "/v2/health/ready"):
        assert running.http.get(path).json() == {"status": "ready"}
    (model, alias) = running.http.get("/v1/models").json()["data"]
    assert (model["id"], alias["id"]) == ("shapes", "grounder")
    assert model["gap"]["rows"] == 4
    assert model["gap"]["one_at_a_time_because"] is None
    assert model["gap"]["keep_range"] == [0.1, 1.0]
    assert running.http.get("/v1/models/grounder").json() == alias


@given(st.binary(max_size=40), st.integers(0, 3), st.sampled_from(["", "=", "A", " ", "é", "AAAA"]))
def test_base64_is_read_in_pieces_as_it_is_whole(file: bytes, pieces: int, behind: str) -> None:
    text = base64.b64encode(bytes(3 * _PIECE // 4 * pieces) + file).decode() + behind
    try:
        whole = b"" if len(text) % 4 else binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        whole = b""
    assert _from_base64(f"data:{text}", 5) == whole
