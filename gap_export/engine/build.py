"""Graph to engine: parse, hold against the spec, build, write.

Networks are strongly typed: fp32, fp16 and bf16 are what the ONNX file says, and no builder flag changes that. The engine is
streamed to disk as it is made, so the peak is about 2.3 times the weights in resident memory, half of that file-backed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gap_export.bundle.manifest import Engine, EngineTarget
from gap_export.bundle.spec import DType, GraphSpec, TensorSpec
from gap_export.engine import messages
from gap_export.engine.device import Device
from gap_export.engine.library import TARGETS, Library, Message, load_library
from gap_export.engine.profiles import Profile, profiles_from_spec
from gap_export.errors import EngineError, MissingRequirementError
from gap_export.files import sha256_of, writing
from gap_export.progress import SILENT, Progress

CURRENT = "current"
"""Stands for the compute capability of the GPU at hand."""

_DATA_TYPES: dict[DType, str] = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "bool": "BOOL",
}


def engine_from_graph(
    graph: Path,
    spec: GraphSpec,
    *,
    target: EngineTarget,
    compute_capabilities: Sequence[str],
    folder: Path,
    progress: Progress = SILENT,
) -> Engine:
    """Build the engine of one graph.

    Args:
        graph: ONNX file; external data lies beside it.
        spec: what the graph takes and gives, with the extents to serve.
        target: the library.
        compute_capabilities: e.g. ("8.6", "8.9"), or ("current",). `tensorrt` builds for the GPU at hand whatever is
            listed; the record says which one that was.
        folder: of the bundle; the engine becomes `engines/{target}/{name}.engine` in it, whole or not at all.
        progress: told of every step of the builder, from its threads.

    Returns:
        Record whose `file` is relative to the folder.

    Raises:
        EngineError: the library refused the graph, a profile, or a compute capability.
        MissingRequirementError: the library, a GPU where one is needed, memory or disk space is missing.
    """
    library = load_library(target)
    profiles = profiles_from_spec(spec)
    capabilities = _capabilities(library, compute_capabilities)
    out = engine_file(folder, target, spec.name)
    with library.log.collecting() as log:
        builder = _builder(library)
        network = _network_from_graph(library, builder, graph, log)
        _hold_against_spec(library, network, spec, graph)
        _let_fp32_attention_decompose(library, network)
        config = _config(library, builder, profiles, capabilities)
        _write_engine(library, builder, network, config, spec=spec, out=out, log=log, progress=progress)
    return Engine(
        file=out.relative_to(folder).as_posix(),
        target=target,
        version=library.version,
        compute_capabilities=_as_recorded(capabilities),
        graph_sha256=sha256_of(graph),
    )


def engine_file(folder: Path, target: EngineTarget, name: str) -> Path:
    """Where the engine of a graph lies in a bundle."""
    return folder / "engines" / target / f"{name}.engine"


def scratch_of(out: Path) -> Path:
    """Where an engine lies while it is written."""
    return out.with_name(f".{out.name}.writing")


def supported_compute_capabilities(library: Library) -> list[str]:
    """Compute capabilities that a library builds for ahead of time; empty when it needs the GPU itself."""
    if not TARGETS[library.target].ahead_of_time:
        return []
    names = library.api.ComputeCapability.__members__
    numbers = sorted(int(name[2:]) for name in names if name.startswith("SM"))
    return [f"{number // 10}.{number % 10}" for number in numbers]


def _capabilities(library: Library, wanted: Sequence[str]) -> tuple[str, ...]:
    """Checked and without repetition; `current` alone where the library cannot choose."""
    if not TARGETS[library.target].ahead_of_time:
        return (CURRENT,)
    known = supported_compute_capabilities(library)
    chosen = tuple(dict.fromkeys(wanted))
    hint = f"choose from {', '.join(known)}, or `current` for the GPU of this machine"
    for name in chosen:
        if name not in known and name != CURRENT:
            raise EngineError(
                f"is not a compute capability that {library.title} builds for",
                subject=f"compute capability {name}",
                hint=hint,
            )
    if not chosen or (CURRENT in chosen and len(chosen) > 1):
        raise EngineError(
            "needs at least one compute capability, and `current` on its own",
            subject=f"compute capabilities {', '.join(chosen) or '(none)'}",
            hint=hint,
        )
    if CURRENT in chosen:
        Device().close()  # says what is missing where there is no GPU; the builder would only fail
    return chosen


def _as_recorded(capabilities: tuple[str, ...]) -> tuple[str, ...]:
    if capabilities != (CURRENT,):
        return capabilities
    device = Device()
    try:
        return (device.compute_capability,)
    finally:
        device.close()


def _builder(library: Library) -> Any:
    try:
        return library.api.Builder(library.logger)
    except TypeError as error:  # what pybind makes of the null pointer that stands for "no GPU"
        raise MissingRequirementError(
            f"{library.title} could not start",
            subject="the GPU",
            hint="build on a machine with an NVIDIA GPU, or for tensorrt-rtx, which needs none",
        ) from error


def _network_from_graph(library: Library, builder: Any, graph: Path, log: Sequence[Message]) -> Any:
    api = library.api
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, library.logger)
    if not parser.parse_from_file(str(graph)):
        # The log comes second: it names the file that could not be read where the parser names only the weight.
        found = messages.complaints_of_parser(parser) + messages.complaints_of_log(log)
        raise messages.error_from_complaints(
            found, subject=str(graph), library=library.title, doing="import the graph"
        )
    if network.num_outputs == 0:  # an empty file and most files of another kind parse as an empty graph
        raise EngineError(
            "holds no graph",
            subject=str(graph),
            hint="the file is empty, cut short or no ONNX file: build the bundle again",
        )
    return network


def _hold_against_spec(library: Library, network: Any, spec: GraphSpec, graph: Path) -> None:
    """Names, element types and ranks of inputs and outputs. TensorRT would turn a double into a float in silence."""
    found = {
        "input": [network.get_input(index) for index in range(network.num_inputs)],
        "output": [network.get_output(index) for index in range(network.num_outputs)],
    }
    for kind, wanted in (("input", spec.inputs), ("output", spec.outputs)):
        by_name = {tensor.name: tensor for tensor in found[kind]}
        for tensor in wanted:
            problem = _difference(library, tensor, by_name.get(tensor.name))
            if problem:
                raise EngineError(
                    problem,
                    subject=f"{graph}, {kind} {tensor.name}",
                    hint="the graph and the manifest do not belong together: build the bundle again",
                )
        surplus = sorted(set(by_name) - {tensor.name for tensor in wanted})
        if surplus:
            raise EngineError(
                f"is an {kind} of the graph that the manifest does not list",
                subject=f"{graph}, {kind} {surplus[0]}",
                hint="the graph and the manifest do not belong together: build the bundle again",
            )


def _difference(library: Library, wanted: TensorSpec, found: Any) -> str | None:
    if found is None:
        return "is listed in the manifest but not in the graph"
    if found.dtype != getattr(library.api.DataType, _DATA_TYPES[wanted.dtype]):
        return f"has type {found.dtype.name} in the engine, the manifest says {wanted.dtype}"
    if len(found.shape) != len(wanted.shape):
        return f"has {len(found.shape)} dimensions in the graph, the manifest says {len(wanted.shape)}"
    return None


def _let_fp32_attention_decompose(library: Library, network: Any) -> None:
    """Only half precision has fused attention kernels; in fp32 the layer must be allowed to fall apart into matmuls."""
    api = library.api
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == api.LayerType.ATTENTION_INPUT and layer.get_input(0).dtype == api.DataType.FLOAT:
            layer.__class__ = api.IAttentionInputLayer  # the binding hands every layer out as its base class
            layer.attention.decomposable = True


def _config(library: Library, builder: Any, profiles: Sequence[Profile], capabilities: Sequence[str]) -> Any:
    config = builder.create_builder_config()
    if TARGETS[library.target].ahead_of_time:
        known = library.api.ComputeCapability
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            member = "CURRENT" if name == CURRENT else f"SM{name.replace('.', '')}"
            config.set_compute_capability(getattr(known, member), index)
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for name, extents in profile.ranges.items():
            if name in profile.values:
                shapes.set_shape_input(name, *((value,) for value in profile.values[name]))
            else:
                shapes.set_shape(name, extents.minimum, extents.optimum, extents.maximum)
        if config.add_optimization_profile(shapes) < 0:
            raise EngineError(
                f"{library.title} does not accept it",
                subject=f"optimisation profile {profile.name}",
                hint="check --max-text, --capacity, and max_batch in the recipe",
            )
    return config


def _write_engine(
    library: Library,
    builder: Any,
    network: Any,
    config: Any,
    *,
    spec: GraphSpec,
    out: Path,
    log: Sequence[Message],
    progress: Progress,
) -> None:
    """Build into a file beside `out` and rename it, so that `out` is whole or absent."""
    scratch = scratch_of(out)
    subject = f"graph {spec.name}"
    try:
        with writing(out, kind=MissingRequirementError, hint="free disk space, or choose another folder"):
            out.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("wb") as file:
                writer = _stream_writer(library.api, file)
                monitor = config.progress_monitor = _progress_monitor(library.api, progress)
                built = builder.build_serialized_network_to_stream(network, config, writer)
            _raise_first(writer, monitor)
            if not built:
                raise messages.error_from_complaints(
                    messages.complaints_of_log(log),
                    subject=subject,
                    library=library.title,
                    doing="build the engine",
                )
            ignored = messages.unused_inputs(log)
            if ignored:
                raise EngineError(
                    "is ignored by the engine, which would then give wrong answers",
                    subject=f"{subject}, input {', '.join(ignored)}",
                    hint="the graph must use the values of every input; `nonpad_kv_seqlen` of Attention is never used",
                )
            os.replace(scratch, out)
    finally:
        scratch.unlink(missing_ok=True)


def _raise_first(*callbacks: Any) -> None:
    """Raise what went wrong in our own callbacks: an exception cannot cross the library's C++ frames."""
    for callback in callbacks:
        if callback.failure is not None:
            raise callback.failure


def _stream_writer(api: Any, file: BinaryIO) -> Any:
    class StreamWriter(api.IStreamWriter):  # type: ignore[misc]  # a C++ class without stubs
        failure: BaseException | None = None

        def __init__(self) -> None:
            api.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except BaseException as error:
                self.failure = error
                return 0

    return StreamWriter()


def _progress_monitor(api: Any, progress: Progress) -> Any:
    class ProgressMonitor(api.IProgressMonitor):  # type: ignore[misc]  # a C++ class without stubs
        failure: BaseException | None = None

        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps
            self._report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return self.failure is None

        def phase_finish(self, phase_name: str) -> None:
            self._report(phase_name, self.totals.get(phase_name, 0))

        def _report(self, phase: str, done: int) -> None:
            if self.failure is None:
                try:
                    progress.stage(f"{phase} {done}/{self.totals.get(phase, done)}")
                except BaseException as error:  # Ctrl-C too: it is raised again once the builder has let go
                    self.failure = error

    return ProgressMonitor()
