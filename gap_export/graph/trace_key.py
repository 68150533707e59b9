"""What a traced graph is found again by: a hash of everything that it depends on, and of nothing else.

That is the code that makes it (this package, and modules from outside that take part), the spec and the settings of the
component, the versions of what traces, and the kind of processor, whose last bits are in the values of constant tensors.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic_core import PydanticSerializationError, to_json

import gap_export
from gap_export import families
from gap_export.bundle.spec import Dim
from gap_export.environment import versions
from gap_export.graph.trace import traced_bounds
from gap_export.modeling.components import Component
from gap_export.prune.table import PRUNERS

_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")
_KNOWN_BY_VERSION = {"torch", "transformers", *sys.stdlib_module_names}
_PACKAGE = Path(gap_export.__file__).parent

Stamps = dict[Path, tuple[int, int]]
"""Source file -> (time of its last change in ns, bytes)."""


class _Unknown(Exception):
    """There is no telling what a graph depends on."""


def identity_of(component: Component) -> str | None:
    """What the graph of a component goes by in this process: names, types and extents as they are traced, and settings, as JSON.

    Returns:
        None where the settings are not plain values.
    """
    try:
        settings = to_json(component.settings).decode()
    except PydanticSerializationError:
        return None
    spec = component.spec
    tensors = [
        [[tensor.name, tensor.dtype, *map(_traced, tensor.shape)] for tensor in side]
        for side in (spec.inputs, spec.outputs)
    ]
    counted = [tensor.extent_of and _traced(tensor.extent_of) for tensor in spec.inputs]
    return json.dumps([spec.name, tensors, counted, settings])


def _traced(dim: int | Dim) -> int | tuple[str, int, int]:
    """An extent as a graph is traced for it."""
    return dim if isinstance(dim, int) else (dim.name, *traced_bounds(dim))


def key_of(component: Component) -> str | None:
    """What the graph of a component goes by in all processes.

    Returns:
        SHA-256 in hexadecimal: equal for components whose graphs are equal in every byte. None where that cannot be told: the
        settings are not plain values, or a source is not there or was changed while this process runs.
    """
    identity = identity_of(component)
    if identity is None:
        return None
    try:
        package, outside = _sources_of_the_package(), _sources_from_outside(component)
    except _Unknown:
        return None
    facts = {"component": identity, "package": package, "outside": outside, **_surroundings()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _surroundings() -> dict[str, object]:
    processor = (platform.machine(), torch.backends.cpu.get_cpu_capability())
    return {"versions": versions(_PACKAGES), "processor": processor}


def _sources_of_the_package() -> str:
    stamps, digest = _package_as_loaded()
    if _stamps(_PACKAGE.rglob("*.py")) != stamps:
        raise _Unknown
    return digest


@functools.cache
def _package_as_loaded() -> tuple[Stamps, str]:
    """Hashed once: there are over two hundred files."""
    stamps = _stamps(_PACKAGE.rglob("*.py"))
    return stamps, _digest(stamps, _PACKAGE)


def _sources_from_outside(component: Component) -> dict[str, str]:
    """Module -> digest, of rows that were added to a table and of the classes that the component is made of."""
    taking_part = {families.row(name).implementation.partition(":")[0] for name in families.names()}
    taking_part |= {pruner.module for pruner in PRUNERS.values() if pruner.module}
    for module in component.module.modules():
        taking_part.update(kind.__module__ for kind in type(module).__mro__)
    outside = [
        name
        for name in sorted(taking_part)
        if name.partition(".")[0] not in _KNOWN_BY_VERSION | {gap_export.__name__}
    ]
    digests = {}
    for name in outside:
        folder, files = _surrounding_sources(_file_of(name))
        digests[name] = _digest(_stamps(files), folder)
    return digests


def _file_of(module: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise _Unknown
    return Path(spec.origin)


def _surrounding_sources(file: Path) -> tuple[Path, Iterable[Path]]:
    """A module may call others: all files of its package count, or where it lies in none, of its folder."""
    folder = file.parent
    if not (folder / "__init__.py").is_file():
        return folder, folder.glob("*.py")
    while (folder.parent / "__init__.py").is_file():
        folder = folder.parent
    return folder, folder.rglob("*.py")


def _stamps(files: Iterable[Path]) -> Stamps:
    """When files were changed.

    Raises:
        _Unknown: one after this process had begun to read them: what runs may be the text before or after.
    """
    stamps = {}
    for file in files:
        status = file.stat()
        stamps[file] = (status.st_mtime_ns, status.st_size)
        if status.st_mtime_ns > gap_export.IMPORTED_NS:
            raise _Unknown
    if not stamps:
        raise _Unknown
    return stamps


def _digest(files: Iterable[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root).as_posix()} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
