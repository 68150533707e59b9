"""`gap-export bench` as a process: several backends, shares and batches take turns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gap_export.bundle.folder import Bundle

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "gap_export", "bench"]


def bench(*arguments: object, code: int = 0) -> str:
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def test_everyone_takes_turns(tiny_bundle: Callable[..., Bundle]) -> None:
    folder: Path = tiny_bundle(pruner="divprune", keep="0.1:0.3:1.0").folder
    options = ["--requests", 2, "--new-tokens", 2, "--threads", 1, "--json"]
    printed = bench(
        folder, "--against", "torch", "--keep", "1.0,0.3", "--batch", "1,2", "--no-memory", *options
    )
    record = json.loads(printed.splitlines()[-1])
    rows = {(row["backend"], row["prompt_slots"], row["batch"]) for row in record["rows"]}
    assert {(backend, batch) for backend, _, batch in rows} == {
        (backend, batch) for backend in ("onnxruntime", "torch") for batch in (1, 2)
    }
    assert {(row["keep"], row["kept"]) for row in record["rows"]} == {(1.0, 36), (0.3, 11)}
    assert {row["prompt_slots"] - row["kept"] for row in record["rows"]} == {
        record["rows"][0]["prompt_slots"] - 36
    }
    assert len({row["name"] for row in record["rows"]}) == len(record["rows"]) == 8
    assert record["device"]
    assert record["roofline"]["flops_per_second"] > 0
    wanted = {"backend", "keep", "batch", "ttft_ms", "tpot_ms", "peak_rss_bytes", "roofline_fraction", "cost"}
    assert all(wanted <= row.keys() for row in record["rows"])
    assert json.loads((folder / "reports" / "bench.json").read_text()) == record
    assert (folder / "reports" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_memory_of_each(tiny_bundle: Callable[..., Bundle]) -> None:
    printed = bench(tiny_bundle().folder, "--requests", 1, "--new-tokens", 2, "--threads", 1, "--json")
    (row,) = json.loads(printed.splitlines()[-1])["rows"]
    assert 2e7 < row["peak_rss_bytes"] < 2e9
    words = bench(tiny_bundle().folder, "--requests", 1, "--new-tokens", 2, "--threads", 1, "--no-memory")
    assert "this machine at its best" in words
    assert "requests/s" in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "one"], "is not a whole number from 1"),
        (["--keep", "half"], "is not a number above 0"),
        (["--keep", "0.5"], "cannot be chosen"),
        (["--keep", "1.0", "--new-tokens", "12"], "cannot be chosen"),  # and not: the cache is too short
        (["--backend", "jax"], "unknown backend"),
    ],
)
def test_what_cannot_work(tiny_bundle: Callable[..., Bundle], arguments: list[str], words: str) -> None:
    message = bench(tiny_bundle().folder, *arguments, code=2)
    assert words in message
    assert "hint" in message
