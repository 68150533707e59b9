"""What a figure was measured on: processor, versions, memory taken."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

RUNTIME_PACKAGES = ("gap-export", "numpy", "onnxruntime", "tensorrt-rtx", "tensorrt")
BUILD_PACKAGES = (
    "gap-export",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "tensorrt-rtx",
    "tensorrt",
)


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; None where there is no /proc.

    `getrusage` is not asked: after a fork it reports the parent's peak where that was larger.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def cpu_name() -> str:
    """Model name of the processor."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(packages: Sequence[str] = RUNTIME_PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
