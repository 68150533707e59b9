"""Keys, what is in the log, metrics, and the page."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from gap_export.errors import InputError
from gap_export.serving.http.auth import Keys, others_can_read
from gap_export.serving.http.page import page_routes
from tests.serving.http.conftest import Serve
from tests.serving.http.serving_http import Running

GOOD = ("Bearer first-key-0123456789", "bearer second-key-0123456789")
BAD = (
    "Bearer", "Bearer first-key", "Bearer first-key-01234567890", "Basic first-key-0123456789",
    "first-key-0123456789", "Bearer # of the first client", "Bearer FIRST-KEY-0123456789", "Bearer " + "x" * 5000,
)  # fmt: skip


class Counted:
    """Metrics of a test."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def render(self) -> bytes:
        return b"gap_requests 1\n"


def test_requests_without_a_key_are_refused(serve: Serve, key_file: Path) -> None:
    server = serve(keys=Keys.read(key_file), service={"metrics": Counted()})
    for path in ("/v1/ground", "/v1/chat/completions"):
        for header in (None, *BAD):
            answer = server.http.post(
                path, content=b"{}", headers={"Authorization": header} if header else {}
            )
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for header in GOOD:
            assert server.http.post(path, json={}, headers={"Authorization": header}).status_code == 400
    assert server.http.get("/v1/models").status_code == 401
    twice = [("Authorization", GOOD[0]), ("Authorization", GOOD[0])]
    assert server.http.get("/v1/models", headers=twice).status_code == 401
    for path in ("/v1/health/live", "/v1/health/ready", "/healthz", "/metrics", "/openapi.json"):
        assert server.http.get(path).status_code == 200, path
    protected = serve(keys=Keys.read(key_file), protect_metrics=True, service={"metrics": Counted()})
    assert protected.http.get("/metrics").status_code == 401
    metrics = protected.http.get("/metrics", headers={"Authorization": GOOD[0]})
    assert (metrics.text, metrics.headers["content-type"]) == ("gap_requests 1\n", Counted.content_type)


def test_files_of_keys(tmp_path: Path, key_file: Path) -> None:
    assert not others_can_read(key_file)
    path = tmp_path / "keys"
    for content, named in (
        ("", "has no key"),
        ("# none\n", "has no key"),
        ("short\n", "key 1"),
        ("good-key-1\nbad key 2\n", "key 2"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=named) as refused:
            Keys.read(path)
        assert "bad key 2" not in str(refused.value)
    path.chmod(0o644)
    assert others_can_read(path)
    with pytest.raises(InputError, match="cannot be read"):
        Keys.read(tmp_path / "none")


def test_the_log_has_neither_texts_nor_images(
    running: Running, caplog: pytest.LogCaptureFixture, scene_url: str
) -> None:
    with caplog.at_level(logging.DEBUG):
        body = {"image": scene_url, "expression": "the secret circle"}
        for path in ("/v1/ground", "/v1/ground?expression=secret", "/secret%0aline"):
            running.http.post(path, json=body, headers={"X-Request-Id": "number-1"})
        running.http.get("/healthz")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("gap_export.serving")]
    assert len(lines) == 3
    assert lines[0].startswith("POST /v1/ground 200 0.")
    assert all(line.endswith(" number-1") and "\n" not in line and "base64" not in line for line in lines)
    assert "secret" not in lines[0] + lines[1]


def test_what_breaks_is_answered_and_logged_by_its_kind(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, scene_url: str
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret at 0x7f00")

    monkeypatch.setattr(running.service.engine, "submit_all", broken)
    with caplog.at_level(logging.DEBUG):
        answer = running.http.post("/v1/ground", json={"image": scene_url, "expression": "a"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "server_fault"
    assert "secret" not in answer.text + caplog.text
    assert "failed: RuntimeError at test_keys.py" in caplog.text


def test_the_page_is_served_from_its_folder(tmp_path: Path, serve: Serve) -> None:
    assert page_routes(tmp_path) == []
    (tmp_path / "index.html").write_text("<title>é</title>")
    (tmp_path / "page.js").write_text("1")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    server = serve(page=tmp_path)
    index = server.http.get("/")
    assert (index.text, index.headers["content-type"]) == ("<title>é</title>", "text/html; charset=utf-8")
    assert "script-src 'self'" in index.headers["content-security-policy"]
    assert server.http.get("/page.js").headers["content-type"].startswith("text/javascript")
    for path in ("/.hidden", "/notes.md", "/../conftest.py"):
        assert server.http.get(path).status_code == 404
