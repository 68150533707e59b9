"""A server under load, faults and time: what is wrong, lost or leaked, and what serving costs. See README.md for the protocol.

    python bench/serve.py [--part NAME ...] [--rounds N] [--seconds N] [--clients N] [--images N] [--minutes N] [--limit-minutes N] [--label TEXT]

Parts are load, overhead, refusals, cancel, sigterm, kill9, memory and aiperf; all but the last by default. Each is a measurement by itself, and its record replaces
the same part's of an earlier run in bench/results/serve.json. `--trained` needs the environment of `peers/environment.py` for the weights. Requests go to 127.0.0.1 alone. The last line printed is the record.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness
from serving.part_aiperf import aiperf
from serving.part_cancel import cancel
from serving.part_load import load
from serving.part_memory import memory
from serving.part_overhead import overhead
from serving.part_refusals import refusals
from serving.part_stops import kill9, sigterm
from serving.process import ensure_bundle
from serving.setup import IMAGES, Outcome, Part, Setup
from serving.trained import ensure_trained

from gap_export.bundle.folder import open_bundle
from gap_export.environment import versions
from gap_export.evaluation.bundle_reports import RECOMMENDATION
from gap_export.serving.adapt import controller

PARTS: dict[str, Part] = {
    "load": load,
    "overhead": overhead,
    "refusals": refusals,
    "cancel": cancel,
    "sigterm": sigterm,
    "kill9": kill9,
    "memory": memory,
    "aiperf": aiperf,
}
BY_DEFAULT = tuple(name for name in PARTS if name != "aiperf")
PACKAGES = ("fastapi", "starlette", "uvicorn", "h11", "pydantic", "prometheus-client", "pillow")
LIMIT_MINUTES = 90.0


def main() -> int:
    parser = harness.parser_of(__doc__, scratch=True)
    parser.add_argument(
        "--part", action="append", choices=tuple(PARTS), help="of the measurement; repeat it for several"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of times")
    parser.add_argument("--seconds", type=float, help="of a load")
    parser.add_argument("--clients", type=int, help="of a load")
    parser.add_argument(
        "--images", type=int, default=IMAGES, help="that a load asks about, with 25 requests for each"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of memory")
    parser.add_argument("--control-minutes", type=float, default=5.0, help="of memory with a leak")
    served = parser.add_mutually_exclusive_group()
    served.add_argument("--bundle", type=Path, help="that is served, in place of one that is built")
    served.add_argument(
        "--trained", action="store_true", help="serve a trained decoder, and record its parts apart"
    )
    parser.add_argument(
        "--server-options", default="", help="further ones of `gap-export serve`, in one text"
    )
    parser.add_argument("--adapt", help="FROM:TO, of the load: the server chooses fractions of visual tokens")
    parser.add_argument("--max-accuracy-drop", type=float, default=0.03, help="with --adapt")
    parser.add_argument("--aiperf", type=Path, help="the program, of an environment of its own")
    parser.add_argument("--limit-minutes", type=float, default=LIMIT_MINUTES, help="of all parts together")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "serve.json", help="of the record")
    options = parser.parse_args()
    end_after(60 * options.limit_minutes)
    console = Console()
    if options.trained:
        bundle = ensure_trained(options.scratch)
    else:
        bundle = options.bundle or ensure_bundle(options.scratch)
    server_options = shlex.split(options.server_options)
    chosen: tuple[float, ...] = ()
    if options.adapt:
        chosen = chosen_fractions(bundle, options.adapt, options.max_accuracy_drop)
        console.print(f"with --adapt {options.adapt}, the server chooses among {chosen}")
        server_options += ["--adapt", options.adapt, "--max-accuracy-drop", str(options.max_accuracy_drop)]
    setup = Setup(
        bundle=bundle,
        scratch=options.scratch,
        rounds=options.rounds,
        seconds=options.seconds,
        clients=options.clients,
        images=options.images,
        minutes=options.minutes,
        control_minutes=options.control_minutes,
        server_options=tuple(server_options),
        chosen=chosen,
        aiperf=options.aiperf,
        console=console,
    )
    suffix = (" of a trained decoder" if options.trained else "") + (" with --adapt" if options.adapt else "")
    parts = recorded(options.output)
    for name in options.part or BY_DEFAULT:
        outcome = PARTS[name](setup)
        console.print(table_of(name + suffix, outcome))
        parts[name + suffix] = {
            **harness.record(name, outcome.told, label=options.label, ok=outcome.ok),
            "versions_of_serving": versions(PACKAGES),
        }
        store(options.output, parts)  # a run that ends early leaves what was done
    ok = all(part["ok"] for part in parts.values())
    print(json.dumps({"benchmark": "serve", "ok": ok, "parts": parts}))
    return 0 if ok else 1


def chosen_fractions(bundle: Path, adapt: str, max_drop: float) -> tuple[float, ...]:
    """What a server with `--adapt` may choose, by the record of `recommend` beside the bundle, which is made where there is none.

    Args:
        bundle: its folder.
        adapt: FROM:TO.
        max_drop: loss of accuracy that is allowed.
    """
    opened = open_bundle(bundle)
    if not (opened.reports / RECOMMENDATION).exists():
        command = ["-m", "gap_export", "recommend", str(bundle), "--max-accuracy-drop", str(max_drop)]
        subprocess.run(
            [sys.executable, *command], check=False, stdout=subprocess.DEVNULL
        )  # 1: no fraction is within it
    return controller(opened, adapt, max_drop, 0.5).ratios


def end_after(seconds: float) -> None:
    """Have this process end by itself, and all servers with it.

    Args:
        seconds: from now.
    """

    def over(*_: object) -> None:
        raise SystemExit(f"ended after {seconds / 60:g} minutes; see --limit-minutes")

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def recorded(path: Path) -> dict[str, Any]:
    """Parts of an earlier run: name -> record."""
    if not path.exists():
        return {}
    parts: dict[str, Any] = json.loads(path.read_text())["parts"]
    return parts


def store(path: Path, parts: dict[str, Any]) -> None:
    """Write the record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ok = all(part["ok"] for part in parts.values())
    path.write_text(json.dumps({"benchmark": "serve", "ok": ok, "parts": parts}, indent=2) + "\n")


def table_of(name: str, outcome: Outcome) -> Table:
    """Of one part."""
    table = Table(title=name)
    for column in ("", "measured", "target", ""):
        table.add_column(column)
    for target in outcome.targets:
        measured = "not compared" if target.measured is None else f"{target.measured:.4g}"
        limit = f"{'at least' if target.least else 'at most'} {target.limit:g}"
        table.add_row(target.name, measured, limit, "" if target.met else "MISSED")
    return table


if __name__ == "__main__":
    sys.exit(main())
