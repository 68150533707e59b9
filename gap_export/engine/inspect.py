"""Facts about a built engine, and whether it fits this library and this graph.

A serialized engine can only be opened on a GPU. What can be told without one stands in three places: the record in the
manifest, the graph's spec (names, types, profiles, aliases: the engine was held against it when it was built), and the
first bytes of the file (size and version). `engine_facts` says which of them it read.
"""

from __future__ import annotations

import json
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.bundle.manifest import Engine
from gap_export.bundle.spec import GraphSpec, TensorSpec
from gap_export.engine import messages
from gap_export.engine.device import Device
from gap_export.engine.library import TARGETS, Library, load_library
from gap_export.engine.profiles import profiles_from_spec
from gap_export.errors import EngineError, MissingRequirementError

# magic (4 bytes, "?trt"), 12 bytes, size of the file (uint64), version (4 bytes); the version's place is the one that
# NVIDIA's trtexec --getPlanVersionOnly reads.
_HEADER = struct.Struct("<4s12xQ4B")
_MAGIC_ENDS = b"trt"
_RTX_MAGIC = b"vtrt"  # only here is the size known to stand in the header


@dataclass(frozen=True)
class PlanHeader:
    """What the first bytes of an engine say.

    Attributes:
        version: of the library that built it, e.g. (1, 7, 1, 116).
        nbytes: size of the whole engine.
    """

    version: tuple[int, int, int, int]
    nbytes: int


def read_header(path: Path) -> PlanHeader:
    """Read the first bytes of an engine, and check that the rest is there.

    Raises:
        EngineError: no such file, no engine, or cut short.
    """
    hint = "build the engine again"
    if not path.is_file():
        raise EngineError("is missing", subject=str(path), hint=hint)
    with path.open("rb") as file:
        start = file.read(_HEADER.size)
    if len(start) < _HEADER.size or not start[1:4] == _MAGIC_ENDS:
        raise EngineError("is not a TensorRT engine", subject=str(path), hint=hint)
    magic, nbytes, major, minor, patch, build = _HEADER.unpack(start)
    size = path.stat().st_size
    if magic == _RTX_MAGIC and size != nbytes:
        raise EngineError(
            f"has {size} bytes where its header says {nbytes}: it was cut short", subject=str(path), hint=hint
        )
    return PlanHeader(version=(major, minor, patch, build), nbytes=size)


def check_engine(path: Path, engine: Engine, *, graph_sha256: str, library: Library) -> None:
    """Whether an engine may be run: whole, built by this very library version, from this very graph.

    Args:
        path: of the engine.
        engine: its record.
        graph_sha256: of the ONNX file the bundle holds now.
        library: that would run it.

    Raises:
        EngineError: it may not; names both versions, or both hashes.
    """
    header = read_header(path)
    title = TARGETS[library.target].title
    if engine.target != library.target:
        raise EngineError(
            f"was built for {TARGETS[engine.target].title}, not for {title}",
            subject=str(path),
            hint=f"build it for this target: --target {library.target}",
        )
    built_by = ".".join(str(number) for number in header.version)
    if not (_same_version(engine.version, library.version) and _same_version(built_by, library.version)):
        differing = engine.version if _same_version(built_by, library.version) else built_by
        raise EngineError(
            f"was built by {title} {differing}, this is {library.version}; engines load only in the version that built them",
            subject=str(path),
            hint=f"build it again, or install {TARGETS[library.target].module} {differing}",
        )
    if engine.graph_sha256 != graph_sha256:
        raise EngineError(
            f"was built from another graph (SHA-256 {engine.graph_sha256[:12]}…, the bundle's is {graph_sha256[:12]}…)",
            subject=str(path),
            hint="build the engine again from the graph that is in the bundle",
        )


def engine_facts(path: Path, engine: Engine, spec: GraphSpec) -> dict[str, Any]:
    """What is inside an engine, as plain values for a report.

    Returns:
        `file`, `target`, `version`, `built_by` (header), `bytes`, `compute_capabilities`, `graph_sha256`, `inputs` and
        `outputs` (name, dtype, shape with named dimensions), `profiles`, `aliased`, `read_from` (`engine` or
        `manifest`), `layers` (list, or None with the reason in `layers_missing`).

    Raises:
        EngineError: the file is missing, damaged, or of another kind.
    """
    header = read_header(path)
    facts: dict[str, Any] = {
        "file": engine.file,
        "target": engine.target,
        "version": engine.version,
        "built_by": ".".join(str(number) for number in header.version),
        "bytes": header.nbytes,
        "compute_capabilities": list(engine.compute_capabilities),
        "graph_sha256": engine.graph_sha256,
        "inputs": [_tensor_facts(tensor) for tensor in spec.inputs],
        "outputs": [_tensor_facts(tensor) for tensor in spec.outputs],
        "profiles": [
            {
                "name": profile.name,
                "inputs": {
                    name: [list(extents.minimum), list(extents.optimum), list(extents.maximum)]
                    for name, extents in profile.ranges.items()
                },
                "values": {name: list(values) for name, values in profile.values.items()},
            }
            for profile in profiles_from_spec(spec)
        ],
        "aliased": dict(spec.aliased),
        "read_from": "manifest",
        "layers": None,
    }
    try:
        library = load_library(engine.target)
        Device().close()  # says plainly that there is no GPU where the library would complain at length
        opened = open_engine(path, library)
    except (EngineError, MissingRequirementError) as error:
        facts["layers_missing"] = f"{error.subject}: {error.message}"
        return facts
    return facts | facts_of_opened(library, opened)


def facts_of_opened(library: Library, opened: Any) -> dict[str, Any]:
    """What a deserialized engine says about itself; replaces what the manifest said.

    Args:
        library: that opened it.
        opened: an `ICudaEngine`.
    """
    api = library.api
    names = [opened.get_tensor_name(index) for index in range(opened.num_io_tensors)]
    inputs = [name for name in names if opened.get_tensor_mode(name) == api.TensorIOMode.INPUT]
    outputs = [name for name in names if name not in inputs]

    def tensor(name: str) -> dict[str, Any]:
        dtype = opened.get_tensor_dtype(name).name.lower()
        return {
            "name": name,
            "dtype": dtype,
            "shape": [int(extent) for extent in opened.get_tensor_shape(name)],
        }

    def profile(index: int) -> dict[str, Any]:
        def ranges(name: str) -> list[list[int]]:
            return [
                [int(extent) for extent in shape] for shape in opened.get_tensor_profile_shape(name, index)
            ]

        return {"name": str(index), "inputs": {name: ranges(name) for name in inputs}}

    inspector = opened.create_engine_inspector()
    layers = json.loads(inspector.get_engine_information(api.LayerInformationFormat.JSON)).get("Layers", [])
    aliased = {name: opened.get_aliased_input_tensor(name) for name in outputs}
    return {
        "inputs": [tensor(name) for name in inputs],
        "outputs": [tensor(name) for name in outputs],
        "profiles": [profile(index) for index in range(opened.num_optimization_profiles)],
        "aliased": {name: into for name, into in aliased.items() if into},
        "read_from": "engine",
        "layers": layers,
        "device_memory_bytes": int(opened.device_memory_size_v2),
    }


def open_engine(path: Path, library: Library) -> Any:
    """Deserialize an engine, which takes a GPU.

    Returns:
        An `ICudaEngine`. It stays valid on its own.

    Raises:
        EngineError: the library refuses it.
        MissingRequirementError: there is no GPU, or not enough memory on it.
    """
    read_header(path)
    with library.log.collecting() as log:
        runtime = _runtime(library)
        # Mapped rather than read: a 13 GB engine need not lie in memory twice.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            opened = runtime.deserialize_cuda_engine(plan)
        if opened is None:
            raise messages.error_from_complaints(
                messages.complaints_of_log(log),
                subject=str(path),
                library=library.title,
                doing="load the engine",
            )
    return opened


def _runtime(library: Library) -> Any:
    try:
        return library.api.Runtime(library.logger)
    except TypeError as error:  # what pybind makes of the null pointer that stands for "no GPU"
        raise MissingRequirementError(
            f"{library.title} could not start",
            subject="the GPU",
            hint="run it on a machine with an NVIDIA GPU",
        ) from error


def _tensor_facts(tensor: TensorSpec) -> dict[str, Any]:
    shape = [dim if isinstance(dim, int) else dim.name for dim in tensor.shape]
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": shape}


def _same_version(left: str, right: str) -> bool:
    """Equal in the parts that both name; `11.5.0` and `11.5.0.5` are the same release."""
    return all(a == b for a, b in zip(left.split("."), right.split("."), strict=False))
