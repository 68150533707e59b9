"""Requests that mean harm: refused in one clear line or answered, never a failure of the server, and the next client has its answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.runtime.model import Model
from tests.serving.http.payloads import Payload, payloads
from tests.serving.http.serving_http import SECONDS, Running
from tests.serving.http.test_server_process import COMMAND, environment, wait_for

IN_SAMPLE = 12
"""Every so manieth is sent in the short run."""
MORE_MIB = 500
"""Memory of the server over all of it: an image of 40 megapixels is 120 MB, as it is decoded and as it is scaled."""
REQUEST_ERRORS = frozenset({400, 404, 405, 408, 413, 415, 422, 431})


def every(image: Image.Image, expression: str) -> tuple[Payload, ...]:
    made = payloads(image, expression)
    assert len({payload.name for payload in made}) == len(made) >= 80
    return made


def sent(http: httpx.Client, payload: Payload) -> httpx.Response:
    headers = payload.headers or {"Content-Type": "application/json"}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return http.request(payload.method, payload.path, content=payload.body, headers=raw)


def fault_of(payload: Payload, answer: httpx.Response) -> str | None:
    """What is wrong with an answer."""
    if answer.status_code == 503:
        return None if answer.headers.get("retry-after") else "503 without Retry-After"
    if answer.status_code == 200:
        if not payload.accepted:
            return f"is accepted: {answer.text[:200]}"
        return None if answer.json() else "an empty answer"
    if answer.status_code not in REQUEST_ERRORS:
        return f"status {answer.status_code}"
    error = answer.json()["error"]
    if set(error) != {"message", "type", "param", "code"} or not error["message"]:
        return f"error of another form: {error}"
    if not error["message"].isprintable() or len(error["message"]) > 1000:
        return f"not one clear line: {error['message'][:300]!a}"
    return None


def faults_of(
    http: httpx.Client, made: tuple[Payload, ...], known: dict[str, Any], golden: dict[str, Any]
) -> list[str]:
    """Of all payloads, each followed by a request whose answer is known."""
    found = []
    for payload in made:
        try:
            answer = sent(http, payload)
        except httpx.HTTPError as error:
            found.append(f"{payload.name}: no answer: {error!r}")
        else:
            fault = fault_of(payload, answer)
            if fault is not None:
                found.append(f"{payload.name}: {fault}")
        after = http.post("/v1/ground", json=golden).json()["results"][0]
        if after["boxes"] != known["boxes"] or after["raw"] != known["raw"]:
            found.append(f"{payload.name}: afterwards another answer")
    return found


@pytest.fixture
def golden(scene: tuple[Image.Image, str], scene_url: str) -> dict[str, Any]:
    """A request whose answer is known."""
    return {"image": scene_url, "expression": scene[1]}


def known_answer(
    http: httpx.Client, golden: dict[str, Any], alone: Model, image: Image.Image
) -> dict[str, Any]:
    known: dict[str, Any] = http.post("/v1/ground", json=golden).json()["results"][0]
    answer = alone.ground(image, golden["expression"])
    assert [tuple(box["pixels"]) for box in known["boxes"]] == list(answer.boxes)
    return known


def test_a_sample_of_them(
    running: Running, scene: tuple[Image.Image, str], golden: dict[str, Any], shapes_alone: Model
) -> None:
    known = known_answer(running.http, golden, shapes_alone, scene[0])
    assert not faults_of(running.http, every(*scene)[::IN_SAMPLE], known, golden)


@pytest.fixture
def process(shapes_bundle: Bundle) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own, so that its memory is its own."""
    command = [*COMMAND, str(shapes_bundle.folder), "--port", "0", "--threads", "1", "--name", "shapes"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    ) as started:
        assert started.stdout is not None
        yield started, started.stdout.readline().split()[-1]
        started.kill()


def mib(pid: int, name: str) -> int:
    """Of the memory of a process, `VmRSS` or `VmHWM`."""
    (line,) = [row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith(name)]
    return int(line.split()[1]) // 1024


@pytest.mark.long
def test_all_of_them(
    process: tuple[subprocess.Popen[str], str],
    scene: tuple[Image.Image, str],
    golden: dict[str, Any],
    shapes_alone: Model,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, url = process
    with httpx.Client(base_url=url, timeout=SECONDS) as http:
        wait_for(lambda: http.get("/v1/health/ready").status_code == 200, "it is ready")
        known = known_answer(http, golden, shapes_alone, scene[0])
        before = mib(server.pid, "VmRSS")
        made = every(*scene)
        found = faults_of(http, made, known, golden)
        more = mib(server.pid, "VmHWM") - before
    with capsys.disabled():
        print(f"\n{len(made)} payloads, {len(found)} faults, {more} MiB more at the most")
    assert not found
    assert more < MORE_MIB
    assert server.poll() is None


@pytest.mark.long
def test_the_schema_says_what_is_answered(process: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    """Schemathesis makes requests of the OpenAPI document, right and wrong ones, and holds the answers against it; that a text is an image, no schema can say."""
    _, url = process
    with httpx.Client(base_url=url, timeout=SECONDS) as http:
        wait_for(lambda: http.get("/v1/health/ready").status_code == 200, "it is ready")
    har = tmp_path / "requests.har"
    program = str(Path(sys.executable).parent / "schemathesis")
    done = subprocess.run(
        [program, "run", f"{url}/openapi.json", "--exclude-checks", "positive_data_acceptance", "--max-examples", "50", "--seed", "1", "--workers", "1",
         "--request-timeout", "20", "--report-har-path", str(har)],
        cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    entries = json.loads(har.read_text())["log"]["entries"]
    statuses = [entry["response"]["status"] for entry in entries]
    assert len(statuses) > 300
    assert 200 in statuses
    assert not [status for status in statuses if status >= 500 and status != 503]
    assert done.returncode == 0, done.stdout[-4000:]
