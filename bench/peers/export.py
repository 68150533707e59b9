"""The decoder of LLaVA-1.5-7B exported by gap-export and by mobius, one after the other: time, memory, bytes written.

    python bench/peers/export.py [--scratch FOLDER] [--label TEXT]

Random weights in fp16; every export is a process of its own. The last line printed is the record, also stored in
bench/results/peers_export.json. Needs the environment of `environment.py`, 28 GB of disk, and 14 GB of memory for mobius.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import environment  # noqa: E402
import record  # noqa: E402
from standin import LLAVA_7B, ensure_checkpoint  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=environment.SCRATCH)
    parser.add_argument("--label", default="", help="words stored with the record")
    options = parser.parse_args()
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
    exports = {}
    for name, (command, out) in commands.items():
        console.print(f"exporting with {name}")
        shutil.rmtree(out, ignore_errors=True)
        exports[name] = timed(command)
        shutil.rmtree(out, ignore_errors=True)
    table = Table("decoder of 7B", "seconds", "peak RSS, GB", "written, MB")
    for name, found in exports.items():
        table.add_row(
            name, f"{found['seconds']:.0f}", f"{found['peak_rss_gb']:.2f}", f"{found['written_mb']:.1f}"
        )
    console.print(table)
    return record.finish(
        "peers_export", {"weight_bytes": size, "exports": exports}, label=options.label, ok=True
    )


def timed(command: list[str]) -> dict[str, Any]:
    """What a process says about itself in its last line, and how long it took from start to end."""
    began = time.perf_counter()
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return {"seconds": round(time.perf_counter() - began, 2), **measured}


if __name__ == "__main__":
    sys.exit(main())
