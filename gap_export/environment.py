"""What there is to work with: processor, versions, memory taken, and packages that are not installed."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path

from gap_export.errors import MissingRequirementError, first_line

RUNTIME_PACKAGES = ("gap-export", "numpy", "onnxruntime", "openvino", "tensorrt-rtx", "tensorrt")
BUILD_PACKAGES = (
    "gap-export",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt-rtx",
    "tensorrt",
)

_SERVE_MODULES = ("fastapi", "starlette", "uvicorn", "h11", "prometheus_client")
_BUILD_MODULES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub")


def missing_package(error: ImportError, wanted_by: str) -> MissingRequirementError:
    """What to say where a package of the build or the serve extra is missing, or is there and cannot be imported.

    Args:
        error: that its import gave.
        wanted_by: what cannot be done without it.

    Raises:
        ImportError: the error itself, where it is about this package's own modules: a fault of the installation of this package.
    """
    name = error.name or ""
    if name.partition(".")[0] == __name__.partition(".")[0]:
        raise error
    extra = "serve" if name.partition(".")[0] in _SERVE_MODULES else "build"
    if isinstance(error, ModuleNotFoundError) and name:
        return _needed(name, wanted_by, extra)
    return MissingRequirementError(
        f"is needed for {wanted_by} and cannot be imported: {first_line(error)}",
        subject=name or "a package",
        hint=f"the versions in constraints.txt are the tested ones: pip install -c constraints.txt 'gap-export[{extra}]'",
    )


def check_build_extra(wanted_by: str) -> None:
    """Refuse to begin what needs the packages of the build extra; nothing is imported.

    Args:
        wanted_by: what cannot be done without them.

    Raises:
        MissingRequirementError: one is not installed.
    """
    _check_installed(_BUILD_MODULES, "build", wanted_by)


def check_serve_extra(wanted_by: str) -> None:
    """Refuse to begin what needs the packages of the serve extra; nothing is imported.

    Args:
        wanted_by: what cannot be done without them.

    Raises:
        MissingRequirementError: one is not installed.
    """
    _check_installed(_SERVE_MODULES, "serve", wanted_by)


def _check_installed(modules: Sequence[str], extra: str, wanted_by: str) -> None:
    for name in modules:
        try:
            found = util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise _needed(name, wanted_by, extra)


def _needed(package: str, wanted_by: str, extra: str) -> MissingRequirementError:
    return MissingRequirementError(
        f"is needed for {wanted_by} and not installed",
        subject=package,
        hint=f"pip install 'gap-export[{extra}]'",
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
