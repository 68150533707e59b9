"""Checkpoints by name: bundled, local, and from a hub, which is a real server of a few files here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gap_export.checkpoint.hub import bundled, resolve
from gap_export.errors import CheckpointError

COMMIT = "a" * 40
TOKEN = "hf_do_not_show_me"
FILES = {
    "config.json": b'{"model_type": "llava"}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(256))
    * 98304,  # more than two of the pieces that downloads are stored in
    "pytorch_model.bin": b"pickled",
    "README.md": b"words",
}


def test_references(tmp_path: Path) -> None:
    assert resolve("bundled:llava-shapes") == bundled("llava-shapes")
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("./nowhere/at all") == Path("nowhere/at all")
    assert resolve("/no/where") == Path("/no/where")


def test_a_hub_checkpoint_that_cannot_be_had_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="could not be fetched") as caught:
        resolve("nobody/nothing")
    assert caught.value.subject == "nobody/nothing"
    assert "pass the folder" in caught.value.hint


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs. Every large file breaks off once, half way."""

    protocol_version = "HTTP/1.1"
    broken: ClassVar[set[str]] = set()
    asked: ClassVar[list[tuple[str, str | None]]] = []
    files: ClassVar[dict[str, bytes]] = FILES

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/owner/tiny"):
            if "/revision/" in path and not path.endswith(("/main", COMMIT)):
                return self._refuse(404, "RevisionNotFound")
            listing = [
                {
                    "rfilename": name,
                    "path": name,
                    "type": "file",
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for name, content in self.files.items()
            ]
            if "/tree/" in path:
                return self._send(json.dumps(listing).encode(), {})
            return self._send(
                json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": listing}).encode(), {}
            )
        if "owner/gated" in path:
            return self._refuse(403, "GatedRepo")
        if not path.startswith("/owner/tiny/resolve/"):
            return self._refuse(401, "RepoNotFound")
        name = path.rpartition("/")[2]
        content = self.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": json.dumps(hashlib.sha1(content).hexdigest())}
        if not body:
            return self._send(content, headers, body=False)
        span = self.headers.get("Range")
        self.asked.append((name, span))
        start = int(span.removeprefix("bytes=").partition("-")[0]) if span else 0
        if len(content) > 10**5 and name not in self.broken:
            self.broken.add(name)
            return self._send(content, headers, sent=len(content) // 2)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(content[start:], headers, status=206 if start else 200)

    def _send(
        self,
        content: bytes,
        headers: dict[str, str],
        *,
        status: int = 200,
        body: bool = True,
        sent: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:sent])
        if sent is not None:
            self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.broken, Hub.asked, Hub.files = set(), [], FILES
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


SCRIPT = """
import sys
from gap_export.errors import GapExportError
from gap_export.checkpoint.hub import resolve
from gap_export.progress import Stages
words = []
try:
    print("FOLDER", resolve(sys.argv[1], Stages(words.append)))
except GapExportError as error:
    print("REFUSED", error)
print("WORDS", words[-1:])
"""


def fetch(reference: str, endpoint: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the library reads its settings once."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        **more,
    }
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, reference],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_a_download_that_breaks_off_goes_on(hub: str, tmp_path: Path) -> None:
    done = fetch("owner/tiny", hub, tmp_path)
    folder = Path(next(line for line in done.stdout.splitlines() if line.startswith("FOLDER")).split()[1])
    fetched = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert fetched == {name: FILES[name] for name in ("config.json", "tokenizer.json", "model.safetensors")}
    spans = [span for name, span in Hub.asked if name == "model.safetensors"]
    assert spans[0] is None
    assert spans[1].startswith("bytes=")
    assert "fetching owner/tiny" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    asked = len(Hub.asked)
    assert "FOLDER" in fetch("owner/tiny", "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1").stdout
    assert len(Hub.asked) == asked, "offline, the cache is enough"


def test_archives_where_there_is_nothing_else(hub: str, tmp_path: Path) -> None:
    Hub.files = {name: content for name, content in FILES.items() if not name.endswith(".safetensors")}
    done = fetch("owner/tiny", hub, tmp_path)
    folder = Path(next(line for line in done.stdout.splitlines() if line.startswith("FOLDER")).split()[1])
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "pytorch_model.bin"}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("owner/missing", "is not on the hub, or is private"),
        ("owner/gated", "is gated"),
        ("owner/tiny@nowhere", "has no revision 'nowhere'"),
    ],
)
def test_what_the_hub_refuses(reference: str, message: str, hub: str, tmp_path: Path) -> None:
    done = fetch(reference, hub, tmp_path)
    assert message in done.stdout
    assert TOKEN not in done.stdout + done.stderr


def test_without_a_network(tmp_path: Path) -> None:
    done = fetch("owner/tiny", "http://127.0.0.1:9", tmp_path)
    assert "could not be fetched" in done.stdout
    assert "--checkpoint FOLDER" in done.stdout
    assert "--weights random" in done.stdout
