"""Execution providers in ONNX Runtime: found, given to a session, and asked afterwards which nodes they took.

ONNX Runtime leaves every node that a provider has no kernel for to the CPU, and says nothing. For a decoder that means a copy of the cache to and fro for
every token, so it is refused unless `CPUExecutionProvider` is named too.
"""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from gap_export.errors import (
    MissingRequirementError,
    SessionError,
    SessionWarning,
    first_line,
    in_one_line,
    shown,
)
from gap_export.runtime.onnxruntime_package import ort
from gap_export.runtime.providers import CPU, CUDA, Provider

_DECODERS = ("decoder", "prefill", "decode")
_RECORDED = "session.record_ep_graph_assignment_info"
_EXACT = {"use_tf32": "0"}
"""Products of float32 in float32: the CUDA provider rounds their factors to ten bits by default."""
_KINDS = {"cpu": "CPU", "gpu": "GPU", "cuda": "GPU", "npu": "NPU"}
_OF_EXTENTS = frozenset(
    [
        "Add",
        "And",
        "Cast",
        "Clip",
        "Concat",
        "ConstantOfShape",
        "Div",
        "Equal",
        "Expand",
        "Gather",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Max",
        "Min",
        "Mul",
        "Not",
        "Or",
        "Range",
        "ReduceSum",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Squeeze",
        "Sub",
        "Unsqueeze",
        "Where",
    ]
)
"""What computes extents and ids: ONNX Runtime keeps a few of those on the CPU on purpose, where a GPU would only wait for them."""
_REGISTERED = "already registered"
_NAMED = 6
"""Kinds of nodes in a message."""


def providers_on(device: str, asked: Sequence[Provider]) -> tuple[Provider, ...]:
    """What computes, where a device and perhaps providers were asked for.

    Args:
        device: cpu, cuda, gpu or npu, with a number where there are several.
        asked: providers; may be empty.

    Raises:
        SessionError: they do not go together.
        MissingRequirementError: one is not built into this ONNX Runtime.
    """
    kind = device.partition(":")[0]
    computing = [each for each in asked if each.name != CPU]
    if kind in ("gpu", "npu") and not any(each.is_plug_in for each in computing):
        raise SessionError(
            "needs a plug-in that computes there",
            subject=f"device {device} of backend onnxruntime",
            hint="name its package with --provider, or use --device cuda on an NVIDIA GPU",
        )
    if kind != "cuda" and any(each.name == CUDA for each in computing):
        raise SessionError(
            f"computes on a GPU, and not on {device}", subject=f"provider {CUDA}", hint="use --device cuda"
        )
    if kind == "cuda" and not computing:
        computing = [Provider(CUDA)]
        asked = (*computing, *asked)
    _check_built_in(computing)
    for each in asked:
        if each.name == CPU and each.options:
            raise SessionError(
                f"has no option {shown(next(iter(each.options)))}",
                subject=f"provider {CPU}",
                hint="leave it out",
            )
    return tuple(asked)


def add_providers(options: ort.SessionOptions, providers: Sequence[Provider], device: str) -> list[str]:
    """Give a session its providers, and have it record which nodes they take.

    Args:
        options: of the session.
        providers: the first that has a kernel for a node takes it; the CPU is always the last.
        device: as of `providers_on`.

    Returns:
        What ONNX Runtime calls those that compute, without the CPU.

    Raises:
        SessionError: there is no such provider or device, or it refuses its options.
        MissingRequirementError: the package of a plug-in is not installed.
    """
    names = []
    for each in providers:
        if each.name == CPU:
            continue
        if each.is_plug_in:
            name, devices = _devices_of(each, device)
            options.add_provider_for_devices(devices, dict(each.options))
        else:
            name = each.name
            options.add_provider(name, _options_of(each, device))
        names.append(name)
    if names:
        options.add_session_config_entry(_RECORDED, "1")
    return names


def check_assignment(
    session: ort.InferenceSession, graph: str, computing: Sequence[str], providers: Sequence[Provider]
) -> None:
    """Hold where the nodes of a graph went against what was asked for.

    Args:
        session: loaded with `add_providers`.
        graph: its name.
        computing: what `add_providers` gave.
        providers: as given to `add_providers`.

    Raises:
        SessionError: nodes of a decoder went to the CPU that do more than compute extents, and that was not asked for.
    """
    absent = [name for name in computing if name not in session.get_providers()]
    if absent:
        raise SessionError(
            f"was left out by ONNX Runtime {ort.__version__}, which could not start it",
            subject=f"provider {absent[0]}",
            hint="look whether its driver and libraries are installed, for this version of ONNX Runtime",
        )
    if not computing:
        return
    _check_options(session, computing, providers)
    if any(each.name == CPU for each in providers):
        return
    left, nodes = Counter[str](), 0
    for part in session.get_provider_graph_assignment_info():
        kinds = [node.op_type for node in part.get_nodes()]
        nodes += len(kinds)
        if part.ep_name == CPU:
            left.update(kind for kind in kinds if kind not in _OF_EXTENTS)
    if not left:
        return
    most = [f"{count} {kind}" for kind, count in left.most_common(_NAMED)]
    most += ["..."] if len(left) > _NAMED else []
    what = f"{left.total()} of {nodes} nodes are left to the CPU by {providers[0].name}: {', '.join(most)}"
    if graph not in _DECODERS:
        warnings.warn(f"graph {graph}: {what}", SessionWarning, stacklevel=4)
        return
    raise SessionError(
        what,
        subject=f"graph {graph}",
        hint=f"use another provider, or name {CPU} after it to have them computed there",
    )


def _check_options(
    session: ort.InferenceSession, computing: Sequence[str], providers: Sequence[Provider]
) -> None:
    """An option that a provider does not know is refused, also where ONNX Runtime would drop it without a word."""
    taken = session.get_provider_options()
    for name, asked in zip(computing, (each for each in providers if each.name != CPU), strict=True):
        known = taken.get(name, {})
        unknown = [option for option in asked.options if option not in known]
        if unknown and (known or not asked.is_plug_in):  # plug-ins need not say what they took
            raise SessionError(
                f"has no option {shown(unknown[0])}"
                + (f", only {', '.join(sorted(known))}" if known else ""),
                subject=f"provider {asked.name}",
                hint="leave it out, or see its documentation",
            )


def library_of(package: str) -> tuple[Path, tuple[str, ...]]:
    """Where the library of a plug-in lies, and which providers it brings: asked from its package.

    Args:
        package: as pip calls it.

    Raises:
        MissingRequirementError: it is not installed, or is no plug-in of ONNX Runtime.
    """
    hint = f"pip install {package}"
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise MissingRequirementError(
            "is not installed", subject=f"package {package} of an execution provider", hint=hint
        ) from error
    modules = [file.parts[0] for file in files if len(file.parts) == 2 and file.name == "__init__.py"]
    for name in modules:
        try:
            module = importlib.import_module(name)
            found = Path(module.get_library_path()), tuple(map(str, module.get_ep_names()))
        except AttributeError:
            continue
        except Exception as error:  # whatever a package does to find its library
            raise MissingRequirementError(
                f"does not find its library: {in_one_line(first_line(error))}",
                subject=f"package {package}",
                hint=hint,
            ) from error
        return found
    raise MissingRequirementError(
        "is no plug-in of ONNX Runtime: it does not say where its library lies (get_library_path)",
        subject=f"package {package}",
        hint="name a package such as onnxruntime-ep-openvino, or a built-in provider such as CUDAExecutionProvider",
    )


def _devices_of(plug_in: Provider, device: str) -> tuple[str, list[Any]]:
    """Name of the provider of a plug-in, and its device."""
    library, names = library_of(plug_in.name)
    subject = f"provider {plug_in.name}"
    if not any(each.ep_name in names for each in ort.get_ep_devices()):
        try:
            ort.register_execution_provider_library(plug_in.name, str(library))
        except Exception as error:  # pybind exceptions of ONNX Runtime share no public base class
            if _REGISTERED not in str(error):  # before, when it found no device either
                raise SessionError(
                    f"was refused by ONNX Runtime {ort.__version__}: {in_one_line(first_line(error))}",
                    subject=subject,
                    hint="install a version of it that was made for this ONNX Runtime",
                ) from error
    offered = [each for each in ort.get_ep_devices() if each.ep_name in names]
    kind, _, number = device.partition(":")
    fitting = [each for each in offered if each.device.type.name == _KINDS[kind]]
    if int(number or 0) >= len(fitting):
        kinds = [each.device.type.name.lower() for each in offered]
        raise SessionError(
            f"finds no {device} here, only {', '.join(kinds)}" if kinds else "finds no device here",
            subject=subject,
            hint="choose another --device, or another --provider",
        )
    chosen = fitting[int(number or 0)]
    return chosen.ep_name, [chosen]


def _check_built_in(providers: Sequence[Provider]) -> None:
    available = ort.get_available_providers()
    for each in providers:
        if not each.is_plug_in and each.name not in available:
            raise MissingRequirementError(
                f"is not built into this ONNX Runtime, which has {', '.join(available)}",
                subject=f"provider {shown(each.name)}",
                hint="pip uninstall onnxruntime; pip install 'gap-export[gpu]'"
                if each.name == CUDA
                else "install the distribution of ONNX Runtime that has it, or name the package of a plug-in",
            )


def _options_of(built_in: Provider, device: str) -> dict[str, str]:
    """Those that were given, and where it computes."""
    if built_in.name != CUDA:
        return dict(built_in.options)
    return {**_EXACT, **built_in.options, "device_id": device.partition(":")[2] or "0"}
