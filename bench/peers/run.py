"""gap-export beside what its users would take instead: one checkpoint, one request, one machine, in turn. See README.md.

    python bench/peers/run.py [--model 135m|shapes] [--part fp32|best|both] [--peers NAME,...] [--rounds N] [--new-tokens N] [--threads N] [--label TEXT]

Every mode of a part is a process; round after round each answers the same request, in an order drawn anew. The exit code is 0 when all targets were met.
The last line printed is the record, also stored in bench/results/peers.json (peers_shapes.json).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
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
from modes import BUNDLE, PARTS, Mode, losses, skipped  # noqa: E402
from targets import (  # noqa: E402
    MOST_KL,
    QUANTITIES,
    Part,
    Row,
    Span,
    Target,
    counted,
    interval,
    targets_of,
)

from gap_export.environment import cpu_name  # noqa: E402

SHAPES = HERE.parents[1] / "gap_export" / "checkpoint" / "assets" / "llava-shapes"
WARM_UP = 3
REFERENCE = "ours@1.0"
"""What others' tokens are compared with, where it runs."""


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
    parser.add_argument("--part", choices=(*PARTS, "both"), default="both")
    names = sorted({mode.name for modes in PARTS.values() for mode in modes})
    parser.add_argument("--peers", help=f"these alone, separated by commas: {', '.join(names)}")
    parser.add_argument("--model", choices=("135m", "shapes"), default="135m")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.rounds < 1 or options.new_tokens < 2:
        parser.error("--rounds must be at least 1, and --new-tokens 2")
    console = Console(stderr=True)
    flags = harness.processor_flags()
    chosen = _chosen(list(PARTS) if options.part == "both" else [options.part], options.peers, names)
    left_out = {part: skipped(modes, flags) for part, modes in chosen.items()}
    running = {
        part: [mode for mode in modes if mode.name not in left_out[part]] for part, modes in chosen.items()
    }
    real_weights = json.loads((harness.RESULTS / "real_weights.json").read_text())
    kl = {part: losses(modes, real_weights) for part, modes in running.items()}
    _require([mode for modes in running.values() for mode in modes], options.scratch, flags)
    if options.model == "shapes":
        checkpoint = Path(shutil.copytree(SHAPES, options.scratch / SHAPES.name, dirs_exist_ok=True))
    else:
        checkpoint, _ = ensure_checkpoint(options.scratch / "llava-135m", LLAVA_135M)
    if any(BUNDLE in mode.command for modes in running.values() for mode in modes):
        console.print("building an unpruned bundle")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as builder:
            whole = str(options.scratch / "whole")
            builder.submit(ours.export, str(checkpoint), whole, 1.0, "gap", "fp32").result()
    name = "peers" if options.model == "135m" else "peers_shapes"
    asked = {"rounds": options.rounds, "new_tokens": options.new_tokens, "threads": options.threads}
    parts = _measured_before(name, asked)
    for part, modes in running.items():
        parts[part] = _measured(part, modes, kl[part], left_out[part], checkpoint, options, console)
        _print(part, parts[part])
    measured = {
        **asked,
        "most_kl": MOST_KL,
        "parts": {part: found.model_dump(exclude_none=True) for part, found in parts.items()},
    }
    met = all(target.met for found in parts.values() for target in found.targets)
    return harness.finish(name, measured, label=options.label, ok=met)


def _measured_before(name: str, asked: dict[str, int]) -> dict[str, Part]:
    """Parts in the record, where the same was asked on the same processor: one part may be measured after the other."""
    path = harness.RESULTS / f"{name}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    same = asked.items() <= record.items() and record["machine"]["cpu"] == cpu_name()
    parts = record.get("parts", {}) if same else {}
    return {part: Part.model_validate(found) for part, found in parts.items()}


def _chosen(parts: list[str], peers: str | None, known: list[str]) -> dict[str, list[Mode]]:
    """Modes of every part, all or those that are named."""
    names = known if peers is None else peers.split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{', '.join(unknown)}: no such peer; there are {', '.join(known)}")
    chosen = {part: [mode for mode in PARTS[part] if mode.name in names] for part in parts}
    if empty := [part for part, modes in chosen.items() if not modes]:
        raise SystemExit(f"none of --peers answers in part {', '.join(empty)}: choose another --part")
    return chosen


def _measured(
    part: str,
    modes: list[Mode],
    kl: dict[str, float],
    left_out: dict[str, str],
    checkpoint: Path,
    options: argparse.Namespace,
    console: Console,
) -> Part:
    """Start all modes of a part, let them answer in turns, and stop them."""
    peers: list[Peer] = []
    rows: dict[str, list[dict[str, Any]]] = {mode.name: [] for mode in modes}
    try:
        for mode in modes:
            console.print(f"{part}: starting {mode.name}")
            peers.append(_started(mode, checkpoint, options))
        order = np.random.default_rng(0)
        for number in track(range(-WARM_UP, options.rounds), f"{part}: answering", console=console):
            for place in order.permutation(len(peers)):
                row = peers[place].ask()
                if number >= 0:
                    rows[peers[place].name].append(row)
        for peer in peers:
            peer.facts["peak_rss_bytes"] = peer.ask("stop")["peak_rss_bytes"]
            peer.process.wait(timeout=60)  # it removes what it exported
    finally:
        for peer in peers:
            peer.process.kill()
    samples = {
        name: {quantity: [row[quantity] for row in found] for quantity in QUANTITIES}
        for name, found in rows.items()
    }
    facts = {peer.name: peer.facts for peer in peers}
    tokens = {name: found[0]["tokens"] for name, found in rows.items()}
    reference = tokens.get(REFERENCE, tokens.get("ours fp32@1.0"))
    return Part(
        rows={name: Row(**facts[name], **_figures(found), kl=kl[name]) for name, found in rows.items()},
        counted=counted(kl),
        skipped=left_out,
        same_tokens_as_ours={name: made == reference for name, made in tokens.items()},
        ratios=_ratios(modes, samples),
        targets=targets_of(
            part, modes, kl, samples, lambda name: facts[name].get("first_token_flops"), options.new_tokens
        ),
    )


def _ratios(modes: list[Mode], samples: dict[str, Any]) -> dict[str, Any]:
    """Of every peer and every one of ours, and among ours those that differ in `keep` or in positions alone from the first unpruned one."""
    base = next((mode.name for mode in modes if mode.ours and mode.keep == 1.0), None)
    pairs = [(one, other) for one in modes for other in modes if other.ours and one.name != other.name]
    return {
        f"{one.name} / {other.name}": {
            quantity: interval(samples[one.name][quantity], samples[other.name][quantity])
            for quantity in QUANTITIES
        }
        for one, other in pairs
        if not one.ours or other.name in (base, "shifted@0.25")
    }


def _started(mode: Mode, checkpoint: Path, options: argparse.Namespace) -> Peer:
    name, (script, *arguments) = mode.name, mode.command
    arguments = [str(options.scratch / "whole") if each == BUNDLE else each for each in arguments]
    command = [
        str(environment.python_of(options.scratch)) if mode.elsewhere else sys.executable,
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
    if code == -signal.SIGILL:
        raise SystemExit(
            f"{name} met an instruction that this processor does not have: compile it here, with `python bench/peers/environment.py`"
        )
    raise SystemExit(f"{name} ended with exit code {code}:\n{''.join(said_last[name])}")


def _require(modes: list[Mode], scratch: Path, flags: frozenset[str]) -> None:
    elsewhere = sorted({mode.name for mode in modes if mode.elsewhere})
    if elsewhere and not environment.python_of(scratch).exists():
        raise SystemExit(
            f"{', '.join(elsewhere)} need an environment of their own: run `python bench/peers/environment.py`, "
            "or name others with --peers"
        )
    if any(name.startswith("llama.cpp") for name in elsewhere):
        lacking = environment.instructions_lacking(environment.system_info(scratch), flags)
        if lacking:
            raise SystemExit(
                f"llama.cpp was compiled with {', '.join(lacking)}, which this processor does not have: "
                "run `python bench/peers/environment.py`, which compiles it here"
            )


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for quantity in QUANTITIES:
        p50, p90 = np.percentile([row[quantity] for row in rows], (50, 90))
        figures[quantity] = Span(p50=round(float(p50), 3), p90=round(float(p90), 3))
    steps = np.median([row["steps_ms"] for row in rows], axis=0)
    half = len(steps) // 2
    late, early = np.median(steps[half:]), np.median(steps[:half]) if half else np.median(steps)
    figures["late_over_early_steps"] = round(float(late / early), 4)
    return figures


def _print(part: str, found: Part) -> None:
    console = Console(width=130)
    console.print(_table(f"{part}: KL from fp32 at most {MOST_KL}", found, found.counted))
    others = [name for name in found.rows if name not in found.counted]
    if others:
        console.print(_table(f"{part}: further from fp32, and nobody's best", found, others))
    for name, why in found.skipped.items():
        console.print(f"{name} did not run: {why}", highlight=False)
    for name, quantities in found.ratios.items():
        words = ", ".join(
            f"{q[:4].upper()} {v[0]:.2f} ({v[1]:.2f} to {v[2]:.2f})" for q, v in quantities.items()
        )
        console.print(f"{name}: {words}", highlight=False)
    for target in found.targets:
        console.print(_in_words(target), highlight=False)


def _in_words(target: Target) -> str:
    return (
        f"{'met' if target.met else 'MISSED'}: {target.name}, {target.quantity[:4].upper()}, {target.peer} / {target.ours}: "
        f"{target.ratio:.2f} ({target.low:.2f} to {target.high:.2f}), needed {target.at_least:.2f} and {target.low_at_least:.2f}"
    )


def _table(title: str, found: Part, names: list[str]) -> Table:
    table = Table(
        "",
        "TTFT ms (p90)",
        "TPOT ms (p90)",
        "KL",
        "peak MB",
        "export s",
        "export MB",
        "written MB",
        title=title,
    )
    for name in names:
        row = found.rows[name]
        spans = [f"{span.p50:.1f} ({span.p90:.1f})" for span in (row.ttft_ms, row.tpot_ms)]
        export = (row.export_s, row.export_peak_rss_bytes, row.written_bytes)
        cells = [
            "-" if value is None else f"{value / unit:.1f}"
            for value, unit in zip(export, (1, 1e6, 1e6), strict=True)
        ]
        table.add_row(name, *spans, f"{row.kl:.4f}", f"{row.peak_rss_bytes / 1e6:.0f}", *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
