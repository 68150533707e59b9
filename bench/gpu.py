"""On a machine with an NVIDIA GPU: what is there, is it right there, and how fast? See README.md.

    python bench/gpu.py [--minutes 8] [--model 7b|135m|shapes] [--precision fp16|bf16] [--parts NAME,...] [--device cpu]

Needs no network. Parts are done in the order of their worth, each in a process of its own; one is begun only if it fits into what is left of the
minutes, and killed if it takes twice its estimate. After each, the record in bench/results/gpu.json is written anew, so that a run that is
killed leaves what was done; what was skipped is in it with the reason. The last line printed is the record.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness
from gpu_schedule import Outcomes, run_parts
from gpu_settings import Settings
from rich.console import Console

from gap_export.files import write_atomically

OUTPUT = harness.RESULTS / "gpu.json"


def main() -> int:
    began = time.monotonic()
    options = parsed()
    settings = Settings(
        model=options.model,
        precision=options.precision,
        device=options.device,
        scratch=options.scratch,
        cases=options.cases,
        rounds=options.rounds,
        new_tokens=options.new_tokens,
    )
    from gpu_parts import THERE, parts_of  # brings torch: seconds, which count

    parts = parts_of(settings)
    if options.parts:
        wanted = {THERE, *options.parts.split(",")}
        if unknown := wanted - {part.name for part in parts}:
            known = ", ".join(part.name for part in parts)
            raise SystemExit(f"no such part: {', '.join(sorted(unknown))}; there are {known}")
        parts = [part for part in parts if part.name in wanted]
    settings.scratch.mkdir(parents=True, exist_ok=True)
    console = Console(width=130)

    def store(outcomes: Outcomes, *, finished: bool = False) -> dict[str, Any]:
        content = record_of(outcomes, settings, options, finished=finished)
        if content["gpu"] is not None:  # a record of nothing would replace one of something
            write_atomically(options.output, json.dumps(content, indent=2) + "\n")
        return content

    outcomes = run_parts(
        parts, settings, 60 * options.minutes - (time.monotonic() - began), store=store, console=console
    )
    content = store(outcomes, finished=True)
    if content["gpu"] is None:
        console.print("There is no NVIDIA GPU that PyTorch sees: nothing was measured.")
    print(json.dumps(content))
    return 0 if content["ok"] else 1


def parsed() -> argparse.Namespace:
    """The options of the command."""
    parser = harness.parser_of(__doc__, scratch=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole run")
    parser.add_argument(
        "--model", choices=("7b", "135m", "shapes"), default="7b", help="whose speed is measured"
    )
    parser.add_argument("--precision", choices=("fp16", "bf16"), default="fp16", help="of that model")
    parser.add_argument("--rounds", type=int, default=Settings.rounds)
    parser.add_argument("--new-tokens", type=int, default=Settings.new_tokens)
    parser.add_argument(
        "--cases", type=int, default=Settings.cases, help="held-out cases of the bundled model"
    )
    parser.add_argument("--parts", default="", help="names, separated by commas; all by default")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script itself"
    )
    parser.add_argument("--output", type=Path, default=None, help=f"the record; {OUTPUT.name} by default")
    options = parser.parse_args()
    if options.device == "cpu" and options.output is None:
        parser.error("--device cpu needs --output: its figures are not those of a GPU")
    if options.minutes <= 0:
        parser.error("--minutes must be above 0")
    options.output = options.output or OUTPUT
    return options


def record_of(
    outcomes: Outcomes, settings: Settings, options: argparse.Namespace, *, finished: bool
) -> dict[str, Any]:
    """What is stored: met where no part failed or was stopped, and no gate was missed."""
    sound = all(
        each.outcome in ("done", "skipped") and each.found.get("passed", True) for each in outcomes.values()
    )
    measured = {
        "finished": finished,
        "gpu": next(iter(outcomes.values())).found.get("gpu"),  # the first part looks around
        "minutes": options.minutes,
        "model": settings.model,
        "precision": settings.precision,
        "device": settings.device,
        "cases": settings.cases,
        "rounds": settings.rounds,
        "new_tokens": settings.new_tokens,
        "skipped": {name: each.reason for name, each in outcomes.items() if each.outcome == "skipped"},
        "parts": {name: asdict(each) for name, each in outcomes.items()},
    }
    return harness.record("gpu", measured, label=options.label, ok=finished and sound)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # without waiting for a part that hangs in a driver, where no signal reaches it
