"""ONNX Runtime, imported if exactly one of its distributions is installed.

Several distributions of it install one folder, `onnxruntime`: the last one that was installed overwrites a part of the others, and pip says nothing.
pip cannot take a dependency away either, so none of them is a dependency of the package itself: an extra brings the one that fits the processor.
"""

from __future__ import annotations

from importlib import metadata

from gap_export.errors import MissingRequirementError

DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-qnn",
    "onnxruntime-migraphx",
    "onnxruntime-rocm",
    "onnxruntime-training",
)
"""Those that install the folder; plug-ins (`onnxruntime-ep-...`) have folders of their own."""

_EXTRAS = "pip install 'gap-export[cpu]', or 'gap-export[gpu]' where there is an NVIDIA GPU"


def check_distributions() -> None:
    """Refuse an installation in which files of several are mixed.

    Raises:
        MissingRequirementError: there is more than one.
    """
    found = []
    for name in DISTRIBUTIONS:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    if len(found) > 1:
        raise MissingRequirementError(
            f"are installed in one folder, {len(found)} distributions of ONNX Runtime that overwrite each other",
            subject=" and ".join(f"{name} {version}" for name, version in found),
            hint=f"pip uninstall {' '.join(name for name, _ in found)}; then {_EXTRAS}",
        )


check_distributions()
try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingRequirementError(
        "is needed to run graphs, and not installed", subject=error.name or "onnxruntime", hint=_EXTRAS
    ) from error

__all__ = ["ort"]
