"""Runtimes: one row each, and how a bundle becomes a session.

A runtime is a module with a class that has the methods of `runtime.session.Session`, and a row here. The module is imported
when a session is opened, so a row costs nothing where its runtime is not installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gap_export import bounds
from gap_export.errors import MissingRequirementError, SessionError

if TYPE_CHECKING:
    from gap_export.bundle.folder import Bundle
    from gap_export.recipe.recipe import Target
    from gap_export.runtime.session import Session


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        name: what `--backend` and `gap_export.load(backend=...)` take.
        loader: `module:function`, called with a bundle and `threads=` (0 lets the runtime choose); it returns a session.
        target: what a bundle must have been built for (`--target`), `onnx` for its graphs as they are; None for PyTorch, which
            runs the checkpoint that a bundle was built from.
        requirement: what pip installs for it beside the package itself; empty where nothing is needed.
    """

    name: str
    loader: str
    target: Target | None = "onnx"
    requirement: str = ""


_BACKENDS: dict[str, Backend] = {}


def register(added: Backend) -> None:
    """Add a row to the table.

    Raises:
        ValueError: there is one of this name.
    """
    if added.name in _BACKENDS:
        raise ValueError(f"there is a backend {added.name!r} already")
    _BACKENDS[added.name] = added


for _row in (
    Backend("onnxruntime", "gap_export.runtime.ort:OnnxRuntimeSession"),
    Backend("tensorrt-rtx", "gap_export.runtime.trt:open_rtx", "tensorrt-rtx", "gap-export[rtx]"),
    Backend("tensorrt", "gap_export.runtime.trt:open_tensorrt", "tensorrt", "gap-export[tensorrt]"),
    Backend("torch", "gap_export.runtime.torch.reference:open_torch", None, "gap-export[build]"),
):
    register(_row)


def names(*, exported: bool = False) -> tuple[str, ...]:
    """Names of all backends.

    Args:
        exported: only those that run what a bundle holds, which PyTorch does not.
    """
    return tuple(name for name, row in _BACKENDS.items() if row.target is not None or not exported)


def row(name: str) -> Backend:
    """The row of that name.

    Raises:
        SessionError: there is none.
    """
    if name not in _BACKENDS:
        raise SessionError("unknown backend", subject=repr(name), hint=f"choose one of {', '.join(names())}")
    return _BACKENDS[name]


def target_of(name: str) -> Target:
    """What a bundle must have been built for to run in a backend.

    Raises:
        SessionError: there is no such backend, or it runs the checkpoint and no bundle.
    """
    target = row(name).target
    if target is None:
        raise SessionError(
            "runs the checkpoint that a bundle was built from, not the bundle",
            subject=f"backend {name}",
            hint=f"choose one of {', '.join(names(exported=True))}",
        )
    return target


def open_session(bundle: Bundle, backend: str = "onnxruntime", *, threads: int = 0) -> Session:
    """Load a bundle into a runtime. Close the session, or use it as a context manager, to give its memory back.

    Args:
        bundle: opened.
        backend: name of the runtime.
        threads: on the CPU; 0 lets the runtime choose.

    Raises:
        SessionError: there is no such backend, it refuses, or the bundle has nothing for it.
        MissingRequirementError: no GPU, or the runtime is not installed.
    """
    bounds.check(threads=threads)
    found = row(backend)
    module, _, attribute = found.loader.partition(":")
    try:
        load: Callable[..., Session] = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise MissingRequirementError(
            f"is needed for backend {backend} and not installed",
            subject=error.name or str(error),
            hint=f"pip install '{found.requirement}'" if found.requirement else "install it",
        ) from error
    return load(bundle, threads=threads)
