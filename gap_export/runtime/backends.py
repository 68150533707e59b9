"""Runtimes: one row each, and how a bundle becomes a session.

A runtime is a module with a class that has the methods of `runtime.session.Session`, and a row here. The module is imported
when a session is opened, so a row costs nothing where its runtime is not installed.

One text says what runs a bundle, wherever that is asked or recorded: the name of a row, then the device and the type of activations
where they are not the row's first, then what computes there where it was chosen: `onnxruntime`, `onnxruntime:cuda:1`, `openvino:gpu:1:f16`,
`onnxruntime@onnxruntime-ep-openvino{"num_streams": "1"}+CPUExecutionProvider`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gap_export import bounds
from gap_export.errors import MissingRequirementError, SessionError, shown
from gap_export.runtime.providers import Provider, providers_in

if TYPE_CHECKING:
    from gap_export.bundle.folder import Bundle
    from gap_export.recipe.recipe import Target
    from gap_export.runtime.session import Session


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        name: what `--backend` and `gap_export.load(backend=...)` take.
        loader: `module:function`, called with a bundle and `threads=` (0 lets the runtime choose); `device=`, where it is not the first; and
            `precision_hint=`, where there are hints; `providers=`, where some were chosen; and `backend=` (what the session calls itself) where
            there is more to say than the row's name. It returns a session.
        target: what a bundle must have been built for (`--target`), `onnx` for its graphs as they are; None for PyTorch, which
            runs the checkpoint that a bundle was built from.
        requirement: what pip installs for it beside the package itself; empty where nothing is needed.
        devices: what it runs on, the first by default; `gpu:N` for one of several.
        hints: types of activations that it may be asked for, the first by default; empty where the bundle alone decides.
        providers: whether execution providers may be chosen.
    """

    name: str
    loader: str
    target: Target | None = "onnx"
    requirement: str = ""
    devices: tuple[str, ...] = ("cpu",)
    hints: tuple[str, ...] = ()
    providers: bool = False


@dataclass(frozen=True)
class Runtime:
    """What runs a bundle.

    Attributes:
        backend: name of a row.
        device: a kind, with a number where there are several (`gpu:1`).
        hint: type of activations; empty where the bundle alone decides.
        providers: execution providers that were chosen, the first that has a kernel for a node first.
    """

    backend: str
    device: str
    hint: str
    providers: tuple[Provider, ...] = ()

    def __str__(self) -> str:
        found = _BACKENDS[self.backend]
        chosen = [self.device] if self.device != found.devices[0] else []
        chosen += [self.hint] if self.hint and self.hint != found.hints[0] else []
        return (
            ":".join([self.backend, *chosen])
            + ("@" if self.providers else "")
            + "+".join(map(str, self.providers))
        )


_BACKENDS: dict[str, Backend] = {}
_NUMBER = re.compile(r":(0|[1-9]\d{0,2})$")


def register(added: Backend) -> None:
    """Add a row to the table.

    Raises:
        ValueError: there is one of this name.
    """
    if added.name in _BACKENDS:
        raise ValueError(f"there is a backend {added.name!r} already")
    _BACKENDS[added.name] = added


for _row in (
    Backend(
        "onnxruntime",
        "gap_export.runtime.ort:OnnxRuntimeSession",
        requirement="gap-export[cpu]",
        devices=("cpu", "cuda", "cuda:N", "gpu", "gpu:N", "npu"),
        providers=True,
    ),
    Backend(
        "openvino",
        "gap_export.runtime.openvino:OpenVINOSession",
        requirement="gap-export[cpu,openvino]",
        devices=("cpu", "gpu", "gpu:N", "npu"),
        hints=("f32", "bf16", "f16"),
    ),
    Backend(
        "tensorrt-rtx",
        "gap_export.runtime.trt:open_rtx",
        "tensorrt-rtx",
        "gap-export[rtx]",
        devices=("cuda",),
    ),
    Backend(
        "tensorrt",
        "gap_export.runtime.trt:open_tensorrt",
        "tensorrt",
        "gap-export[tensorrt]",
        devices=("cuda",),
    ),
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
    """The row of that name; of a text that says a device or a type of activations too, the row that it begins with.

    Raises:
        SessionError: there is none.
    """
    wanted = name.partition("@")[0].partition(":")[0]
    if wanted not in _BACKENDS:
        raise SessionError(
            "unknown backend", subject=shown(wanted), hint=f"choose one of {', '.join(names())}"
        )
    return _BACKENDS[wanted]


def runtime(
    text: str,
    *,
    device: str | None = None,
    precision_hint: str | None = None,
    providers: Sequence[str] = (),
) -> Runtime:
    """What a text says, and what was asked for beside it.

    Args:
        text: a backend, or more.
        device: in the place of the text's.
        precision_hint: in the place of the text's.
        providers: execution providers, with options or without, in the place of the text's.

    Raises:
        SessionError: no such backend, a device that it does not run on, or a type or a provider that it cannot be asked for.
    """
    found = row(text)
    text, _, named = text.partition("@")
    if providers:
        named = "+".join(providers)
    if named and not found.providers:
        raise SessionError(
            "has no execution providers to choose from",
            subject=f"backend {found.name}",
            hint="leave out --provider, or use --backend onnxruntime",
        )
    said = text.split(":")[1:]
    hint = precision_hint or ""
    if said and said[-1] in found.hints:
        last = said.pop()
        hint = hint or last
    device = device or (":".join(said) if said else found.devices[0])
    if _NUMBER.sub(":N", device) not in found.devices:
        raise SessionError(
            f"is not one of {', '.join(found.devices)}"
            + (f", nor of {', '.join(found.hints)}" if said and found.hints else ""),
            subject=f"device {shown(device)} of backend {found.name}",
            hint="choose another --device, or another --backend",
        )
    if hint and hint not in found.hints:
        raise SessionError(
            f"is not one of {', '.join(found.hints)}"
            if found.hints
            else "cannot be asked for: the bundle's own precision decides",
            subject=f"precision hint {shown(hint)} of backend {found.name}",
            hint="choose another --precision-hint" if found.hints else "leave out --precision-hint",
        )
    chosen = providers_in(named) if named else ()
    return Runtime(found.name, device, hint or (found.hints[0] if found.hints else ""), chosen)


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
        backend: what runs it; see the module.
        threads: on the CPU; 0 lets the runtime choose.

    Raises:
        SessionError: there is no such backend, it refuses, or the bundle has nothing for it.
        MissingRequirementError: no GPU, or the runtime is not installed.
    """
    bounds.check(threads=threads)
    chosen = runtime(backend)
    found = row(chosen.backend)
    module, _, attribute = found.loader.partition(":")
    try:
        load: Callable[..., Session] = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise MissingRequirementError(
            f"is needed for backend {backend} and not installed",
            subject=error.name or str(error),
            hint=f"pip install '{found.requirement}'" if found.requirement else "install it",
        ) from error
    options: dict[str, Any] = {}
    if chosen.device != found.devices[0]:
        options["device"] = chosen.device
    if found.hints:
        options["precision_hint"] = chosen.hint
    if chosen.providers:
        options["providers"] = chosen.providers
    if found.hints or found.providers:
        options["backend"] = str(chosen)
    return load(bundle, threads=threads, **options)
