"""The record every benchmark ends with: one JSON line on the screen, the same in bench/results/."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gap_export.environment import cpu_name, versions

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("gap-export", "numpy", "onnxruntime", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def finish(name: str, measured: dict[str, Any], *, label: str, ok: bool, store: bool = True) -> int:
    """Store and print; the exit code is 0 when all targets were met, else 1."""
    content = {
        "benchmark": name,
        "label": label,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(PACKAGES),
        "ok": ok,
        **measured,
    }
    if store:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content))
    return 0 if ok else 1


def machine() -> dict[str, Any]:
    """What the figures depend on; the load says whether the machine was idle."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
