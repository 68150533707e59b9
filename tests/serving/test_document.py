"""`docs/serving.md` and its programs, against a server that is started as it says; what needs other machines is only read."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.serving.http.errors import _CODES
from tests.serving.http.serving_http import data_url

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"

pytestmark = pytest.mark.slow


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[str]:
    return re.findall(rf"^    (gap-export {name} .*)$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def beside(shapes_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page has its readers stand: beside `out/shapes` and an image."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "out").mkdir()
    (folder / "out" / "shapes").symlink_to(shapes_bundle.folder)
    shutil.copy(ROOT / "docs" / "images" / "scene.png", folder)
    return folder


@pytest.fixture(scope="module")
def address(beside: Path) -> Iterator[str]:
    """Of a server that was started by the page's own command, on another port; at the end it is told to stop, and does."""
    command = commands("serve")[0].replace("--port 8000", "--port 0 --threads 1")
    called = [sys.executable, "-m", "gap_export", *shlex.split(command)[1:]]
    with subprocess.Popen(
        called, cwd=beside, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found is not None
            transport = httpx.HTTPTransport(retries=3)
            with httpx.Client(transport=transport, base_url=found[0]) as client:
                while client.get("/v1/health/ready").status_code != 200:
                    assert server.poll() is None
                    time.sleep(0.05)
            yield found[0]
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
        finally:
            server.kill()


def done(command: list[str], beside: Path) -> str:
    finished = subprocess.run(command, cwd=beside, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_commands_for_the_shell(address: str, beside: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    asked = [block.replace(ADDRESS, address) for block in blocks("sh") if "curl" in block]
    assert len(asked) == 3
    path = f"PATH={Path(sys.executable).parent}:$PATH"
    ground, infer, receipt = (
        done(["bash", "-c", f"{path}; set -o pipefail; {block}"], beside) for block in asked
    )
    assert '"frame":"image as displayed"' in ground
    assert '"label":"the yellow circle"' in ground
    assert '"confidence":1.0' in infer
    assert receipt == ""
    check, check_conversation = commands("check-receipt")
    said = done([sys.executable, "-m", "gap_export", *shlex.split(check)[1:]], beside)
    assert "the receipt agrees" in said
    image = data_url(Image.open(beside / "scene.png"))
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": "where is the yellow circle?"},
    ]
    body = {"model": "shapes", "messages": [{"role": "user", "content": content}], "gap": {"receipt": True}}
    (beside / "body.json").write_text(json.dumps(body))
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
    (beside / "receipt.json").write_text(json.dumps(answer["gap"]["receipt"]))
    said = done([sys.executable, "-m", "gap_export", *shlex.split(check_conversation)[1:]], beside)
    assert "the receipt agrees" in said


def test_the_program_of_the_official_client(address: str, beside: Path) -> None:
    pytest.importorskip("openai")
    (program,) = [block for block in blocks("python") if "from openai" in block]
    whole, _, streamed = done([sys.executable, "-c", program.replace(ADDRESS, address)], beside).partition(
        "\n"
    )
    assert whole.startswith("[")
    assert "visual_tokens_before_pruning" in whole
    assert streamed.startswith("[")


def test_the_program_without_packages(address: str, beside: Path) -> None:
    program = str(ROOT / "docs" / "ask_a_server.py")
    said = done([sys.executable, "-I", "-S", program, address, "scene.png", "the yellow circle"], beside)
    assert re.fullmatch(r"\[\[(\d+\.?\d*(, )?){4}\]\]\n", said)
    refused = subprocess.run(
        [sys.executable, program, address, "scene.png", ""],
        cwd=beside,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("expression: ")


def test_the_deployment_of_ray_serve_names_what_there_is() -> None:
    """Ray Serve need not be installed: its program is read, and everything of this package that it names is looked up."""
    (program,) = [block for block in blocks("python") if "ray import serve" in block]
    tree = ast.parse(program)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module is not None
            and node.module.startswith("gap_export")
        ):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_pod_asks_for_paths_that_there_are(address: str) -> None:
    (pod,) = [yaml.safe_load(block) for block in blocks("yaml")]
    (container,) = pod["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert httpx.get(f"{address}{container[probe]['httpGet']['path']}").status_code == 200
    for path in re.findall(r"`(/[a-z0-9/]+)`(?=[,| ])", PAGE.partition("### Several replicas")[0]):
        if "health" in path or path in ("/ping", "/healthz"):
            assert httpx.get(f"{address}{path}").status_code == 200, path


def test_the_limits_are_the_defaults() -> None:
    import typer.main

    from gap_export.cli import app

    options: dict[str, Any] = {
        option: parameter.default
        for parameter in typer.main.get_command(app).commands["serve"].params  # type: ignore[attr-defined]
        for option in parameter.opts
    }
    rows = re.findall(r"^\| [^|]+ \| `(--[a-z-]+)` \| ([\d.]+)", PAGE, re.MULTILINE)
    assert len(rows) == 9
    for option, value in rows:
        assert option in options
        if option != "--queue":
            assert float(options[option]) == float(value), option


def test_every_status_is_explained() -> None:
    table = PAGE.partition("## What is refused")[2].partition("| limit |")[0]
    assert set(map(int, re.findall(r"\b[45]\d\d\b", table))) == set(_CODES)


@pytest.mark.skipif(find_spec("gap_export.serving.metrics") is None, reason="nothing is counted yet")
def test_every_metric_is_explained(address: str) -> None:
    table = set(re.findall(r"^\| `(gap_[a-z_]+)` \|", PAGE, re.MULTILINE))
    assert len(table) > 10
    told = httpx.get(f"{address}/metrics")
    assert told.status_code == 200
    assert table == set(re.findall(r"^# HELP (gap_[a-z_]+) ", told.text, re.MULTILINE))
