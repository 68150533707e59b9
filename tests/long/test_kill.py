"""An evaluation that is killed again and again ends as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from gap_export.bundle.folder import Bundle

pytestmark = pytest.mark.long

KILLS = 6


def results(folder: Path) -> list[dict[str, Any]]:
    """All but how long an answer took."""
    (file,) = folder.glob("*results.parquet")
    rows = sorted(parquet.read_table(file).to_pylist(), key=lambda row: row["id"])
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_killed_again_and_again(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(out: str) -> list[str]:
        bundle = str(tiny_bundle().folder)
        return [
            *(sys.executable, "-m", "gap_export", "eval", bundle, "--data", "scenes:3", "--limit", "1200"),
            *("--threads", "1", "--json", "-o", str(tmp_path / out)),
        ]

    done = subprocess.run(command("whole"), env=environment, check=True, capture_output=True, text=True)
    began = time.monotonic()
    for kill in range(KILLS):
        process = subprocess.Popen(
            command("killed"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            process.wait(timeout=2.5 + 0.4 * kill)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
    assert time.monotonic() - began < 120
    last = subprocess.run(command("killed"), env=environment, check=True, capture_output=True, text=True)
    whole, killed = (json.loads(each.stdout.splitlines()[-1]) for each in (done, last))
    assert whole["accuracy"] == killed["accuracy"]
    assert whole["expressions"] == killed["expressions"] == 1200
    assert results(tmp_path / "whole") == results(tmp_path / "killed")
