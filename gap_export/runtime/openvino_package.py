"""OpenVINO, imported without a word to anybody.

Its import counts itself in a file of the home folder and sends an event to its makers, by way of a package that it does without where that
is not installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_REPORTS = "openvino_telemetry"


@contextmanager
def _not_installed(package: str) -> Iterator[None]:
    """Whatever is imported meanwhile does not find the package."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}
    for name in before:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(before)


with _not_installed(_REPORTS):
    import openvino as ov
    from openvino import opset13 as ops

    try:
        from openvino.frontend.onnx import ConversionExtension
    except ImportError:  # a version that cannot be taught an operator
        ConversionExtension = None

__all__ = ["ConversionExtension", "ops", "ov"]
