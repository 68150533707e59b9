"""`gap-export serve` as a process: its address, ready after its check, finished and 0 at SIGTERM; and where it does not begin."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gap_export.bundle.folder import Bundle
from gap_export.errors import InputError
from gap_export.serving.server import ServerOptions, is_loopback, listen
from tests.serving.http.serving_http import SECONDS, wait_for

COMMAND = [sys.executable, "-m", "gap_export", "serve"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def served(shapes_bundle: Bundle, key_file: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and its address."""
    process = subprocess.Popen(
        [*COMMAND, str(shapes_bundle.folder), "--port", "0", "--threads", "1", "--api-keys", str(key_file), "--name", "finder"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"serving finder at (http://127\.0\.0\.1:\d+)\n", line)
    assert found, (line, process.stderr and process.stderr.read())
    yield process, found[1]
    process.kill()
    process.wait()


def test_a_process_serves_until_it_is_told_to_stop(
    served: tuple[subprocess.Popen[str], str], scene_url: str
) -> None:
    process, url = served
    headers = {"Authorization": "Bearer first-key-0123456789"}
    with httpx.Client(base_url=url, headers=headers, timeout=SECONDS) as http:
        wait_for(lambda: http.get("/v1/health/ready").status_code == 200, "it is ready")
        answer = http.post(
            "/v1/ground", json={"image": scene_url, "expression": "the red circle", "receipt": True}
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["results"][0]["receipt"]["expression"] == "the red circle"
        assert http.get("/v1/models", headers={"Authorization": "Bearer none"}).status_code == 401
        assert http.get("/v1/models").json()["data"][0]["id"] == "finder"
        assert "gap_request_success_total{" in http.get("/metrics").text
        process.send_signal(signal.SIGTERM)
        _, messages = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, messages
    assert "golden request" in messages
    assert "POST /v1/ground 200 " in messages
    assert "Traceback" not in messages


def test_a_process_that_is_told_to_stop_before_it_is_ready_has_not_failed(
    served: tuple[subprocess.Popen[str], str],
) -> None:
    process, _ = served
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, messages


@pytest.mark.long
def test_a_process_that_is_told_twice_ends_after_a_step(shapes_bundle: Bundle) -> None:
    """Before it is ready: its golden request is given up in the middle."""
    code = """
import sys, time
from gap_export import cli
from gap_export.serving.engine import Engine
step = Engine._step
def slow(engine):
    print("step", file=sys.stderr, flush=True)
    time.sleep(0.5)
    step(engine)
Engine._step = slow
cli.main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(shapes_bundle.folder), "--port", "0", "--threads", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert "step\n" in lines
        process.send_signal(signal.SIGTERM)
        assert "step\n" in lines, "it is finished"
        process.send_signal(signal.SIGTERM)
        left = list(lines)
    assert process.returncode == 0, left
    assert left.count("step\n") <= 1
    assert not [line for line in left if "Traceback" in line]


def refused(*arguments: str, code: str | None = None) -> str:
    command = [*COMMAND, *arguments] if code is None else [sys.executable, "-c", code, "serve", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=SECONDS * 3, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_bundle_without_a_golden_request_is_not_served(shapes_bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shapes_bundle.folder, tmp_path / "bundle"))
    for path in folder.glob("golden*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "golden" in refused(str(folder), "--port", "0")


def test_missing_packages_are_named_with_their_command(shapes_bundle: Bundle) -> None:
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fastapi", "uvicorn", "prometheus_client"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from gap_export import cli
cli.main()
"""
    assert "pip install 'gap-export[serve]'" in refused(str(shapes_bundle.folder), code=code)


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the command says of options that it refuses, without a process of its own."""
    from typer.testing import CliRunner

    from gap_export import cli

    done = CliRunner().invoke(cli.app, ["serve", *arguments])
    assert done.exit_code != 0
    return f"{done.exception} {done.output}"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--host", "0.0.0.0"], "no keys are asked for"),
        (["--host", "::"], "no keys are asked for"),
        (["--host", "no.such.host.invalid"], "is no address of this machine"),
        (["--allow-domain", "http://a.org"], "is not the name of a host"),
        (["--api-keys", "/nowhere"], "cannot be read"),
        (["--adapt", "1.0:0.25"], "recommend"),
        (["--name", "a b"], "is not 1 to 200 characters"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_that_cannot_be(
    arguments: list[str], named: str, shapes_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert named in called(monkeypatch, str(shapes_bundle.folder), "--port", "0", *arguments)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "192.0.2.1")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    with listen(ServerOptions(port=0)) as first, pytest.raises(InputError, match="cannot be listened on"):
        listen(ServerOptions(port=first.getsockname()[1]))
