"""gap-export beside what its users would take instead: one checkpoint, one request, one machine, in turn. See README.md.

    python bench/peers/run.py [--model 135m|shapes] [--peers NAME,...] [--rounds N] [--new-tokens N] [--threads N] [--label TEXT]

Every peer is a process; round after round each answers the same request, in an order drawn anew. The last line printed is the record, also stored in
bench/results/peers.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import environment  # noqa: E402
import harness  # noqa: E402
import ours  # noqa: E402
from harness import LLAVA_135M, ensure_checkpoint  # noqa: E402

from gap_export.evaluation.latency.measure import ratio  # noqa: E402

SHAPES = HERE.parents[1] / "gap_export" / "checkpoint" / "assets" / "llava-shapes"
BUNDLE = "BUNDLE"
"""Stands for an unpruned bundle of ours: the tower of peers that export none."""
PEERS: dict[str, list[str]] = {
    "gap@0.25": ["ours.py", "0.25", "gap", "fp32"],
    "shifted@0.25": ["ours.py", "0.25", "shifted", "fp32"],
    "ours@1.0": ["ours.py", "1.0", "gap", "fp32"],
    "transformers eager": ["transformers_peer.py", "eager"],
    "transformers sdpa": ["transformers_peer.py", "sdpa"],
    "transformers compile": ["transformers_peer.py", "compile"],
    "transformers exporter": ["exported_decoder_peer.py", "transformers", BUNDLE],
    "mobius": ["exported_decoder_peer.py", "mobius", BUNDLE],
    "openvino": ["openvino_peer.py", "fp32"],
    "llama.cpp": ["llama_cpp_peer.py", "f32", BUNDLE],
}
"""Name -> script and its own arguments."""
BY_CHOICE: dict[str, list[str]] = {
    "ours int8@1.0": ["ours.py", "1.0", "gap", "int8"],
    "ours int8@0.25": ["ours.py", "0.25", "gap", "int8"],
    "openvino default": ["openvino_peer.py", "default"],
    "llama.cpp q8_0": ["llama_cpp_peer.py", "q8_0", BUNDLE],
}
"""Not in fp32: run when they are named."""
ELSEWHERE = ("mobius", "openvino", "openvino default", "llama.cpp", "llama.cpp q8_0")
"""In the environment that environment.py makes."""
OURS = ("gap@0.25", "shifted@0.25", "ours@1.0", "ours int8@1.0", "ours int8@0.25")
BASE = "ours@1.0"
"""What others are compared with at an equal number of tokens."""


said_last: dict[str, deque[str]] = {}
"""Name of a peer -> the last lines of its standard error."""


@dataclass
class Peer:
    """A process that answers."""

    name: str
    process: subprocess.Popen[str]
    facts: dict[str, Any]

    def ask(self, line: str = "go") -> dict[str, Any]:
        """One line in, one line out."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return _line_of(self.process, self.name)


def main() -> int:
    parser = harness.parser_of(__doc__, scratch=True)
    parser.add_argument(
        "--peers", default=",".join(PEERS), help=f"names, separated by commas; also {', '.join(BY_CHOICE)}"
    )
    parser.add_argument("--model", choices=("135m", "shapes"), default="135m")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    console = Console(stderr=True)
    names = options.peers.split(",")
    _require(names, options.scratch)
    if options.model == "shapes":
        checkpoint = Path(shutil.copytree(SHAPES, options.scratch / SHAPES.name, dirs_exist_ok=True))
    else:
        checkpoint, _ = ensure_checkpoint(options.scratch / "llava-135m", LLAVA_135M)
    peers = []
    try:
        if any(BUNDLE in (PEERS | BY_CHOICE)[name] for name in names):
            console.print("building an unpruned bundle")
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as builder:
                whole = str(options.scratch / "whole")
                builder.submit(ours.build, str(checkpoint), whole, 1.0, "gap", "fp32").result()
        for name in names:
            console.print(f"starting {name}")
            peers.append(_started(name, checkpoint, options))
        order, samples = np.random.default_rng(0), {peer.name: [] for peer in peers}
        for number in track(range(-3, options.rounds), "answering", console=console):
            for place in order.permutation(len(peers)):
                row = peers[place].ask()
                if number >= 0:
                    samples[peers[place].name].append(row)
        for peer in peers:
            peer.facts["peak_rss_bytes"] = peer.ask("stop")["peak_rss_bytes"]
            peer.process.wait(timeout=60)  # it removes what it exported
    finally:
        for peer in peers:
            peer.process.kill()
    rows = {peer.name: {**peer.facts, **_figures(samples[peer.name])} for peer in peers}
    ratios = {
        f"{one} / {other}": {
            quantity: _ratio(samples[one], samples[other], quantity) for quantity in ("ttft_ms", "tpot_ms")
        }
        for one in rows
        for other in rows
        if one != other and other in OURS and (one not in OURS or other in (BASE, "shifted@0.25"))
    }
    _print(rows, ratios)
    tokens = {name: samples[name][0]["tokens"] for name in rows}
    measured = {
        "rounds": options.rounds,
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "rows": rows,
        "ratios": ratios,
        "same_tokens_as_ours": {name: made == tokens.get(BASE) for name, made in tokens.items()},
    }
    return harness.finish(
        "peers" if options.model == "135m" else "peers_shapes", measured, label=options.label, ok=True
    )


def _started(name: str, checkpoint: Path, options: argparse.Namespace) -> Peer:
    script, *arguments = (PEERS | BY_CHOICE)[name]
    arguments = [str(options.scratch / "whole") if each == BUNDLE else each for each in arguments]
    command = [
        str(environment.python_of(options.scratch)) if name in ELSEWHERE else sys.executable,
        str(HERE / script),
        str(checkpoint),
        str(options.threads),
        str(options.new_tokens),
    ]
    surroundings = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=surroundings,
    )
    # Exporters talk a lot; what they said last is kept for the case that they end.
    said: deque[str] = deque(maxlen=12)
    assert process.stderr is not None
    Thread(target=said.extend, args=(process.stderr,), daemon=True).start()
    said_last[name] = said
    facts = _line_of(process, name)
    facts.pop("ready")
    return Peer(name, process, facts)


def _line_of(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    assert process.stdout is not None
    while line := process.stdout.readline():
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    code = process.wait()
    raise SystemExit(f"{name} ended with exit code {code}:\n{''.join(said_last[name])}")


def _require(names: list[str], scratch: Path) -> None:
    unknown = [name for name in names if name not in PEERS | BY_CHOICE]
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: no such peer; there are {', '.join(PEERS | BY_CHOICE)}")
    missing = [name for name in names if name in ELSEWHERE]
    if missing and not environment.python_of(scratch).exists():
        raise SystemExit(
            f"{', '.join(missing)} need an environment of their own: run `python bench/peers/environment.py`, "
            "or name others with --peers"
        )


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    figures = {}
    for quantity in ("ttft_ms", "tpot_ms"):
        values = [row[quantity] for row in rows]
        p50, p90 = np.percentile(values, (50, 90))
        figures[quantity] = {"p50": round(float(p50), 3), "p90": round(float(p90), 3)}
    steps = np.median([row["steps_ms"] for row in rows], axis=0)
    half = len(steps) // 2
    figures["late_over_early_steps"] = round(float(np.median(steps[half:]) / np.median(steps[:half])), 4)
    return figures


def _ratio(one: list[dict[str, Any]], other: list[dict[str, Any]], quantity: str) -> list[float]:
    """[ratio of medians, low, high]: 95 % of resampled rounds, drawn in pairs."""
    first, second = (np.array([row[quantity] for row in rows]) for rows in (one, other))
    found = ratio("one", "other", quantity, first, second)
    return [found.ratio, found.low, found.high]


def _print(rows: dict[str, Any], ratios: dict[str, Any]) -> None:
    console = Console(width=120)
    table = Table("peer", "TTFT ms (p90)", "TPOT ms (p90)", "peak MB", "export s", "export MB", "written MB")
    for name, row in rows.items():
        spans = [f"{row[q]['p50']:.1f} ({row[q]['p90']:.1f})" for q in ("ttft_ms", "tpot_ms")]
        export = [row.get("export_s"), row.get("export_peak_rss_bytes"), row.get("written_bytes")]
        units = (1, 1e6, 1e6)
        cells = ["-" if v is None else f"{v / unit:.1f}" for v, unit in zip(export, units, strict=True)]
        table.add_row(name, *spans, f"{row['peak_rss_bytes'] / 1e6:.0f}", *cells)
    console.print(table)
    for name, quantities in ratios.items():
        words = ", ".join(
            f"{q[:4].upper()} {v[0]:.2f} ({v[1]:.2f} to {v[2]:.2f})" for q, v in quantities.items()
        )
        console.print(f"{name}: {words}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
