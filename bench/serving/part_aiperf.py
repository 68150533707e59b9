"""AIPerf, NVIDIA's client, against `/v1/infer`: what it says of the server in its own words. It lives in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from serving.process import cores, pinned
from serving.setup import Outcome, Setup, Target

REQUESTS, CONCURRENCY, SECONDS = 400, 8, 300
LABELS = ["the red circle"]
_METRICS = (
    "request_count",
    "request_error_rate",
    "request_throughput",
    "request_latency",
    "image_latency",
    "image_throughput",
    "effective_concurrency",
    "benchmark_duration",
)
_STATISTICS = ("unit", "avg", "min", "p50", "p90", "p99", "max", "std")


def aiperf(setup: Setup) -> Outcome:
    """Profile once.

    Raises:
        SystemExit: the program was not named, or fails.
    """
    if setup.aiperf is None:
        raise SystemExit("name the program: --aiperf /path/to/environment/bin/aiperf")
    folder = setup.scratch / "aiperf"
    shutil.rmtree(folder, ignore_errors=True)
    both = cores()
    with setup.server() as server:
        server.wait_ready()
        command = command_of(setup.aiperf, server.port, folder)
        with pinned(None if both is None else both[1]):
            subprocess.run(
                command,
                check=True,
                timeout=SECONDS,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
    figures = figures_of(json.loads((folder / "profile_export_aiperf.json").read_text()))
    version = subprocess.run(
        [str(setup.aiperf), "--version"], check=True, capture_output=True, text=True
    ).stdout
    return Outcome(
        {"version": version.strip(), "command": command[1:], "figures": figures},
        (
            Target("requests that failed, %", figures["request_error_rate"]["avg"], 0),
            Target("requests", figures["request_count"]["avg"], REQUESTS, least=True),
        ),
    )


def command_of(program: Path, port: int, folder: Path) -> list[str]:
    """What is run.

    Args:
        program: AIPerf's.
        port: of the server.
        folder: for what it writes.
    """
    options = {
        "--model": "shapes",
        "--url": f"http://127.0.0.1:{port}",
        "--endpoint-type": "image-retrieval",
        "--custom-endpoint": "/v1/infer",
        "--extra-inputs": json.dumps({"labels": LABELS}),
        "--image-width-mean": "96",
        "--image-height-mean": "96",
        "--image-format": "png",
        "--image-batch-size": "1",
        "--request-count": str(REQUESTS),
        "--warmup-request-count": "20",
        "--concurrency": str(CONCURRENCY),
        "--ui": "none",
        "--output-artifact-dir": str(folder),
    }
    return [str(program), "profile", *(word for option in options.items() for word in option)]


def figures_of(exported: dict[str, Any]) -> dict[str, Any]:
    """Of its record, what is kept: metric -> its statistics.

    Args:
        exported: `profile_export_aiperf.json`.
    """
    return {
        name: {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in exported[name].items()
            if key in _STATISTICS
        }
        for name in _METRICS
        if name in exported
    }
