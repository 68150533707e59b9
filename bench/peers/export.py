"""The decoder of LLaVA-1.5-7B exported by gap-export and by mobius, in turns: time, memory, bytes written.

    python bench/peers/export.py [--repeats 3] [--scratch FOLDER] [--label TEXT]

Random weights in fp16; every export is a process of its own. Repeats show how much of a time is the disk's: one of the two writes
the weights anew. The last line printed is the record, also stored in bench/results/peers_export.json. Needs the environment of
`environment.py`, 28 GB of disk, and 14 GB of memory for mobius.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import environment  # noqa: E402
import harness  # noqa: E402
from harness import LLAVA_7B, ensure_checkpoint  # noqa: E402


def main() -> int:
    parser = harness.parser_of(__doc__, scratch=True)
    parser.add_argument("--repeats", type=int, default=3, help="exports with each")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    console, python = Console(), environment.python_of(options.scratch)
    if not python.exists():
        raise SystemExit("mobius needs an environment of its own: run `python bench/peers/environment.py`")
    checkpoint, size = ensure_checkpoint(options.scratch / "llava-7b", LLAVA_7B)
    ours = [sys.executable, str(HERE.parent / "export.py"), "--scratch", str(options.scratch)]
    theirs = options.scratch / "mobius-7b"
    commands = {
        "gap-export": ([*ours, "--build", "7b-decoder"], options.scratch / "bundle"),
        "mobius": (
            [str(python), str(HERE / "mobius_export.py"), str(checkpoint), str(theirs), "f16"],
            theirs,
        ),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for repeat in range(options.repeats):
        for name, (command, out) in commands.items():
            console.print(f"exporting with {name}, {repeat + 1} of {options.repeats}")
            shutil.rmtree(out, ignore_errors=True)
            runs[name].append(harness.in_fresh_process(command))
            shutil.rmtree(out, ignore_errors=True)
    exports = {}
    table = Table("decoder of 7B", "seconds (least to most)", "peak RSS, GB", "written, MB")
    for name, found in runs.items():
        median, seconds = medians(found), [run["seconds"] for run in found]
        exports[name] = {"median": median, "runs": found}
        table.add_row(
            name,
            f"{median['seconds']:.0f} ({min(seconds):.0f} to {max(seconds):.0f})",
            f"{median['peak_rss_gb']:.2f}",
            f"{median['written_mb']:.1f}",
        )
    console.print(table)
    return harness.finish(
        "peers_export", {"weight_bytes": size, "exports": exports}, label=options.label, ok=True
    )


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {
        figure: statistics.median(run[figure] for run in runs)
        for figure in ("seconds", "peak_rss_gb", "written_mb")
    }


if __name__ == "__main__":
    sys.exit(main())
